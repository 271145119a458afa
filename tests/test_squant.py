"""SQuant against its plain form, its laws, and what it is for: convolutions whose errors cancel without data."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ocsquant
from ocsquant import OCS, Recipe, SplitQuant, Weights
from ocsquant.methods.grid import quantize_weight
from ocsquant.methods.squant import squant

import reference  # isort: skip

GRIDS = {
    "row": {},
    "tensor": {"granularity": "tensor"},
    "clipped": {"clip": "mse"},
    "zero points": {"symmetric": False},
    "groups of whole kernels": {"granularity": "group", "group_size": 36},
    "groups across kernels": {"granularity": "group", "group_size": 16},
    "split channels": {"ranges": torch.tensor([1, 2, 1, 3] * 4).repeat_interleave(9)},
}


def places(w, grid):
    """Where the weights lie on their grids, and the ends of those."""
    size, k = grid.group_size, w.shape[1]
    place = w / grid.scale.repeat_interleave(size, 1)[:, :k]
    if grid.zero is None:
        limit = grid.ranges * (2 ** (grid.bits - 1) - 1.0)
        return torch.minimum(torch.maximum(place, -limit), limit)
    return (place + grid.zero.repeat_interleave(size, 1)[:, :k]).clamp(0, 2**grid.bits - 1)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_those_of_the_plain_form(name, bits):
    torch.manual_seed(bits)
    w = torch.randn(7, 16 * 9)
    grid = quantize_weight(w, bits, **GRIDS[name])
    got, place = squant(w, grid, 9).codes, places(w, grid)
    positions = 1 if grid.group_size % 9 else 9
    for row in range(7):
        for first in range(0, 144, grid.group_size):
            part = slice(first, first + grid.group_size)
            errors = (grid.codes[row, part] - place[row, part]).unflatten(0, (-1, positions))
            moves = torch.tensor(reference.squant(errors.tolist())).flatten()
            assert torch.equal(got[row, part].long(), grid.codes[row, part].long() - moves)


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 9),
    channels=st.integers(1, 40),
    positions=st.integers(1, 10),
    bits=st.integers(2, 8),
    seed=st.integers(0, 2**20),
)
def test_errors_cancel_over_kernels_and_outputs(n, channels, positions, bits, seed):
    torch.manual_seed(seed)
    w = torch.randn(n, channels * positions)
    grid = quantize_weight(w, bits)
    made, place = squant(w, grid, positions), places(w, grid)
    error = (made.codes - place).unflatten(1, (channels, positions))
    assert ((made.codes - grid.codes).abs() <= 1).all()
    assert error.abs().max() <= 1
    assert (made.codes.abs() <= 2 ** (bits - 1) - 1).all()
    tolerance = 1e-3 * 2**bits / 256 + 1e-4
    assert (error.sum(-1).abs() <= 1 + tolerance).all()
    assert (error.sum((1, 2)).abs() <= 0.5 + tolerance).all()
    assert (made.dequantize() - w).abs().max() <= grid.scale.max() * (1 + 1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_flat_positive_images_lose_less(bits):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 32, 3)
    x = (torch.rand(4, 16, 1, 1) + 0.1 * torch.rand(4, 16, 9, 9)).expand(4, 16, 9, 9)
    exact, errors = layer(x), {}
    for how in ("nearest", "squant"):
        made = ocsquant.quantize(copy.deepcopy(layer), Recipe(Weights(bits, rounding=how), None), simulate=True)
        errors[how] = float((made(x) - exact).detach().norm())
    assert errors["squant"] < 0.6 * errors["nearest"]


def test_auto_is_squant_for_convolutions_of_images_alone():
    torch.manual_seed(0)
    for layer, kind in (
        (nn.Conv1d(32, 16, 3), "nearest"),
        (nn.Conv3d(8, 16, 2), "squant"),
        (nn.Linear(64, 64), "nearest"),
    ):
        made = [
            ocsquant.quantize(copy.deepcopy(layer), Recipe(Weights(4, rounding=how), None), simulate=True).weight
            for how in ("auto", "squant", "nearest")
        ]
        assert torch.equal(made[0], made[1] if kind == "squant" else made[2])
        assert not torch.equal(made[1], made[2])
    for weights in (Weights(2, split=SplitQuant()), Weights(split=OCS(0.1, quantization_aware=False))):
        assert weights.rounded_by(image=True) == "nearest"
    assert Weights(4, split=OCS(0.1)).rounded_by(image=True) == "squant"


def test_the_integer_convolution_has_these_codes():
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 20, 3, groups=2)
    q = ocsquant.quantize(copy.deepcopy(layer), overrides={"": Recipe(Weights(5))})
    w = layer.weight.detach().reshape(20, -1)
    expected = squant(w, quantize_weight(w, 5), 9).dequantize().reshape(layer.weight.shape)
    torch.testing.assert_close(q.weight, expected, rtol=1e-6, atol=0)
