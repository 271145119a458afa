"""Convolutions with a scale for every group of columns: operator, layer, recipes, file."""

import copy
from itertools import product

import pytest
import reference
import torch
from convolutions import MODULES, channels_last, pack, quantized
from torch import nn

import ocsquant
from ocsquant import Recipe, Weights, ops
from ocsquant.nn import QuantizedConv

RECIPES = {
    "W4A8": "W4A8",
    "8 bits, groups of 32": Recipe(Weights(granularity="group", group_size=32)),
    "6 bits, groups of 16, asymmetric": Recipe(Weights(bits=6, granularity="group", group_size=16, symmetric=False)),
}
UNGROUPED = [name for name in MODULES if "groups" not in name and name != "depthwise"]


@pytest.mark.parametrize("size", [16, 48, 128])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
def test_the_bits_of_the_reference(kernel, last, size):
    for outputs, padding, stride, outliers in product((5, 70), (0, 1), (1, 2), (0, 16)):
        channels = 24
        codes = torch.randint(-127, 128, (outputs, channels, *kernel), dtype=torch.int8)
        scale = torch.rand(-(-codes[0].numel() // size), outputs) * 0.01
        x, bias = torch.randn(2, channels, 9, 8), torch.randn(outputs)
        x[0, 3, 4, 4], x[1, -1, 0, 0] = 60.0, -11.0  # split, in the first group and in the last
        x = channels_last(x) if last else x
        window = {"kernel_h": kernel[0], "kernel_w": kernel[1], "stride_h": stride, "padding_w": padding}
        y = ops.quantized_conv2d(
            x, pack(codes), scale, bias, max_outliers=outliers, group_size=size, stride_w=stride, **window
        )
        want = reference.quantized_conv2d(
            x, codes, scale, bias, (stride, stride), (0, padding), max_outliers=outliers, group_size=size
        )
        assert torch.equal(y, want)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_residuals_nonlinearities_and_threads(size, stride):
    codes = torch.randint(-127, 128, (70, 32, size, size), dtype=torch.int8)
    scale, bias = torch.rand(2 * size * size, 70) * 0.01, torch.randn(70)
    sides = {"kernel": size, "stride": stride, "padding": size // 2}
    window = {f"{name}_{side}": value for name, value in sides.items() for side in "hw"} | {"group_size": 16}
    before = torch.get_num_threads()
    for x in (torch.randn(3, 32, 20, 20), channels_last(torch.randn(3, 32, 20, 20))):
        plain = ops.quantized_conv2d(x, pack(codes), scale, bias, **window)
        residual = torch.randn(plain.shape)
        fused = ops.quantized_conv2d(x, pack(codes), scale, bias, nonlinearity="relu", residual=residual, **window)
        assert torch.equal(fused, (plain + residual).relu())
        try:
            torch.set_num_threads(2)
            assert torch.equal(ops.quantized_conv2d(x, pack(codes), scale, bias, **window), plain)
        finally:
            torch.set_num_threads(before)


def test_one_group_is_one_scale():
    codes, x = torch.randint(-127, 128, (70, 6, 3, 3), dtype=torch.int8), torch.randn(1, 6, 9, 9)
    scale = torch.rand(1, 70)
    y = ops.quantized_conv2d(x, pack(codes), scale, kernel_h=3, kernel_w=3, group_size=64)
    assert torch.equal(y, ops.quantized_conv2d(x, pack(codes), scale[0], kernel_h=3, kernel_w=3))


def test_opcheck_and_errors():
    codes, x = torch.randint(-127, 128, (70, 6, 3, 3), dtype=torch.int8), torch.randn(1, 6, 9, 9)
    operator = torch.ops.ocsquant.quantized_conv2d.default
    arguments = (x, pack(codes), torch.rand(4, 70), None, None, 3, 3)
    torch.library.opcheck(operator, arguments, {"group_size": 16})
    with pytest.raises(RuntimeError, match="group_size needs groups 1, got 2"):
        ops.quantized_conv2d(torch.randn(1, 12, 9, 9), *arguments[1:], groups=2, group_size=16)
    with pytest.raises(RuntimeError, match=r"scale must be \[2, outputs\] for 54 columns"):
        ops.quantized_conv2d(*arguments, group_size=32)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("name", UNGROUPED)
def test_a_layer_is_the_float_one_on_its_weights(name, recipe):
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape)
    layer = quantized(module, recipe)
    assert isinstance(layer, QuantizedConv)
    plain = copy.deepcopy(module)
    plain.weight.data = layer.weight
    for given in filter(lambda v: v is not None, (x, channels_last(x))):
        with torch.no_grad():
            got, want = layer(given), plain(given)
        assert (got - want).norm() < 0.02 * want.norm()  # what 8 bits of input lose
    simulated = ocsquant.quantize(copy.deepcopy(module), overrides={"": recipe}, simulate=True)
    assert torch.equal(simulated.weight, layer.weight)


def test_groups_are_of_neighbouring_channels_at_one_position():
    module = nn.Conv2d(32, 8, 3, bias=False)
    module.weight.data[:, :, 1, 1] *= 1000.0
    corner = module.weight.data[:, :, 0, 0]

    def lost(size):
        weights = Weights(bits=4, granularity="group", group_size=size, rounding="nearest")
        return float((quantized(module, Recipe(weights)).weight[:, :, 0, 0] - corner).norm() / corner.norm())

    assert lost(32) < 0.15
    assert lost(9 * 32) > 0.99


@pytest.mark.parametrize("name", ["3x3", "1d", "3d"])
def test_file_copy_and_compiler(name, tmp_path):
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape)

    def made(layer):
        return ocsquant.quantize(nn.Sequential(layer), overrides={"0": "W4A8"})

    model = made(module)
    with torch.no_grad():
        y = model(x)
        ocsquant.save(model, tmp_path / "model.safetensors")
        loaded = ocsquant.load(nn.Sequential(make()), tmp_path / "model.safetensors")
        assert torch.equal(loaded(x), y)
        assert torch.equal(copy.deepcopy(model)(x), y)
        other = made(make())
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), y)
        torch.compiler.reset()
        assert torch.equal(torch.compile(model, fullgraph=True)(x), y)


