"""quantized_conv2d and QuantizedConv: every geometry to the bits of the reference, in the place of torch's modules."""

import copy
from itertools import product

import pytest
import reference
import torch
from convolutions import MODULES, SPLIT, channels_last, pack, quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ocsquant
from ocsquant import OCS, Activations, PerToken, Recipe, SplitQuant, Weights, ops
from ocsquant.nn import QuantizedConv

sizes = st.integers(1, 3)


@settings(max_examples=2000, deadline=None)
@given(
    samples=st.integers(0, 3),
    channels=st.sampled_from([1, 2, 3, 5, 16, 33]),
    n=st.sampled_from([1, 7, 64, 70]),
    kernel=st.tuples(sizes, sizes),
    stride=st.tuples(sizes, sizes),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(sizes, sizes),
    extra=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    layout=st.sampled_from(["first", "last", "strided"]),
    bias=st.booleans(),
    outliers=st.sampled_from([0, 1, 16]),
    spread=st.sampled_from(["normal", "positive", "outliers"]),
    groups=st.sampled_from([1, 1, 2, 3]),
)
def test_every_geometry_gives_the_bits_of_the_reference(
    samples, channels, n, kernel, stride, padding, dilation, extra, layout, bias, outliers, spread, groups
):
    channels, n = channels * groups, n * groups
    height, width = (
        max(1, d * (k - 1) + 1 - 2 * p) + e for d, k, p, e in zip(dilation, kernel, padding, extra, strict=True)
    )
    x = torch.randn(samples, channels, height, width)
    if spread == "positive":
        x = x.relu()
    elif spread == "outliers" and x.numel():
        x.view(-1)[:: max(1, x.numel() // 5)] *= 60
    if layout == "last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    codes = torch.randint(-127, 128, (n, channels // groups, *kernel), dtype=torch.int8)
    scale, offset = torch.rand(n) * 0.01, torch.randn(n) if bias else None
    y = ops.quantized_conv2d(
        x, pack(codes), scale, offset, None, *kernel, *stride, *padding, *dilation, 8, outliers, 4.0, groups=groups
    )
    like = nn.functional.conv2d(x, codes.float(), None, stride, padding, dilation, groups)
    assert y.shape == like.shape
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last) if last else y.is_contiguous()
    if samples:
        given_x = x if last else x.contiguous()
        expected = reference.quantized_conv2d(
            given_x, codes, scale, offset, stride, padding, dilation, 8, outliers, groups=groups
        )
        assert torch.equal(y, expected)


def test_special_samples():
    codes, scale = torch.randint(-127, 128, (7, 3, 3, 3), dtype=torch.int8), torch.rand(7)
    x = torch.randn(3, 3, 6, 6)
    x[1, 2, 3, 3], x[2] = float("nan"), 0.0
    y = ops.quantized_conv2d(x, pack(codes), scale, None, None, 3, 3)
    assert y[1].isnan().all()
    assert torch.equal(y[2], torch.zeros_like(y[2]))
    assert y[0].isfinite().all()
    x = torch.zeros(1, 3, 40, 40)
    x[0, 0, 3, 3] = 1e8  # alone among zeros: the step is held where its code fits
    y = ops.quantized_conv2d(x, pack(codes), scale, None, None, 3, 3)
    expected = reference.quantized_conv2d(x, codes, scale)
    assert torch.equal(y, expected)
    assert (y.abs().amax() - 1e8 * 127 * scale.max()).abs() < 1e8 * 127


def test_sums_of_large_samples_fit():
    """A patch of outliers under the largest weights: the step is as large as int32 needs, no outlier is given up."""
    depth = 512 * 9
    x = torch.zeros(1, 512, 128, 128)
    x[..., 50:53, 50:53] = 1.0
    ones = torch.full((64, depth), 127, dtype=torch.int8)
    everywhere = torch.arange(depth, dtype=torch.int32)
    packed = ops.pack_weight(ones, ones)
    y = ops.quantized_conv2d(x, packed, torch.ones(64), None, everywhere, 3, 3, 1, 1, 0, 0, 1, 1, 8, 16, 2.0)
    assert (y.amax() / (254 * depth) - 1).abs() < 0.01
    assert y.amin() >= 0


def test_tails_zero_points_and_levels():
    x, n, depth = torch.randn(2, 5, 7, 6), 70, 45
    codes = torch.randint(-127, 128, (n, depth), dtype=torch.int8)
    tail, index = torch.randint(-127, 128, (n, 2), dtype=torch.int8), torch.tensor([3, 44], dtype=torch.int32)
    scale = torch.rand(n)
    whole = codes.double().index_add(1, index.long(), tail.double())
    y = ops.quantized_conv2d(x, ops.pack_weight(codes, tail), scale, None, index, 3, 3)
    w = whole.reshape(n, 3, 3, 5).permute(0, 3, 1, 2)
    steps = [reference.quantize_plane(sample) for sample in x]
    for got, (q, step) in zip(y, steps, strict=True):
        total = nn.functional.conv2d(q.double()[None], w)[0].float()
        assert torch.equal(got, total * (torch.tensor(step) * scale)[:, None, None])
    zero = torch.randint(0, 16, (1, n), dtype=torch.uint8)
    low = (torch.randint(0, 16, (n, depth)) - zero.T.long()).to(torch.int8)
    stored = (4, zero, None)
    packed = ops.pack_weight(low, None, *stored)
    rest = (3, 3, 1, 1, 1, 1, 1, 1, 8, 16, 4.0)
    expected = ops.quantized_conv2d(x, ops.pack_weight(low), scale, None, None, *rest)
    assert torch.equal(ops.quantized_conv2d(x, packed, scale, None, None, *rest, *stored), expected)


def test_threads_give_the_same_bits():
    codes, scale = torch.randint(-127, 128, (70, 40, 3, 3), dtype=torch.int8), torch.rand(70)
    x, packed, threads = torch.randn(3, 40, 20, 20), pack(codes), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.quantized_conv2d(x, packed, scale, None, None, 3, 3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", MODULES)
def test_modules_keep_the_layout_of_their_input(name):
    make, shape = MODULES[name]
    module, x = make(), channels_last(torch.randn(shape))
    if x is None or "one sample" in name:
        return
    q, y = quantized(module), module(x)
    assert q(x).stride() == y.stride()
    torch.testing.assert_close(q(x), q(x.contiguous()), rtol=1e-4, atol=1e-4)  # sums in another order: the step's bits
    assert q(x[:0]).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("name", MODULES)
def test_modules_take_what_the_float_one_takes(name, tmp_path):
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape)
    q = quantized(module)
    assert type(q) is QuantizedConv
    twin = copy.deepcopy(module)
    twin.weight.data.copy_(q.weight)
    assert q.weight.shape == module.weight.shape
    expected, y = twin(x), q(x)
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert (y - expected).norm() < 0.02 * expected.norm()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert q(x.to(dtype)).dtype == dtype
    leaf, g = x.clone().requires_grad_(), torch.randn(y.shape)
    q(leaf).backward(g)
    other = x.clone().requires_grad_()
    twin(other).backward(g)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)
    ocsquant.save(nn.Sequential(q), tmp_path / "file")
    assert torch.equal(ocsquant.load(nn.Sequential(make()), tmp_path / "file")(x), y)
    assert torch.equal(copy.deepcopy(q)(x), y)


