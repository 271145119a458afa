"""Weights stored in few bits under float activations: linear, convolution, embedding."""

import copy

import pytest
import torch
from test_io import rewrite, state_bytes
from torch import nn

import ocsquant
from ocsquant import OCS, Recipe, SplitQuant, Weights
from ocsquant.nn import WeightOnly, weight_only

SCHEMES = {
    "W8A16": ocsquant.SCHEMES["W8A16"],
    "W4A16": ocsquant.SCHEMES["W4A16"],
    "W3A16": ocsquant.SCHEMES["W3A16"],
    "W2A16": ocsquant.SCHEMES["W2A16"],
    "ocs": Recipe(Weights(4, "group", 32, split=OCS(0.05)), None),
    "nf4": Recipe(Weights(4, "group", 64, codebook="nf4"), None),
    "row codebooks": Recipe(Weights(2, split=SplitQuant(clusters="row", ranges="row")), None),
}
LAYERS = {
    "linear": (lambda: nn.Linear(130, 70), lambda: torch.randn(2, 3, 130)),
    "conv1d": (lambda: nn.Conv1d(12, 40, 9, padding=4, bias=False), lambda: torch.randn(2, 12, 30)),
    "conv2d": (
        lambda: nn.Conv2d(32, 40, 3, stride=2, padding="valid", dilation=2, groups=2),
        lambda: torch.randn(2, 32, 9, 8),
    ),
    "reflect": (
        lambda: nn.Conv2d(16, 40, 3, padding="same", padding_mode="reflect"),
        lambda: torch.randn(16, 9, 8),
    ),
    "conv3d": (lambda: nn.Conv3d(8, 40, (1, 4, 4), padding=1), lambda: torch.randn(1, 8, 3, 6, 6)),
    "embedding": (lambda: nn.Embedding(90, 50, padding_idx=3), lambda: torch.randint(90, (2, 7))),
    "bag": (lambda: nn.EmbeddingBag(90, 50, mode="mean"), lambda: torch.randint(90, (4, 7))),
    "padded bag": (lambda: nn.EmbeddingBag(90, 50, mode="max", padding_idx=2), lambda: torch.randint(5, (4, 7))),
}