def test_roundings_in_groups():
    """Of correlated inputs GPTQ loses less than the nearest codes."""
    module = nn.Conv2d(16, 24, 3, padding=1)
    x = torch.randn(8, 4, 12, 12).repeat(1, 4, 1, 1) + 0.3 * torch.randn(8, 16, 12, 12)
    lost, exact = {}, module(x).detach()
    for rounding in ("nearest", "gptq", "squant"):
        recipe = Recipe(Weights(bits=3, granularity="group", group_size=48, rounding=rounding))
        layer = ocsquant.quantize(copy.deepcopy(module), overrides={"": recipe}, calibration=[x])
        lost[rounding] = float((layer(x).detach() - exact).norm())
    assert lost["gptq"] < 0.8 * lost["nearest"]
    assert lost["squant"] != lost["nearest"]


def test_search_sees_what_the_kernels_have():
    model, x = nn.Sequential(nn.Conv2d(96, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3)), torch.randn(2, 96, 8, 8)
    found = ocsquant.search(model, [x], 6.6, {"W4A8": "W4A8", "W8A8": "W8A8"})
    ocsquant.quantize(model, found)
    assert {m.product.group_size for m in model if isinstance(m, QuantizedConv)} == {128, 0}


def test_one_group_leaves_kernels_together_for_squant():
    """Scales of single outputs: whatever the size of the group, the codes are those of scales per channel."""
    module = nn.Conv2d(12, 64, 3)
    grouped = quantized(module, Recipe(Weights(bits=4, granularity="group", group_size=128)))
    assert torch.equal(grouped.weight, quantized(module, Recipe(Weights(bits=4))).weight)


class Block(nn.Module):
    """A residual of pointwise convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(256, 256, 1), nn.Conv2d(256, 256, 1), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.a(x))
        y = self.b(y)
        y = y + x
        return self.relu(y)


def test_fused_residuals():
    x = channels_last(torch.randn(1, 256, 6, 6))
    model = Block().to(memory_format=torch.channels_last)
    fused, plain = (ocsquant.quantize(copy.deepcopy(model), "W4A8", fuse=fuse) for fuse in (x, False))
    assert fused.b.adds is not None
    with torch.no_grad():
        for given in (x, x.contiguous()):
            assert torch.equal(fused(given), plain(given))