RECIPES = {
    "4 bits": Recipe(Weights(bits=4)),
    "zero points": Recipe(Weights(bits=4, symmetric=False)),
    "split": Recipe(Weights(bits=5, split=OCS(expand_ratio=0.2))),
    "codebook": Recipe(Weights(bits=2, split=SplitQuant())),
    "plain": Recipe(Weights(bits=6), PerToken(bits=6, max_outliers=0)),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_recipe_gives_the_weight_of_the_simulation(name, kernel):
    module = nn.Conv2d(12, 20, kernel)
    simulated = ocsquant.quantize(copy.deepcopy(module), RECIPES[name], simulate=True)
    torch.testing.assert_close(quantized(module, RECIPES[name]).weight, simulated.weight.data, rtol=1e-5, atol=1e-7)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 96, 3, 2, 1)
        self.depthwise, self.head = nn.Conv2d(96, 96, 3, groups=96), nn.Linear(96, 128)

    def forward(self, x):
        x = self.depthwise(self.body(self.stem(x).relu()).relu())
        return self.head(x.view(x.shape[0], 96, -1).mean(-1))


def test_default_report_compile_and_export(tmp_path):
    torch.manual_seed(0)
    model, x = Network().eval(), torch.randn(2, 3, 12, 12)
    before = model(x)
    ocsquant.quantize(model)
    report = {row.path: row for row in ocsquant.report(model).layers}
    assert report["body"].scheme == "W8A8"
    assert report["body"].kernel == "quantized_conv2d"
    assert "too small" in report["stem"].reason
    assert "in each group" in report["depthwise"].reason
    with torch.no_grad():
        y = model(x)
        assert (y - before).norm() < 0.02 * before.norm()
        torch.compiler.reset()
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
        for layout in (torch.contiguous_format, torch.channels_last):
            xs = x.contiguous(memory_format=layout)
            exported = torch.export.export(model.body, (model.stem(xs),))
            assert torch.equal(exported.module()(model.stem(xs)), model.body(model.stem(xs)))
    ocsquant.save(model, tmp_path / "file")
    assert torch.equal(ocsquant.load(Network().eval(), tmp_path / "file")(x), y)
    other = Network()
    other.body = nn.Conv2d(64, 96, 3, 1, 1)
    with pytest.raises(ocsquant.SchemaMismatchError):
        ocsquant.load(other, tmp_path / "file")


