"""The laws of grids, clips and splits."""

import math
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ocsquant import ops
from ocsquant.methods import clip, grid, ocs
from ocsquant.methods.grid import QuantizedWeight, code_limit, largest_range, quantize_weight, weight_sqnr
from ocsquant.methods.tokens import quantize_tokens

import reference  # isort: skip


def heavy_tailed(n: int = 32, k: int = 200) -> torch.Tensor:
    return torch.distributions.StudentT(3.0).sample((n, k))


def floor_code(v: torch.Tensor) -> torch.Tensor:
    """The paper's rounding."""
    return torch.floor(v + 0.5)


@given(st.floats(0.0, 1.0), st.integers(1, 3000))
@settings(deadline=None)
def test_number_of_splits(ratio, channels):
    splits = ocs.split_count(ratio, channels)
    assert splits == math.ceil(ratio * channels)
    largest = torch.rand(channels)
    assert ocs.plan_largest(largest, splits).added() == splits


@given(st.lists(st.floats(0.0, 100.0, width=32), min_size=1, max_size=40), st.integers(0, 60))
@settings(deadline=None)
def test_equal_shares_never_leave_a_larger_maximum_than_halving(values, splits):
    largest = torch.tensor(values)
    after = {}
    for shares in ("equal", "halving"):
        plan = ocs.plan_largest(largest, splits, shares)
        assert plan.added() == splits
        after[shares] = float((largest / plan.ranges()).max())
    assert after["equal"] <= after["halving"] * (1 + 1e-6)


def test_shares_of_the_papers_tree():
    assert ocs.shares_of(3, "halving") == [0.5, 0.25, 0.25]
    assert ocs.shares_of(4, "halving") == [0.25] * 4
    assert ocs.shares_of(5, "halving") == [0.25] * 3 + [0.125] * 2
    for copies in range(1, 12):
        assert sum(ocs.shares_of(copies, "halving")) == 1.0
        assert ocs.range_of(copies, "halving") == 1 / max(ocs.shares_of(copies, "halving"))
        assert ocs.range_of(copies, "equal") == copies


@pytest.mark.parametrize("shares", ["equal", "halving"])
@pytest.mark.parametrize("copies", [2, 3, 4, 5])
def test_codes_of_quantization_aware_copies_add_up_to_the_code(shares, copies):
    """Hermite's identity; an exact zero stays zero."""
    step = torch.tensor(0.37)
    w = torch.cat([torch.randn(400, 1, dtype=torch.float64) * 9, torch.zeros(1, 1, dtype=torch.float64)])
    plan = ocs.SplitPlan(torch.tensor([copies], dtype=torch.int32), shares)
    expanded, index = ocs.expand_weight(w, plan, step.double().expand_as(w))
    assert index.tolist() == [0] * copies
    assert torch.equal(floor_code(expanded / step).sum(1), floor_code(w[:, 0] / step))
    torch.testing.assert_close(expanded.sum(1), w[:, 0])
    assert not expanded[-1].any()


def test_naive_split_has_four_times_the_squared_error():
    g = torch.Generator().manual_seed(3)
    w = torch.rand(1, 400_000, generator=g, dtype=torch.float64) * 100
    plan = ocs.SplitPlan(torch.full((400_000,), 2, dtype=torch.int32))
    errors = {}
    for name, step in (("naive", None), ("aware", torch.ones(1, 1, dtype=torch.float64))):
        expanded, index = ocs.expand_weight(w[:, :4000], ocs.SplitPlan(plan.copies[:4000]), step)
        codes = floor_code(expanded)
        total = torch.zeros(1, 4000, dtype=torch.float64).index_add_(1, index, codes)
        errors[name] = float((total - w[:, :4000]).square().mean())
    assert errors["naive"] / errors["aware"] == pytest.approx(4.0, abs=0.25)
    naive = ocs.naive_codes(w.float(), torch.ones(1, 1), plan, 10**6).double()
    aware = torch.round(w)
    ratio = (naive - w).square().mean() / (aware - w).square().mean()
    assert float(ratio) == pytest.approx(4.0, abs=0.05)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_grid(bits, granularity):
    w = heavy_tailed()
    q = quantize_weight(w, bits, granularity, group_size=48)
    assert q.codes.abs().max() == code_limit(bits)
    groups = 5 if granularity == "group" else 1
    assert q.scale.shape == (32, groups)
    step = q.scale.repeat_interleave(q.group_size, 1)[:, : w.shape[1]]
    assert ((q.dequantize() - w).abs() <= step * 0.5001).all()