def pair(layer: str, scheme: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The layer with its weight stored, the same with the dequantized weight in float, and an input."""
    build, inputs = LAYERS[layer]
    stored = build()
    simulated = ocsquant.quantize(copy.deepcopy(stored), SCHEMES[scheme], simulate=True)
    return ocsquant.quantize(stored, SCHEMES[scheme]), simulated, inputs()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_output_is_that_of_the_dequantized_weight(layer, scheme):
    made, simulated, x = pair(layer, scheme)
    assert isinstance(made, WeightOnly)
    assert torch.allclose(made.weight, simulated.weight, rtol=1e-6)  # a split column is the sum of two products
    assert torch.allclose(made(x), simulated(x), atol=1e-5)
    (line,) = ocsquant.report(made).layers
    assert line.kernel == "dequantized as it is used"
    assert line.scheme == f"W{SCHEMES[scheme].weights.bits}A16"
    assert line.bytes_after < line.bytes_before


def test_large_linears_are_done_in_parts(monkeypatch):
    made, simulated, x = pair("linear", "ocs")
    whole = made(x)
    monkeypatch.setattr(weight_only, "AT_A_TIME", 130 * 16)
    assert torch.allclose(made(x), whole, atol=1e-5)
    assert torch.allclose(made(x), simulated(x), atol=1e-5)


def test_bags_with_offsets_and_weights():
    for mode in ("sum", "mean", "max"):
        layer = nn.EmbeddingBag(90, 50, mode=mode, include_last_offset=True, padding_idx=1)
        simulated = ocsquant.quantize(copy.deepcopy(layer), "W4A16", simulate=True)
        made = ocsquant.quantize(layer, "W4A16")
        ids, offsets = torch.randint(4, (11,), dtype=torch.int32), torch.tensor([0, 3, 3, 11], dtype=torch.int32)
        weights = torch.rand(11) if mode == "sum" else None
        assert torch.allclose(made(ids, offsets, weights), simulated(ids, offsets, weights), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_follow_the_model_and_scales_do_not(dtype):
    model = nn.Sequential(nn.Embedding(90, 64), nn.Linear(64, 64), nn.Conv1d(7, 80, 9, padding=4))
    ids = torch.randint(90, (2, 7))
    exact = model(ids)
    ocsquant.quantize(model, "W8A16")
    before = {k: v for k, v in state_bytes(model).items() if "bias" not in k}
    model.to(dtype)
    assert model(ids).dtype == dtype
    assert (model(ids).float() - exact).norm() < 0.05 * exact.norm()
    assert {k: v for k, v in state_bytes(model).items() if "bias" not in k} == before
    assert copy.deepcopy(model)(ids).dtype == dtype
    half = ocsquant.quantize(nn.Embedding(90, 64, dtype=dtype), "W4A16")
    assert half(ids).dtype == dtype


def test_gradients_reach_adapters_through_the_layers():
    model = nn.Sequential(nn.Conv1d(16, 64, 5), nn.Flatten(), nn.Linear(64 * 6, 64))
    simulated = ocsquant.quantize(copy.deepcopy(model), "W4A16", simulate=True)
    ocsquant.quantize(model, "W4A16")
    x = torch.randn(2, 16, 10, requires_grad=True)
    model(x).square().sum().backward()
    got, x.grad = x.grad, None
    simulated(x).square().sum().backward()
    assert torch.allclose(got, x.grad, atol=1e-4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bag = nn.Embedding(90, 64), nn.EmbeddingBag(90, 64)
        self.conv, self.linear = nn.Conv1d(64, 64, 3, padding=1), nn.Linear(64, 130)
        self.other = nn.Linear(64, 130)
        self.other.weight = self.linear.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2) + self.bag(ids)[:, None]
        return self.linear(y) + self.other(y)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_files(tmp_path, scheme):
    model = ocsquant.quantize(Model().eval(), SCHEMES[scheme])
    assert model.linear.packed is model.other.packed
    ids, path = torch.randint(90, (2, 7)), tmp_path / "model.safetensors"
    ocsquant.save(model, path)
    with torch.device("meta"):
        empty = Model().eval()
    for other in (Model().eval(), ocsquant.quantize(Model().eval(), "W4A16"), empty):
        ocsquant.load(other, path)
        assert state_bytes(other) == state_bytes(model)
        assert torch.equal(other(ids), model(ids))
        assert str(ocsquant.report(other)) == str(ocsquant.report(model))
        assert other.linear.packed is other.other.packed
    plain = Model().eval()
    plain.embed = nn.Linear(90, 64)
    with pytest.raises(ocsquant.SchemaMismatchError, match="'embed'"):
        ocsquant.load(plain, path)


TAMPERED = {
    "scale zero": lambda t, r: t["linear.scale"].zero_(),
    "scale shape": lambda t, r: t.__setitem__("linear.scale", torch.ones(130, 1)),
    "zero nan": lambda t, r: t["linear.zero"].fill_(torch.nan),
    "zero missing and levels": lambda t, r: t.__setitem__("linear.levels", torch.ones(1, 16, dtype=torch.int8)),
    "packed shape": lambda t, r: t.__setitem__("linear.packed", t["linear.packed"][:, 1:].contiguous()),
    "tail alone": lambda t, r: t.__setitem__("linear.tail", torch.ones(130, 2, dtype=torch.int8)),
    "tail of another size": lambda t, r: t.update(
        {"linear.tail": torch.ones(9, 1, dtype=torch.int8), "linear.tail_index": torch.ones(1, dtype=torch.int32)}
    ),
    "bias": lambda t, r: t.__setitem__("linear.bias", torch.ones(5)),
    "bias missing": lambda t, r: t.pop("linear.bias"),
    "kind": lambda t, r: r["layers"]["linear"].update(kind="other"),
    "origin": lambda t, r: r["layers"]["linear"].update(origin="Module"),
    "shape": lambda t, r: r["layers"]["linear"].update(shape=[130, -64]),
    "no shape": lambda t, r: r["layers"]["linear"].update(shape=None),
    "group": lambda t, r: r["layers"]["linear"].update(group_size=0),
    "bits": lambda t, r: r["layers"]["linear"].update(bits=2),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_files_are_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    build = lambda: nn.ModuleDict({"linear": nn.Linear(64, 130)})  # noqa: E731
    recipe = Recipe(Weights(4, "group", 32, symmetric=False), None)
    ocsquant.save(ocsquant.quantize(build(), recipe), path)
    ocsquant.load(build(), path)
    rewrite(path, TAMPERED[name])
    other = build()
    before = state_bytes(other)
    with pytest.raises(ocsquant.CheckpointError):
        ocsquant.load(other, path)
    assert state_bytes(other) == before


def test_compile_and_export():
    model = nn.Sequential(nn.Embedding(90, 64), nn.Linear(64, 70), nn.Linear(70, 64)).eval()
    ocsquant.quantize(model, "W4A16")
    ids = torch.randint(90, (2, 7))
    expected = model(ids)
    torch.compiler.reset()
    assert torch.allclose(torch.compile(model, fullgraph=True)(ids), expected, atol=1e-5)
    exported = torch.export.export(model, (ids,))
    assert torch.allclose(exported.module()(ids), expected, atol=1e-5)


def test_what_stays_float_says_why():
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(64, 64),
            "normed": nn.Embedding(90, 64, max_norm=1.0),
            "small": nn.Linear(16, 16),
            "named": nn.Linear(16, 16),
            "large": nn.Linear(64, 64),
        }
    )
    ocsquant.quantize(model, "W4A16", overrides={"named": "W8A16"})
    reasons = {line.path: line.reason for line in ocsquant.report(model).layers}
    assert "no weight-only form for LSTM" in reasons["lstm"]
    assert "max_norm" in reasons["normed"]
    assert "too small" in reasons["small"]
    assert isinstance(model["named"], WeightOnly)
    again = ocsquant.quantize(model, "W8A8", overrides={"small": "W8A8"})
    assert {line.path: line.reason for line in ocsquant.report(again).layers}["large"] == "already quantized"


def test_wrong_inputs():
    linear = ocsquant.quantize(nn.Linear(64, 64), "W4A16")
    embedding = ocsquant.quantize(nn.Embedding(90, 64), "W4A16")
    with pytest.raises(ocsquant.ArgumentError, match=r"input must be \[..., 64\]"):
        linear(torch.randn(2, 65))
    with pytest.raises(ocsquant.ArgumentError, match="floating-point"):
        linear(torch.ones(2, 64, dtype=torch.int64))
    with pytest.raises(ocsquant.ArgumentError, match="int32 or int64"):
        embedding(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"rows must be in 0\.\.89, got 90"):
        embedding(torch.tensor([90]))


def test_embeddings_beside_integer_linears():
    model = nn.Sequential(nn.Embedding(90, 128), nn.Linear(128, 128), nn.Linear(128, 128))
    ids = torch.randint(90, (2, 7))
    exact = model(ids).detach()
    ocsquant.quantize(model, overrides={"0": "W8A16", "2": "W4A16"})
    assert [type(m).__name__ for m in model] == ["WeightOnlyEmbedding", "QuantizedLinear", "WeightOnlyLinear"]
    assert (model(ids) - exact).norm() < 0.1 * exact.norm()
