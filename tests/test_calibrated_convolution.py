"""Convolutions whose inputs have fixed scales and shifts from calibration: OutlierTune, static per tensor."""

import copy

import pytest
import reference
import torch
from convolutions import MODULES, SPLIT, pack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ocsquant
from ocsquant import PerChannelStatic, PerTensorStatic, PerToken, Recipe, Weights, ops

sizes = st.integers(1, 3)


@settings(max_examples=500, deadline=None)
@given(
    channels=st.sampled_from([1, 3, 16, 33, 48, 64]),
    n=st.sampled_from([7, 64, 70]),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 1)]),
    stride=st.tuples(sizes, sizes),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    last=st.booleans(),
    outliers=st.sampled_from([0, 1, 16]),
    bits=st.sampled_from([8, 6]),
    shifted=st.booleans(),
    groups=st.sampled_from([1, 1, 2]),
)
def test_fixed_steps_give_the_bits_of_the_reference(
    channels, n, kernel, stride, padding, size, last, outliers, bits, shifted, groups
):
    channels, n = channels * groups, n * groups
    x = torch.randn(2, channels, *size) * torch.rand(channels, 1, 1)
    x.view(-1)[:: max(1, x.numel() // 7)] *= 30  # beyond the range
    inverse = 2 ** (bits - 3) / torch.rand(channels).clamp(min=0.1)
    shift = torch.randn(channels) * 0.1 if shifted else None
    padding = (0, 0) if shifted else padding
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    codes = torch.randint(-127, 128, (n, channels // groups, *kernel), dtype=torch.int8)
    scale, bias = torch.rand(n) * 0.01, torch.randn(n)
    rest = (*kernel, *stride, *padding, 1, 1, bits, outliers, 4.0, 8, None, None, groups, inverse, shift)
    y = ops.quantized_conv2d(x, pack(codes), scale, bias, None, *rest)
    expected = reference.quantized_conv2d(
        x, codes, scale, bias, stride, padding, (1, 1), bits, outliers, 4.0, groups, inverse, shift
    )
    assert torch.equal(y, expected)


def test_fixed_steps_of_special_samples():
    codes, scale = torch.full((64, 512, 3, 3), 127, dtype=torch.int8), torch.ones(64)
    x, inverse = torch.ones(3, 512, 6, 6), torch.full((512,), 1e6)  # every value beyond the range
    x[1, 5, 2, 2] = float("inf")
    rest = (3, 3, 1, 1, 0, 0, 1, 1, 8, 16, 4.0, 8, None, None, 1, inverse)
    y = ops.quantized_conv2d(x, pack(codes), scale, None, None, *rest)
    assert y[1].isnan().all()
    assert torch.equal(y[0], torch.full_like(y[0], 127.0 * 127 * 512 * 9))  # too many: clamped
    x = torch.zeros(1, 512, 20, 20)
    x[..., :3, :3] = 1.0
    y = ops.quantized_conv2d(x, pack(codes), scale, None, None, *rest)
    assert 127.0 * 127 * 512 * 9 < y.amax() < 2**31  # few enough to keep, held where int32 sums fit
    assert y.amin() >= 0


FIXED = {
    "tensor": PerTensorStatic(),
    "tensor, split at run time": PerTensorStatic(max_outliers=16),
    "channel": PerChannelStatic(),
    "channel, not shifted": PerChannelStatic(shift=False),
    "channel, split at run time": PerChannelStatic(max_outliers=16),
    "split channels": SPLIT,
}


@pytest.mark.parametrize(
    "name", ["3x3", "pointwise", "groups", "1d", "same, even kernel", "reflect", "3d, groups, same"]
)
@pytest.mark.parametrize("how", FIXED)
def test_calibrated_inputs(name, how, tmp_path):
    if how == "split channels" and "groups" in name:
        return
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module = make()
    x = torch.randn(8, *shape[1:]).abs() * (torch.rand(shape[1], *(1 for _ in shape[2:])) + 0.2)
    recipe = Recipe(activations=FIXED[how])
    q = ocsquant.quantize(copy.deepcopy(module), overrides={"": recipe}, calibration=[x])
    assert q.input_inverse is not None or "inputs per token" in str(ocsquant.report(q))
    y, expected = q(x), module(x)
    assert (y - expected).norm() < 0.03 * expected.norm()
    assert (q.weight - module.weight).norm() < 0.03 * module.weight.norm()
    leaf, other, g = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn(y.shape)
    q(leaf).backward(g)
    module(other).backward(g)
    assert (leaf.grad - other.grad).norm() < 0.03 * other.grad.norm()
    ocsquant.save(nn.Sequential(q), tmp_path / "file")
    loaded = ocsquant.load(nn.Sequential(make()), tmp_path / "file")
    assert torch.equal(loaded(x), y)
    assert torch.equal(copy.deepcopy(q)(x), y)
    assert torch.equal(q.bfloat16()(x), y)
    with torch.no_grad():
        torch.compiler.reset()
        assert torch.equal(torch.compile(loaded, fullgraph=True, backend="aot_eager")(x), y)
        assert torch.equal(torch.export.export(loaded, (x,)).module()(x), y)


def test_calibrated_inputs_halve_the_error_of_positive_inputs():
    """Shifted to both sides of zero they use all codes; a step per token and channel scales can only use half."""
    torch.manual_seed(0)
    module, x = nn.Conv2d(32, 64, 3), torch.rand(8, 32, 12, 12)
    exact, errors = module(x), {}
    for name, activations in (("per sample", PerToken(4)), ("calibrated", PerChannelStatic(4))):
        q = ocsquant.quantize(copy.deepcopy(module), overrides={"": Recipe(Weights(8), activations)}, calibration=[x])
        errors[name] = (q(x) - exact).norm()
    assert errors["calibrated"] < 0.6 * errors["per sample"]


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(32, 64, 3, padding=1), lambda: nn.Conv1d(32, 64, 4, padding="same")]
)
def test_zeros_around_the_input_are_inputs_too(make):
    """Far from all that calibration sees, they would be clamped to its edge."""
    torch.manual_seed(0)
    module = make()
    x = torch.rand(8, 32, *(12 for _ in module.kernel_size)) + 1.0
    q = ocsquant.quantize(
        copy.deepcopy(module), overrides={"": Recipe(activations=PerChannelStatic())}, calibration=[x]
    )
    expected = module(x)
    assert (q(x) - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("rounding", ["gptq", "squant", "nearest"])
def test_calibrated_inputs_with_every_rounding(rounding):
    torch.manual_seed(0)
    module, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(6, 16, 10, 10)
    clip = "output" if rounding == "gptq" else "none"
    recipe = Recipe(Weights(6, clip=clip, rounding=rounding), PerChannelStatic())
    q = ocsquant.quantize(copy.deepcopy(module), overrides={"": recipe}, calibration=[x])
    simulated = ocsquant.quantize(copy.deepcopy(module), overrides={"": recipe}, calibration=[x], simulate=True)
    torch.testing.assert_close(q.weight, simulated.weight.data, rtol=1e-5, atol=1e-7)
    expected = module(x)
    assert (q(x) - expected).norm() < 0.05 * expected.norm()