def test_zero_rows_and_tiny_rows():
    w = torch.randn(4, 20)
    w[1] = 0.0
    w[2] = 1e-42
    q = quantize_weight(w, 8)
    assert q.scale[1] == 1.0
    assert q.scale[2] == 1.0
    assert not q.codes[1:3].any()
    assert q.dequantize().isfinite().all()


def test_asymmetric_grid_holds_zero_and_uses_all_codes():
    w = torch.rand(6, 256) + 0.5
    w[:, ::7] = 0.0
    q = quantize_weight(w, 4, "group", 32, symmetric=False)
    assert q.codes.min() == 0
    assert q.codes.max() == 15
    assert (q.dequantize()[w == 0] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_base_and_tail_add_up_and_fit_int8(bits):
    w = heavy_tailed()
    plan = ocs.plan_largest(w.abs().amax(0), 40, "equal", largest_range(bits))
    q = quantize_weight(w, bits, ranges=plan.ranges())
    base, tail, index = q.base_and_tail()
    assert base.abs().max() <= code_limit(bits)
    total = base.to(torch.int16).index_add_(1, index.long(), tail.to(torch.int16))
    assert torch.equal(total, q.codes)
    assert index.numel() <= int((plan.copies > 1).sum())


@pytest.mark.parametrize("shares", ["equal", "halving"])
def test_folded_tail_equals_real_copies_in_the_integer_layer(shares):
    """Each copy holds codes within +-Q and reads its own channel: the same bits as one tail column."""
    w, x = heavy_tailed(40, 120), torch.randn(9, 120)
    plan = ocs.plan_largest(w.abs().amax(0), 12, shares, largest_range(6))
    q = quantize_weight(w, 6, ranges=plan.ranges())
    base, tail, index = q.base_and_tail()
    scale = q.scale[:, 0].contiguous()
    folded = ops.quantized_linear(x, ops.pack_weight(base, tail), scale, None, index)
    copies, channel = [], []
    for c, r in enumerate(plan.ranges().tolist()):
        left = q.codes[:, c].long()
        for i in range(r):
            part = torch.div(left, r - i, rounding_mode="floor") if i < r - 1 else left
            assert part.abs().max() <= code_limit(6)
            copies.append(part)
            channel.append(c)
            left = left - part
    tokens, step = quantize_tokens(x, 8, 16, 4.0)
    product = tokens[:, channel].long() @ torch.stack(copies, 1).T
    assert torch.equal(folded, product.float() * (step[:, None] * scale))


def test_splitting_lowers_the_error_of_a_per_tensor_scale():
    w = heavy_tailed()
    errors = []
    for splits in (0, 4, 10, 20):
        plan = ocs.plan_largest(w.abs().amax(0), splits)
        errors.append(float((quantize_weight(w, 5, "tensor", ranges=plan.ranges()).dequantize() - w).square().mean()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", ["none", "mse"])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_gain_order_falls_and_lowers_the_error(method, granularity):
    w = heavy_tailed()
    steps = []
    for step in ocs.splits_by_gain(w.abs(), 4, granularity, 50, method, 100):
        steps.append(step)
        if len(steps) == 10:
            break
    assert all(gain > 0 for _, gain in steps)
    copies = torch.ones(200, dtype=torch.int32)
    for channel, _ in steps:
        copies[channel] += 1
    before = quantize_weight(w, 4, granularity, 50, clip=method).dequantize()
    after = quantize_weight(w, 4, granularity, 50, clip=method, ranges=copies).dequantize()
    assert (after - w).square().sum() < (before - w).square().sum()


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_gain_weighed_by_moments_lowers_the_error_of_the_outputs_more(granularity):
    """On average: the gain is that of one more copy at the threshold as it stands."""
    ratios = []
    for seed in range(12):
        torch.manual_seed(seed)
        w, moments = heavy_tailed(), torch.linspace(-4, 4, 200)[torch.randperm(200)].exp()[None]
        errors = []
        for counted in (moments, None):
            copies = torch.ones(200, dtype=torch.int32)
            for channel, _ in islice(ocs.splits_by_gain(w.abs(), 4, granularity, 50, "output", 100, counted), 10):
                copies[channel] += 1
            made = quantize_weight(w, 4, granularity, clip="output", ranges=copies, moments=moments)
            errors.append(float(((made.dequantize() - w).square() * moments).sum()))
        ratios.append(errors[0] / errors[1])
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 0.97


def test_clip_mse_is_the_best_of_its_sweep_and_beats_no_clip():
    w = heavy_tailed()
    errors = {m: float((quantize_weight(w, 4, clip=m).dequantize() - w).square().sum()) for m in ("none", "mse")}
    assert errors["mse"] < errors["none"]
    best = quantize_weight(w, 4, clip="mse")
    for factor in (0.9, 1.1):
        other = quantize_weight(w, 4, step_threshold=best.scale * 7 * factor)
        assert float((other.dequantize() - w).square().sum()) >= errors["mse"] * 0.999


def test_clip_constants_are_those_of_the_paper():
    """Banner et al. 2019, table of optimal clipping values."""
    laplace = {2: 2.83, 3: 3.89, 4: 5.03, 5: 6.20, 6: 7.41, 7: 8.64, 8: 9.89}
    gauss = {2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92}
    for bits, value in laplace.items():
        assert clip.laplacian_clip(bits) == pytest.approx(value, abs=0.02)
        assert clip.gaussian_clip(bits) == pytest.approx(gauss[bits], abs=0.05)


@pytest.mark.parametrize("method", ["aciq", "kl"])
def test_clips_stay_within_the_largest_value_and_cut_a_lone_outlier(method):
    w = torch.randn(4, 2000)
    w[:, 0] = 40.0
    q = quantize_weight(w, 4, clip=method)
    threshold = q.scale * 7
    assert (threshold <= 40.0001).all()
    assert (threshold < 20).all()


def test_sqnr(monkeypatch):
    monkeypatch.setattr(grid, "ROWS_OF", 64)
    w = torch.randint(-127, 128, (50, 20)).float()
    w[:, 0] = 127
    assert weight_sqnr([(w, quantize_weight(w, 8))]) == math.inf
    noisy = quantize_weight(w, 4, "group", 8)
    expected = 10 * torch.log10(w.double().square().sum() / (w - noisy.dequantize()).double().square().sum())
    assert weight_sqnr([(w, noisy)]) == pytest.approx(float(expected), abs=1e-3)
    large = w * 2.0**100
    assert weight_sqnr([(large, quantize_weight(large, 4, "group", 8))]) == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("granularity", "size"), [("channel", 128), ("group", 16), ("group", 24)])
def test_rows_quantized_a_part_at_a_time_are_the_same(monkeypatch, bits, granularity, size):
    monkeypatch.setattr(grid, "ROWS_OF", 200)
    w = torch.randn(23, 64)
    w[3] = 0
    once = quantize_weight(w, bits, granularity, size, ranges=torch.ones(64, dtype=torch.int32))
    parts = quantize_weight(w, bits, granularity, size)
    assert torch.equal(parts.codes, once.codes)
    assert torch.equal(parts.scale, once.scale)


@pytest.mark.parametrize(("bits", "cap", "threshold"), [(8, 16, 4.0), (6, 4, 2.0), (4, 64, 3.0), (8, 0, 4.0)])
def test_tokens_equal_the_reference(bits, cap, threshold):
    x = torch.randn(12, 333)
    x[::3, :25] *= 30
    codes, step = quantize_tokens(x, bits, cap, threshold)
    for row, code, s in zip(x, codes, step, strict=True):
        expected, expected_step = reference.quantize_token(row, bits, cap, threshold)
        assert code.tolist() == expected
        assert float(s) == expected_step


def test_quantized_weight_record_is_frozen():
    q = quantize_weight(torch.randn(3, 3), 8)
    with pytest.raises(AttributeError):
        q.bits = 4
    assert isinstance(q, QuantizedWeight)