@pytest.mark.parametrize("name", ["groups", "1d, groups", "3d", "3d, groups, same", "3d, pointwise"])
def test_every_kind_compiles_and_exports(name):
    make, shape = MODULES[name]
    model, x = nn.Sequential(quantized(make()), nn.ReLU()), torch.randn(shape)
    torch.compiler.reset()
    for xs in (x, channels_last(x)):
        if xs is not None:
            with torch.no_grad():
                y = model(xs)
                assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(xs), y)
                assert torch.equal(torch.export.export(model, (xs,)).module()(xs), y)


def test_batchnorm_folds_into_groups_and_volumes():
    for make, shape in (MODULES["groups"], MODULES["3d"]):
        kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
        model, x = nn.Sequential(make(), kind(20)).eval(), torch.randn(shape)
        model[1].running_mean.normal_()
        expected = model(x)
        y = ocsquant.quantize(model, overrides={"0": "W8A8"}, fold_batchnorm=True)(x)
        assert type(model[0]) is QuantizedConv
        assert type(model[1]) is not kind
        assert (y - expected).norm() < 0.02 * expected.norm()


def test_a_shared_weight_stays_one():
    model = nn.Sequential(nn.Conv2d(64, 96, 3), nn.Conv2d(96, 64, 1), nn.Conv2d(64, 96, 3))
    model[2].weight = model[0].weight
    ocsquant.quantize(model, ignore=["1"])
    assert model[0].product.packed is model[2].product.packed
    assert not torch.equal(model[0].bias, model[2].bias)


