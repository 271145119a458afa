"""Codebooks and SplitQuant: levels, boundaries, and one integer product equal to the sum of the parts."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ocsquant
from ocsquant import PerToken, Recipe, SplitQuant, Weights, ops
from ocsquant.methods.codebook import kmeans, nf4_levels, quantize_codebook
from ocsquant.methods.grid import nearest_level, quantize_weight
from ocsquant.methods.splitquant import cluster_bounds, optimal_bounds, part_levels, part_of, quantize_splitquant

import reference  # isort: skip


def weights(n: int = 24, k: int = 96) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.distributions.StudentT(5.0).sample((n, k)) * torch.logspace(-1, 1, n)[:, None]


def squared(w: torch.Tensor, q) -> float:
    return float((q.dequantize() - w).square().sum())


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60), st.integers(1, 6))
@settings(deadline=None)
def test_kmeans_ends_where_lloyd_does_not_move(values, count):
    centres = kmeans(torch.tensor([values]), count)
    assert centres.shape == (1, count)
    moved = reference.kmeans_step(values, centres[0].tolist())
    before = sum(min((v - c) ** 2 for c in centres[0].tolist()) for v in values)
    after = sum(min((v - c) ** 2 for c in moved) for v in values)
    assert after >= before - 1e-9 - 1e-6 * before


def test_kmeans_rows_and_weights():
    values = torch.randn(3, 50)
    together = kmeans(values, 4)
    assert torch.equal(together, torch.cat([kmeans(row[None], 4) for row in values]))
    # A weight of 3 is the value three times.
    tripled = kmeans(torch.cat([values, values[:, :20], values[:, :20]], 1), 4)
    weight = torch.ones_like(values)
    weight[:, :20] = 3.0
    assert torch.allclose(kmeans(values, 4, weight), tripled, atol=0.15)


def test_nearest_level_is_the_nearest():
    levels = torch.tensor([[-127, -40, 0, 3, 90], [-100, -99, 1, 50, 127]], dtype=torch.int8)
    values = torch.empty(2, 400).uniform_(-140, 140)
    index = nearest_level(values, levels)
    distance = (values[:, :, None] - levels.float()[:, None, :]).abs()
    assert torch.equal(distance.gather(2, index[:, :, None].long())[:, :, 0], distance.amin(2))
    assert torch.equal(nearest_level(values, levels[:1])[0], index[0])


def test_nf4_is_that_of_the_paper():
    levels = nf4_levels()[0].tolist()
    assert len(levels) == 16
    assert levels[7] == 0
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 1 - 0.5 * (1 / 32 + 1 / 30)  # appendix E: the mean of the two ends' quantiles
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1]).flip(0)
    assert (torch.tensor(levels[8:]) - 127 * positive / positive.max()).abs().max() <= 0.51


def test_fitted_levels_beat_fixed_and_even_ones():
    w = weights()
    even = squared(w, quantize_weight(w, 4))
    fitted = squared(w, quantize_codebook(w, 4, "channel", 128, "kmeans", None))
    assert fitted < squared(w, quantize_codebook(w, 4, "channel", 128, "nf4", None)) < even
    moments = torch.logspace(-2, 2, 96)[None]
    plain, weighted = (quantize_codebook(w, 3, "group", 32, "kmeans", m) for m in (None, moments))
    errors = [float(((q.dequantize() - w).square() * moments).sum()) for q in (plain, weighted)]
    assert errors[1] < errors[0]
    assert weighted.levels.unique().numel() <= 8


@given(st.lists(st.floats(-8, 8, width=16), min_size=3, max_size=14, unique=True), st.integers(2, 3))
@settings(deadline=None, max_examples=60)
def test_optimal_boundaries_are_optimal(values, bits):
    values = sorted(values)
    m = len(values)
    best = min(reference.split_error(values, (i, j), 2**bits) for i in range(1, m) for j in range(i, m))
    bounds = optimal_bounds(torch.tensor([values]), bits)
    part = part_of(torch.tensor([values]), bounds)[0].tolist()
    cuts = (part.count(0), m - part.count(2))
    assert reference.split_error(values, cuts, 2**bits) <= best + 1e-6


@pytest.mark.parametrize("size", [40, 700, 30_000])
def test_optimal_boundaries_are_never_worse_than_kmeans(size):
    torch.manual_seed(size)
    values = torch.distributions.StudentT(4.0).sample((1, size))
    for bits in (2, 4):
        errors = []
        for bounds in (cluster_bounds(values, 3), optimal_bounds(values, bits)):
            part = part_of(values, bounds)[0].tolist()
            ordered = sorted(values[0].tolist())
            errors.append(reference.split_error(ordered, (part.count(0), size - part.count(2)), 2**bits))
        assert errors[1] <= errors[0] * (1 + 1e-9)


def test_part_levels_span_their_part():
    values = torch.tensor([[-8.0, -6.0, -1.0, 0.5, 1.0, 5.0, 9.0]])
    levels = part_levels(values, torch.tensor([[-3.0, 3.0]]), 2)[0].reshape(3, 4)
    assert levels[:, 0].tolist() == [-8.0, -1.0, 5.0]
    assert levels[:, -1].tolist() == [-6.0, 1.0, 9.0]
    empty = part_levels(values, torch.tensor([[-3.0, 20.0]]), 2)[0].reshape(3, 4)
    assert empty[2].tolist() == [20.0] * 4


SPLITS = {
    "layer": SplitQuant(),
    "row ranges": SplitQuant(ranges="row"),
    "row": SplitQuant(clusters="row", ranges="row"),
    "optimal": SplitQuant(clusters="row", ranges="row", boundaries="optimal"),
    "two parts": SplitQuant(2),
}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", SPLITS)
def test_one_product_is_the_sum_of_the_parts(name, bits):
    """The paper's layers, one per part with zeros elsewhere, in the codebook's grid: equal to the bit."""
    split = SPLITS[name]
    w = weights(64, 96)
    q = quantize_splitquant(w, bits, "channel", split.parts, split.clusters, split.ranges, split.boundaries)
    layer = nn.Linear(96, 64, bias=False)
    layer.weight.data.copy_(w)
    recipe = Recipe(Weights(bits, split=split), PerToken())
    made = ocsquant.quantize(copy.deepcopy(layer), recipe, overrides={"": recipe})
    codes = made.codes
    assert torch.equal(codes, q.integers())
    x = torch.randn(11, 96)
    part = q.codes // 2**bits
    assert part.unique().tolist() == list(range(split.parts))
    # Integer sums before the one rounding of the epilogue: scales of 1 and tokens of whole numbers.
    whole = (x * 20).round().clamp(-127, 127)
    whole[:, 0] = 127.0
    one = torch.ones(64)
    form = (made.group_size, made.weight_bits, made.zero, made.levels)
    total = ops.quantized_linear(whole, made.packed, one, None, None, 8, 0, 4.0, *form)
    parts = [
        ops.quantized_linear(
            whole, ops.pack_weight(torch.where(part == p, codes, 0).to(torch.int8)), one, max_outliers=0
        )
        for p in range(split.parts)
    ]
    assert torch.equal(total, sum(parts))
    assert torch.allclose(made.weight, q.dequantize())


def test_rows_help_and_levels_fit_their_bits():
    w = weights(64, 96)
    errors = {}
    for name, s in SPLITS.items():
        q = quantize_splitquant(w, 2, "channel", s.parts, s.clusters, s.ranges, s.boundaries)
        errors[name] = squared(w, q)
        assert q.bits == (3 if s.parts == 2 else 4)
        assert q.levels.shape == (1 if name in ("layer", "two parts") else 64, 4 * s.parts)
    assert errors["optimal"] < errors["row"] < errors["layer"] < errors["two parts"]
    tensor = squared(w, quantize_splitquant(w, 2, "tensor", 3, "layer", "layer", "kmeans"))
    assert errors["layer"] < tensor


def test_schemes_and_report():
    model = nn.Sequential(nn.Linear(128, 64))
    made = ocsquant.quantize(copy.deepcopy(model), "W2A8")
    (line,) = ocsquant.report(made).layers
    assert line.scheme == "W2A8"
    assert made[0].codes.unique().numel() <= 12
    assert made[0].bits == 4
    recipe = Recipe(Weights(2, split=SplitQuant(clusters="row", ranges="row")))
    assert Recipe.from_json(recipe.to_json()) == recipe
    zero = nn.Linear(128, 64)
    zero.weight.data.zero_()
    for weights_ in (Weights(2, split=SplitQuant()), Weights(4, codebook="kmeans"), Weights(4, codebook="nf4")):
        assert (ocsquant.quantize(copy.deepcopy(zero), Recipe(weights_)).weight == 0).all()


def test_convolutions_cluster_by_kernel_and_groups_take_codebooks():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 64))
    x = torch.randn(2, 8, 8, 8)
    exact = model(x).detach()
    for chosen in (
        Weights(4, split=SplitQuant(clusters="row", ranges="row")),
        Weights(4, "group", 32, codebook="nf4"),
    ):
        made = ocsquant.quantize(copy.deepcopy(model), Recipe(chosen, None), simulate=True)
        assert (made(x) - exact).norm() < 0.2 * exact.norm()
