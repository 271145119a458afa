"""GPTQ against its textbook form, and what it and the error-weighted clip are for: smaller output errors."""

import copy

import pytest
import torch
from networks import snapshot
from torch import nn

import ocsquant
from ocsquant import OCS, Activations, ArgumentError, NotCalibratedError, Recipe, SplitQuant, Weights
from ocsquant import hessians as rounding
from ocsquant.methods.gptq import gptq, inverse_factor
from ocsquant.methods.grid import quantize_weight

import reference  # isort: skip

GROUP = {"granularity": "group", "group_size": 16}
GRIDS = {
    "row": Weights(4),
    "tensor": Weights(4, "tensor"),
    "clip": Weights(4, clip="output"),
    "group": Weights(3, **GROUP),
    "zero points": Weights(3, symmetric=False, clip="output", **GROUP),
    "ocs": Weights(4, split=OCS(0.05)),
    "levels": Weights(4, codebook="kmeans", clip="output"),
    "splitquant": Weights(2, split=SplitQuant(clusters="row", ranges="row")),
}


def inputs(m: int = 300, k: int = 64) -> torch.Tensor:
    """Correlated channels of different sizes, as a network's are."""
    torch.manual_seed(5)
    mixed = torch.randn(m, k // 2) @ torch.randn(k // 2, k) * 0.3
    return (torch.randn(m, k) + mixed) * torch.logspace(-1, 1, k)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_blocks_and_cholesky_give_the_textbook_codes(asymmetric):
    x = inputs(k=160).double()
    w = torch.randn(12, 160)
    hessian = (x.T @ x).float()
    hessian += torch.eye(160) * hessian.diagonal().mean() * 0.01
    grid = quantize_weight(w, 3, "group", 48, symmetric=not asymmetric)
    limit = (0, 7) if asymmetric else (-3, 3)

    def parts(column: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = column // 48
        zero = torch.zeros(12) if grid.zero is None else grid.zero[:, group]
        return grid.scale[:, group].double(), zero.double()

    def codes_of(v: torch.Tensor, column: int) -> torch.Tensor:
        scale, zero = parts(column)
        return ((v / scale).round() + zero).clamp(*limit)

    def values_of(c: torch.Tensor, column: int) -> torch.Tensor:
        scale, zero = parts(column)
        return (c - zero) * scale

    expected = reference.gptq(w, hessian, codes_of, values_of)
    got = gptq(w, grid, inverse_factor(hessian, damping=0.0))
    # Values next to a half step may round either way; one such code changes those after it in its row.
    rows = (got.codes.double() == expected).all(1)
    assert rows.float().mean() >= 0.75


@pytest.mark.parametrize("name", GRIDS)
def test_output_error_falls_on_every_grid(name):
    x = inputs()
    layer = nn.Linear(64, 48)
    exact = layer(x)
    errors = {}
    for how in ("nearest", "gptq"):
        weights = Weights(**{**vars(GRIDS[name]), "rounding": how})
        made = ocsquant.quantize(copy.deepcopy(layer), Recipe(weights, None), calibration=[x], simulate=True)
        errors[how] = float((made(x) - exact).detach().norm() / exact.detach().norm())
    assert errors["gptq"] < 0.9 * errors["nearest"], errors


def test_clip_by_output_error_beats_clip_by_weight_error_where_channels_differ():
    x = inputs()
    layer = nn.Linear(64, 48)
    layer.weight.data /= torch.logspace(-1, 1, 64)  # large weights meet small inputs
    exact = layer(x).detach()
    errors = {}
    for symmetric in (True, False):
        for clip in ("none", "mse", "output"):
            recipe = Recipe(Weights(4, clip=clip, symmetric=symmetric), None)
            made = ocsquant.quantize(copy.deepcopy(layer), recipe, calibration=[x], simulate=True)
            errors[clip] = float((made(x).detach() - exact).norm())
        assert errors["output"] < 0.9 * min(errors["mse"], errors["none"]), errors


def test_hessian_is_that_of_the_folded_input():
    x = inputs() + 3.0
    layer = nn.Linear(64, 48)
    exact = layer(x).detach()
    errors = {}
    for how in ("nearest", "gptq"):
        inputs_ = Activations(scale="tensor", smooth_alpha=0.5, shift=True)
        recipe = Recipe(Weights(4, clip="output", rounding=how), inputs_)
        made = ocsquant.quantize(copy.deepcopy(layer), recipe, overrides={"": recipe}, calibration=[x])
        assert made.input_shift is not None
        errors[how] = float((made(x).detach() - exact).norm())
    assert errors["gptq"] < 0.8 * errors["nearest"], errors


class Mixed(nn.Module):
    """Every kind of layer, two linears that share an input, one that sees it changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.rnn = nn.Embedding(50, 64), nn.LSTM(64, 64, 2, batch_first=True, bidirectional=True)
        self.left, self.right, self.third = nn.Linear(128, 64), nn.Linear(128, 64), nn.Linear(128, 64)
        self.conv, self.depthwise = nn.Conv1d(64, 32, 3), nn.Conv1d(32, 32, 3, groups=32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.rnn(self.emb(ids))[0].contiguous()
        z = self.left(y) + self.right(y)
        y.mul_(2.0).add_(1.0)
        z = z + self.third(y)
        return self.depthwise(self.conv(z.transpose(1, 2)))


RECIPE = Recipe(Weights(4, clip="output", rounding="gptq"), None)


def test_every_kind_of_layer(monkeypatch):
    torch.manual_seed(0)
    model = Mixed().eval()
    batches = [torch.randint(50, (4, 9)) for _ in range(3)]
    exact = model(batches[0]).detach()
    found = {}
    for memory in (2**28, 1):  # all Hessians at once, and one layer at a time
        monkeypatch.setattr(rounding, "MEMORY", memory)
        made = ocsquant.quantize(copy.deepcopy(model), RECIPE, calibration=iter(batches), simulate=True)
        found[memory] = made(batches[0]).detach()
        reasons = {line.path: line.reason for line in ocsquant.report(made).layers}
        assert "an embedding has no input" in reasons["emb"]
        assert "one Hessian for each group" in reasons["depthwise"]
        assert not any(reasons[path] for path in ("rnn", "left", "right", "third", "conv"))
    assert torch.equal(*found.values())
    nearest = Recipe(Weights(4, clip="output"), None)
    other = ocsquant.quantize(copy.deepcopy(model), nearest, calibration=batches, simulate=True)(batches[0]).detach()
    assert (found[1] - exact).norm() < 0.9 * (other - exact).norm()
    # The layer behind the change in place was given its own input.
    alone = ocsquant.quantize(
        copy.deepcopy(model), RECIPE, calibration=batches, simulate=True, filter_fn=lambda m, path: path == "third"
    )
    together = ocsquant.quantize(copy.deepcopy(model), RECIPE, calibration=batches, simulate=True)
    assert torch.equal(alone.third.weight, together.third.weight)


def test_what_calibration_must_be():
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128))
    skipping, x = Skipping(), torch.randn(5, 128)
    before = snapshot(model)
    with ocsquant.calibrate(model) as seen:
        model(x)
    clip = Recipe(Weights(4, clip="output"))
    with pytest.raises(NotCalibratedError, match="by 'gptq'"):
        ocsquant.quantize(model, RECIPE, simulate=True)
    with pytest.raises(ArgumentError, match="calibration must be batches"):
        ocsquant.quantize(model, RECIPE, calibration=seen, simulate=True)
    with pytest.raises(NotCalibratedError, match=r"clip is 'output': 0, 1$"):
        ocsquant.quantize(model, clip)
    with pytest.raises(NotCalibratedError, match=r"none of these layers: 1$"):
        ocsquant.quantize(skipping, Recipe(Weights(4, rounding="gptq"), None), calibration=[x], simulate=True)
    with pytest.raises(ocsquant.NonFiniteError, match="the input of 0"):
        ocsquant.quantize(model, RECIPE, calibration=[x * torch.inf], simulate=True)
    assert snapshot(model) == before
    ocsquant.quantize(model, clip, calibration=seen)


class Skipping(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(128, 64), nn.Linear(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[0](x)


def test_attention_out_projection_is_rounded_to_nearest():
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    made = ocsquant.quantize(model, RECIPE, calibration=[x], simulate=True)
    reasons = {line.path: line.reason for line in ocsquant.report(made).layers}
    assert "rounded to nearest: attention reads it" in reasons["self_attn.out_proj"]
    assert "clipped by weight error: attention reads it" in reasons["self_attn.out_proj"]


def test_directions_without_inputs_do_not_matter():
    """Fewer tokens than channels, channels that are always zero: the Hessian alone has no inverse."""
    layer = nn.Linear(64, 48)
    x = torch.randn(7, 64)
    x[:, 10:20] = 0.0
    made = ocsquant.quantize(copy.deepcopy(layer), RECIPE, calibration=[x], simulate=True)
    nearest = ocsquant.quantize(copy.deepcopy(layer), Recipe(Weights(4), None), calibration=[x], simulate=True)
    assert made.weight.isfinite().all()
    assert (made(x) - layer(x)).norm() < 0.5 * (nearest(x) - layer(x)).norm()


def test_autocast_and_huge_inputs():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), inputs()
    plain = ocsquant.quantize(copy.deepcopy(layer), RECIPE, calibration=[x], simulate=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ocsquant.quantize(copy.deepcopy(layer), RECIPE, calibration=[x], simulate=True)
    assert torch.equal(plain.weight, cast.weight)
    with pytest.raises(ocsquant.NonFiniteError, match="the squares of the model's inputs"):
        ocsquant.quantize(layer, RECIPE, calibration=[x * 1e20], simulate=True)


def test_statistics_of_a_recurrent_root_and_of_another_width():
    lstm = nn.LSTM(16, 16)
    recipe = Recipe(Weights(4, clip="output"), None)
    with ocsquant.calibrate(lstm) as seen:
        lstm(torch.randn(5, 2, 16))
    ocsquant.quantize(lstm, recipe, calibration=seen, simulate=True)
    model = nn.Sequential(nn.Linear(64, 64))
    with ocsquant.calibrate(model) as seen:
        model(torch.randn(5, 64))
    with pytest.raises(ArgumentError, match="in which '0' has 128 channels, got 64"):
        ocsquant.quantize(nn.Sequential(nn.Linear(128, 64)), recipe, calibration=seen, simulate=True)


def test_a_shared_weight_rounded_twice_is_said():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    made = ocsquant.quantize(model, RECIPE, calibration=[torch.randn(99, 64)])
    assert "stored twice" in ocsquant.report(made).layers[1].reason