@pytest.mark.parametrize("nonlinearity", ["none", "relu", "silu"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_residual_is_added_before_the_nonlinearity(kernel, nonlinearity):
    formats = (torch.contiguous_format, torch.channels_last)
    for outputs, groups, stride, *layouts in product((16, 48, 64, 160), (1, 2), (1, 2), formats, formats):
        x = torch.randn(2, 16, 9, 7).contiguous(memory_format=layouts[0])
        codes = torch.randint(-127, 128, (outputs, 16 // groups, kernel, kernel), dtype=torch.int8)
        window = {f"{name}_{side}": size for name, size in (("kernel", kernel), ("stride", stride)) for side in "hw"}
        form = {"bias": torch.randn(outputs), "groups": groups, **window}
        plain = ops.quantized_conv2d(x, pack(codes), torch.full((outputs,), 0.01), **form)
        residual = torch.randn(plain.shape).contiguous(memory_format=layouts[1])
        form |= {"nonlinearity": nonlinearity, "residual": residual}
        y = ops.quantized_conv2d(x, pack(codes), torch.full((outputs,), 0.01), **form)
        assert torch.equal(y, ops.nonlinear(plain + residual, nonlinearity))
        assert y.stride() == plain.stride()


def test_opcheck():
    codes, scale = torch.randint(-127, 128, (7, 3, 3, 3), dtype=torch.int8), torch.rand(7)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 6, 6).contiguous(memory_format=layout)
        arguments = (x, pack(codes), scale, None, None, 3, 3, 2, 1, 1, 0)
        torch.library.opcheck(torch.ops.ocsquant.quantized_conv2d.default, arguments)
        whole = {"nonlinearity": "relu", "residual": torch.randn(2, 7, 3, 4)}
        torch.library.opcheck(torch.ops.ocsquant.quantized_conv2d.default, arguments, whole)


def test_wrong_calls_name_the_argument():
    q = quantized(nn.Conv2d(6, 20, 3))
    for x in (torch.randn(2, 5, 9, 9), torch.randn(9, 9), torch.ones(2, 6, 9, 9, dtype=torch.int32)):
        with pytest.raises(ocsquant.ArgumentError, match="input"):
            q(x)
    with pytest.raises(RuntimeError, match="x must be as large as the kernel"):
        q(torch.randn(2, 6, 2, 9))
    with pytest.raises(ocsquant.ArgumentError, match="a depth of at least 3"):
        quantized(nn.Conv3d(6, 20, 3))(torch.randn(2, 6, 2, 9, 9))
    codes = torch.ones(70, 2, 3, 3, dtype=torch.int8)
    rest = (3, 3, 1, 1, 1, 1, 1, 1, 8, 0, 4.0, 8, None, None, 1)
    x, packed, ones = torch.randn(1, 2, 9, 9), pack(codes), torch.ones(2)
    with pytest.raises(RuntimeError, match="input_shift needs padding 0"):
        ops.quantized_conv2d(x, packed, torch.ones(70), None, None, *rest, ones, ones)
    with pytest.raises(RuntimeError, match="input_shift needs input_inverse"):
        ops.quantized_conv2d(x, packed, torch.ones(70), None, None, *rest, None, ones)
    with pytest.raises(RuntimeError, match="groups must divide the 70 outputs"):
        ops.quantized_conv2d(torch.randn(1, 6, 9, 9), pack(codes), torch.ones(70), kernel_h=3, kernel_w=3, groups=3)


SMOOTHED = Activations(max_outliers=0, smooth_alpha=0.5)


@pytest.mark.parametrize(
    ("module", "recipe", "reason"),
    [
        (nn.Conv2d(64, 64, 3, groups=64), "W8A8", "too small to gain: 1 outputs of 1 channels in each group"),
        (nn.Conv2d(512, 128, 3, groups=2), "W4A8", "no integer kernel for group scales in grouped convolutions"),
        (nn.Conv2d(64, 128, 3), Recipe(activations=SMOOTHED), "Conv2d with inputs scaled and then quantized per token"),
        (nn.Conv2d(64, 128, 3, groups=2), Recipe(activations=SPLIT), "Conv2d with split input channels in groups"),
        (nn.Conv2d(3, 64, 3), "W8A8", "too small to gain"),
    ],
)
def test_what_has_no_kernel_says_so(module, recipe, reason):
    with pytest.raises(ocsquant.NothingToQuantizeError, match=reason):
        ocsquant.quantize(module, recipe, calibration=[torch.randn(2, module.in_channels, 6, 6)])


def test_few_channels_of_many_weights_run_in_integers_where_products_are_fast():
    model = ocsquant.quantize(nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.Linear(512, 512)))
    assert isinstance(model[0], QuantizedConv) == (ops.cpu_isa()[0] not in ("avx2", "scalar"))


def test_a_sample_too_large_for_32_bits_is_refused():
    x = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**16, 2**15)  # one value, seen 2^31 times
    packed = pack(torch.ones(1, 1, 3, 3, dtype=torch.int8))
    with pytest.raises(RuntimeError, match=r"x must have fewer than 2\^31 values a sample, got 2147483648"):
        ops.quantized_conv2d(x, packed, torch.ones(1), kernel_h=3, kernel_w=3)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("outputs", [1, 3])
def test_single_channels(outputs, last):
    """Depthwise: tap by tap instead of patch by patch, several lines at once where nothing is strided."""
    for kernel, stride, padding, dilation, fixed in (
        ((3, 3), 1, 1, 1, False),
        ((3, 3), 2, 1, 1, True),
        ((5, 2), 1, 0, 2, False),
        ((1, 4), 2, 2, 1, False),
    ):
        x = torch.randn(2, 19, 40, 60)
        x[0, 3, 20, 30], x[1, 7, 0, 0] = 90.0, float("nan")
        x = channels_last(x) if last else x
        codes = torch.randint(-127, 128, (19 * outputs, 1, *kernel), dtype=torch.int8)
        scale, bias = torch.rand(19 * outputs) * 0.01, torch.randn(19 * outputs)
        inverse = torch.rand(19) * 50 if fixed else None
        window = {"kernel": kernel, "stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2}
        sizes = {f"{name}_{side}": v for name, pair in window.items() for side, v in zip("hw", pair, strict=True)}
        y = ops.quantized_conv2d(x, pack(codes), scale, bias, groups=19, input_inverse=inverse, **sizes)
        form = (tuple(window["stride"]), tuple(window["padding"]), tuple(window["dilation"]))
        want = reference.quantized_conv2d(x, codes, scale, bias, *form, groups=19, inverse=inverse)
        assert torch.equal(y.nan_to_num(1e9), want.nan_to_num(1e9))
        rectified = ops.quantized_conv2d(
            x, pack(codes), scale, bias, groups=19, input_inverse=inverse, nonlinearity="relu", **sizes
        )
        assert torch.equal(rectified.nan_to_num(1e9), want.relu().nan_to_num(1e9))
