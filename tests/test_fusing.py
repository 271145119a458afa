"""Nonlinearities that integer linear layers take over: where the code proves it, and nowhere else."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ocsquant
from ocsquant.nn import FusedNonlinearity


class Nested(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(64, 128), act or nn.GELU(), nn.Linear(128, 64)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class InTurn(Nested):
    def forward(self, x):
        if x.dim() > 1:
            h = self.fc1(x)
            h = self.act(h)
        else:
            h = x
        return self.fc2(h)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)
        self.act = F.silu

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def sequential(act=None):
    return nn.Sequential(nn.Linear(64, 128), act or nn.GELU(), nn.Linear(128, 64))


def fused(model):
    return [path for path, m in model.named_modules() if isinstance(m, FusedNonlinearity)]


def models(make, **options):
    """The float network, quantized without and with fusing."""
    torch.manual_seed(1)
    model = make().eval()
    plain = ocsquant.quantize(copy.deepcopy(model), fuse=False, **options)
    return model, plain, ocsquant.quantize(copy.deepcopy(model), fuse=True, **options)


PROVEN = {
    "sequential": (sequential, ["1"]),
    "nested": (Nested, ["act"]),
    "in turn": (InTurn, ["act"]),
    "gated": (Gated, []),
    "encoder": (lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu"), []),
    "decoder": (lambda: nn.TransformerDecoderLayer(64, 4, 128, batch_first=True), []),
}


@pytest.mark.parametrize("name", PROVEN)
def test_proven_patterns_are_fused(name, tmp_path):
    make, places = PROVEN[name]
    _, plain, made = models(make)
    assert fused(made) == places
    (line,) = [layer for layer in ocsquant.report(made).layers if "that follows" in layer.reason]
    layer = made.get_submodule(line.path)
    assert line.reason.split("; ")[0] == f"computes the {layer.nonlinearity} that follows"
    assert f"nonlinearity={layer.nonlinearity}" in str(layer)
    x = torch.randn(2, 7, 64)
    args = (x, x) if name == "decoder" else (x,)
    with torch.no_grad():
        # A rounding of the nonlinearity may be another 8-bit code behind it.
        torch.testing.assert_close(made(*args), plain(*args), rtol=0, atol=0.03)
        expected = made(*args)
        ocsquant.save(made, tmp_path / "file")
        for again in (
            ocsquant.load(make().eval(), tmp_path / "file"),
            copy.deepcopy(made),
            pickle.loads(pickle.dumps(made)),
        ):
            assert torch.equal(again(*args), expected)
        torch.compiler.reset()
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), expected, rtol=1e-4, atol=0.03 if name == "decoder" else 1e-4)
    assert torch.equal(made(*args), plain(*args))  # with gradients: the same operations
    assert ocsquant.load(made, tmp_path / "file") is made


@torch.no_grad()
def test_what_was_applied_is_not_applied_again():
    _, plain, made = models(sequential)
    x = torch.randn(5, 64)
    h = made[0](x)
    with torch.enable_grad():
        torch.testing.assert_close(made[1](h), plain[1](plain[0](x)), rtol=1e-6, atol=1e-6)
    h.mul_(0.5)
    with pytest.raises(ocsquant.ArgumentError, match="fuse=False"):
        made[1](h)
    made[0].register_forward_hook(lambda module, args, y: y * 0.5)
    plain[0].register_forward_hook(lambda module, args, y: y * 0.5)
    with pytest.raises(ocsquant.ArgumentError, match="fuse=False"):
        made(x)


def test_layers_that_share_a_weight_share_its_record():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(128, 128), nn.Linear(128, 128), nn.GELU()
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.act(self.a(x)))

    made = ocsquant.quantize(Tied().eval(), fuse=True)
    assert made.a.nonlinearity == "gelu"
    assert made.a.packed is made.b.packed


def test_tracing_finds_the_float_form():
    _, plain, made = models(Nested)
    x = torch.randn(5, 64)
    assert torch.equal(torch.jit.trace(made, x)(x), plain(x))


def test_hooks_and_shared_modules_are_respected():
    seen = []
    model = sequential().eval()
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    assert fused(ocsquant.quantize(model, fuse=True)) == []
    model = sequential().eval()
    model[1].register_forward_pre_hook(lambda module, args: None)
    assert fused(ocsquant.quantize(model, fuse=True)) == []
    layer = nn.Linear(128, 128)
    model = nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer, nn.ReLU())).eval()
    assert fused(ocsquant.quantize(model, fuse=True)) == []
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(128, 128), act, nn.BatchNorm1d(128), act).eval()
    made = ocsquant.quantize(model, fuse=True)
    assert fused(made) == ["1"]
    assert made[3] is act


KINDS = {
    "relu": [nn.ReLU(), nn.ReLU(inplace=True)],
    "gelu": [nn.GELU()],
    "gelu_tanh": [nn.GELU("tanh")],
    "silu": [nn.SiLU()],
    "sigmoid": [nn.Sigmoid()],
    "tanh": [nn.Tanh()],
    None: [nn.Softplus(), nn.LeakyReLU(), nn.Identity(), nn.ReLU6(), nn.Dropout()],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    for act in KINDS[kind]:
        _, plain, made = models(functools.partial(sequential, act))
        assert made[0].nonlinearity == kind
        x = torch.randn(5, 64)
        with torch.no_grad():
            torch.testing.assert_close(made[:2](x), plain[:2](x), rtol=1e-6, atol=1e-6)


def test_transformers_activations():
    activations = pytest.importorskip("transformers.activations")
    kinds = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
             "silu": "silu", "relu": "relu", "quick_gelu": None, "gelu_10": None, "tanh": "tanh"}  # fmt: skip
    x = torch.randn(5, 64)
    for name, kind in kinds.items():
        _, plain, made = models(functools.partial(Nested, activations.ACT2FN[name]))
        assert made.fc1.nonlinearity == kind, name
        with torch.no_grad():
            torch.testing.assert_close(made.act(made.fc1(x)), plain.act(plain.fc1(x)), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "W4A8"},
        {"recipe": "W2A8"},
        {"recipe": ocsquant.Recipe(activations=ocsquant.PerChannelStatic()), "calibration": [torch.randn(200, 64)]},
        {"recipe": ocsquant.Recipe(ocsquant.Weights(split=ocsquant.OCS(0.05)))},
    ],
)
def test_every_scheme(options):
    _, plain, made = models(sequential, **options)
    assert made[0].nonlinearity == "gelu"
    x = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(made[:2](x), plain[:2](x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"recipe": "W8A16", "fuse": True}, {"simulate": True, "fuse": True}, {}])
def test_layers_without_the_integer_product_leave_it(options):
    model = ocsquant.quantize(sequential().eval(), **options)
    assert fused(model) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    _, plain, made = models(sequential)
    x = torch.randn(5, 64, dtype=dtype)
    with torch.no_grad():
        got, expected = made[:2](x), plain[:2](x)
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-3)
        torch.compiler.reset()
        compiled = torch.compile(made[:2], backend="aot_eager")
        torch.testing.assert_close(compiled(x), got, rtol=2**-7, atol=1e-3)
    assert got.dtype == dtype


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(64, 4, bias=False), nn.Linear(4, 128, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_an_adapter_trains_rightly_and_is_never_silently_wrong():
    """Its output comes between the layer and the nonlinearity."""
    _, plain, made = models(sequential)
    torch.manual_seed(2)
    plain[0] = Adapter(plain[0])
    made[0] = Adapter(made[0])
    made[0].load_state_dict(plain[0].state_dict())
    x = torch.randn(5, 64)
    assert torch.equal(made(x), plain(x))
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(made, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, plain(x), rtol=0, atol=0.03)
        with pytest.raises(ocsquant.ArgumentError, match="fuse=False"):
            made(x)


def test_a_file_is_checked_against_the_model(tmp_path):
    made = ocsquant.quantize(sequential().eval(), fuse=True)
    ocsquant.save(made, tmp_path / "file")
    with pytest.raises(ocsquant.SchemaMismatchError, match="gelu at '1'"):
        ocsquant.load(sequential(nn.SiLU()), tmp_path / "file")
    with pytest.raises(ocsquant.SchemaMismatchError, match="gelu at '1'"):
        ocsquant.load(nn.Sequential(nn.Linear(64, 128), nn.Identity(), nn.Linear(128, 64)), tmp_path / "file")
    for torn in (made[:1], made[0]):
        with pytest.raises(ocsquant.UnsupportedModuleError, match="fuse=False"):
            ocsquant.save(torn, tmp_path / "torn")


def test_calibration_and_search_see_the_network_as_it_was():
    model, batches = sequential().eval(), [torch.randn(40, 64)]
    recipe = ocsquant.search(model, batches, budget=6.0)
    made = ocsquant.quantize(model, recipe, calibration=batches, fuse=True)
    with torch.no_grad():
        assert made(torch.randn(3, 64)).isfinite().all()
    with pytest.raises(ocsquant.NothingToQuantizeError):
        ocsquant.quantize(made)
