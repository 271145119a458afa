"""A scale for every group of input channels of an output, in the integer kernels: operator, layer, recipe, file."""

import copy

import pytest
import reference
import torch
from torch import nn

import ocsquant
from ocsquant import OCS, Recipe, Weights, ops

OP = torch.ops.ocsquant.quantized_linear
SHAPES = [(1, 70, 100, 32), (5, 64, 256, 128), (3, 130, 1100, 1040), (9, 33, 48, 16), (4, 65, 130, 144)]


def case(m, n, k, size, dtype=torch.float32):
    x = torch.randn(m, k)
    x[0, 5], x[-1, k - 3] = 40.0, -9.0  # values that are split, in the first group and in the last
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return x.to(dtype), codes, torch.rand(-(-k // size), n) * 0.01, torch.randn(n)


@pytest.mark.parametrize(("m", "n", "k", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_the_reference(m, n, k, size, dtype):
    x, codes, scale, bias = case(m, n, k, size, dtype)
    for bits, outliers in ((8, 16), (4, 16), (8, 0)):
        y = ops.quantized_linear(x, ops.pack_weight(codes), scale, bias, None, bits, outliers, 4.0, size)
        assert torch.equal(y, reference.quantized_linear(x, codes, scale, bias, None, None, bits, outliers, 4.0, size))


def test_one_group_is_one_scale():
    x, codes, scale, bias = case(4, 70, 100, 112)
    packed = ops.pack_weight(codes)
    assert torch.equal(
        ops.quantized_linear(x, packed, scale, bias, group_size=112), ops.quantized_linear(x, packed, scale[0], bias)
    )


def test_special_rows_and_empty_batches():
    x, codes, scale, bias = case(4, 70, 100, 32)
    x[1, 50], x[2] = float("nan"), 0.0
    y = ops.quantized_linear(x, ops.pack_weight(codes), scale, bias, group_size=32)
    assert y.isnan().all(1).tolist() == [False, True, False, False]
    assert torch.equal(y[2], bias)
    assert ops.quantized_linear(x[:0], ops.pack_weight(codes), scale, bias, group_size=32).shape == (0, 70)


def test_no_columns_have_no_groups():
    packed = ops.pack_weight(torch.empty(5, 0, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="group_size must be 0 without columns"):
        ops.quantized_linear(torch.empty(2, 0), packed, torch.empty(0, 5), group_size=16)


def test_gradient_and_opcheck():
    x, codes, scale, bias = case(4, 70, 100, 32)
    packed = ops.pack_weight(codes)
    arguments = (x, packed, scale, bias, None, 8, 16, 4.0, 32)
    torch.library.opcheck(OP.default, arguments)
    torch.library.opcheck(
        torch.ops.ocsquant.quantized_linear_train.default, (x.clone().requires_grad_(), *arguments[1:])
    )
    leaf, g = x.clone().requires_grad_(), torch.randn(4, 70)
    ops.quantized_linear(leaf, *arguments[1:]).backward(g)
    weight = codes.float() * scale.T.repeat_interleave(32, 1)[:, :100]
    assert torch.equal(ops.dequantize_packed(packed, scale, 100, None, 32), weight)
    torch.testing.assert_close(leaf.grad, g @ weight)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 200), nn.GELU(), nn.Linear(200, 96, bias=False))


RECIPES = {
    "W4A8": "W4A8",
    "symmetric": Recipe(Weights(bits=4, granularity="group", group_size=32)),
    "8 bits": Recipe(Weights(granularity="group", group_size=64)),
    "zero points per output": Recipe(Weights(bits=4, symmetric=False)),
    "levels": Recipe(Weights(bits=4, granularity="group", group_size=64, codebook="nf4")),
    "wider than the layer": Recipe(Weights(bits=4, granularity="group", group_size=4096, symmetric=False)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_layers_compute_what_the_simulation_says(name, tmp_path):
    model, x = network(), torch.randn(6, 300)
    simulated = ocsquant.quantize(copy.deepcopy(model), RECIPES[name], simulate=True)
    integer = ocsquant.quantize(copy.deepcopy(model), RECIPES[name], fuse=False)
    assert [m.kernel for m in (integer[0], integer[2])] == ["quantized_linear"] * 2
    with torch.no_grad():
        assert torch.equal(integer(x), simulated(x))
    torch.testing.assert_close(integer[0].weight, simulated[0].weight, rtol=1e-6, atol=1e-7)
    ocsquant.save(integer, tmp_path / "file")
    again = ocsquant.load(network(), tmp_path / "file")
    assert torch.equal(again(x), integer(x))
    assert again[0].group_size == integer[0].group_size
    assert f"group_size={integer[0].group_size}" in str(integer) or integer[0].group_size == 0


def test_groups_compile_and_export(tmp_path):
    model, x = ocsquant.quantize(network(), "W4A8"), torch.randn(6, 300)
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(Weights(symmetric=False)), "zero points at 8 bits"),
        (Recipe(Weights(bits=4, granularity="group", group_size=24)), "multiple of 16"),
        (Recipe(Weights(bits=4, granularity="group", split=OCS(0.1))), "split channels"),
        (Recipe(Weights(bits=4, granularity="group"), ocsquant.PerTensorStatic()), "calibrated inputs"),
    ],
)
def test_what_has_no_kernel_says_so(recipe, reason):
    with pytest.raises(ocsquant.NothingToQuantizeError, match=reason):
        ocsquant.quantize(network(), recipe, calibration=[torch.randn(3, 300)])


def test_a_file_whose_groups_do_not_fit_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    ocsquant.save(ocsquant.quantize(network(), "W4A8"), tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    changed = {key: text.replace('"group_size": 128', '"group_size": 96') for key, text in metadata.items()}
    assert changed != metadata
    save_file(tensors, tmp_path / "file", changed)
    with pytest.raises(ocsquant.CheckpointError):
        ocsquant.load(network(), tmp_path / "file")
