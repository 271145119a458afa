"""Layers that are called with the same tensor quantize it once: the same bits as each alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ocsquant
from ocsquant import OCS, Recipe, Weights, ops
from ocsquant.nn.shared import WAITING
from ocsquant.source import siblings

LINEARS = torch.ops.ocsquant.quantized_linears.default


class Attention(nn.Module):
    def __init__(self, keys=96):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(128, 192), nn.Linear(128, keys), nn.Linear(128, keys, bias=False)
        self.o = nn.Linear(192 + 2 * keys, 128)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (-1, 64)).flatten(-2)
        k = self.k(x)
        v = self.v(x).tanh()
        return self.o(torch.cat([q, k, v], -1))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(128, 96), nn.Linear(128, 96), nn.Linear(96, 128)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Changed(Attention):
    def forward(self, x):
        q = self.q(x)
        x.add_(1.0)
        k = self.k(x)
        return self.o(torch.cat([q, k, self.v(x)], -1))


class Branches(Attention):
    def forward(self, x):
        q = self.q(x)
        k = self.k(x) if q.sum() > 0 else q[..., :96]
        if q.sum() > 0:
            x = x + 1
        return self.o(torch.cat([q, k, self.v(x)], -1))


class Renamed(Attention):
    def forward(self, x):
        q = self.q(x)
        x = self.k(x)
        return self.o(torch.cat([q, x, self.v(q[..., :128])], -1))


class Between(Attention):
    def forward(self, x):
        h = x[:]
        q = self.q(x)
        h.mul_(2.0)
        k = self.k(x)
        v = self.v(x)
        return self.o(torch.cat([q, k, v], -1))


class Twice(Attention):
    def forward(self, x):
        return self.o(torch.cat([self.q(x), self.k(x), self.v(self.k(x)[..., :1] + x)], -1))


def test_what_the_code_shows():
    assert siblings(Attention()) == [["q", "k", "v"]]
    assert siblings(Gated()) == [["gate", "up"]]
    assert siblings(Changed()) == [["k", "v"]]
    assert siblings(Branches()) == []
    assert siblings(Renamed()) == [["q", "k"]]
    assert siblings(Twice()) == []
    assert siblings(Between()) == [["k", "v"]]


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("ocsquant"):
            self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def names(model, x):
    with Calls() as calls:
        model(x)
    return calls.names


def pair(make=Attention, recipe=None):
    torch.manual_seed(3)
    model = make().eval()
    apart = ocsquant.quantize(copy.deepcopy(model), recipe, fuse=False)
    return apart, ocsquant.quantize(model, recipe, fuse=True)


RECIPES = {
    "default": None,
    "W4": Recipe(Weights(bits=4)),
    "W4A8": "W4A8",
    "W2A8": "W2A8",
    "W6A6": Recipe(Weights(bits=6), ocsquant.PerToken(6)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("make", [Attention, Changed, Renamed, Between])
@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 7, 128), (400, 128), (0, 128)])
def test_shared_layers_have_the_bits_of_separate_ones(name, make, shape, tmp_path):
    apart, made = pair(make, RECIPES[name])
    x = torch.randn(shape) * 3
    expected = apart(x.clone())
    assert torch.equal(made(x.clone()), expected)
    with torch.inference_mode():
        assert torch.equal(made(x.clone()), expected)
    assert torch.equal(made(x.bfloat16().clone()), apart(x.bfloat16().clone()))
    ocsquant.save(made, tmp_path / "file")
    loaded = ocsquant.load(make().eval(), tmp_path / "file")
    for again in (loaded, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(again(x.clone()), expected)
        assert names(again, x.clone()) == names(made, x.clone())


def test_one_operator_for_all_and_the_report_says_so():
    _, made = pair()
    x = torch.randn(5, 128)
    with torch.no_grad():
        assert names(made, x) == ["quantized_linears", "quantized_linear"]
        assert getattr(x, WAITING) == {}
    assert names(made, x) == ["quantized_linear"] * 4 or names(made, x)[0].startswith("quantized_linear_train")
    reasons = {line.path: line.reason for line in ocsquant.report(made).layers}
    assert reasons == {
        "q": "input quantized once with k, v",
        "k": "input quantized once with q, v",
        "v": "input quantized once with q, k",
        "o": "",
    }


@torch.no_grad()
def test_a_gate_computes_its_nonlinearity_too():
    apart, made = pair(Gated)
    x = torch.randn(5, 128)
    assert names(made, x) == ["quantized_linears", "quantized_linear"]
    torch.testing.assert_close(made(x), apart(x), rtol=0, atol=0.02)
    torch.testing.assert_close(made.act(made.gate(x)), apart.act(apart.gate(x)), rtol=1e-6, atol=1e-6)
    (line,) = [line for line in ocsquant.report(made).layers if line.path == "gate"]
    assert line.reason == "computes the silu that follows; input quantized once with up"


@torch.no_grad()
def test_layers_of_different_forms_do_not_share():
    layer = Attention(96).eval()
    ocsquant.quantize(layer, overrides={"k": Recipe(Weights(bits=4))}, fuse=True)
    assert layer.q.shared is layer.v.shared
    assert layer.k.shared is None
    assert names(layer, torch.randn(3, 128)) == ["quantized_linears", "quantized_linear_narrow", "quantized_linear"]
    split = ocsquant.quantize(Attention().eval(), Recipe(Weights(split=OCS(0.05))), fuse=True)
    assert split.q.shared is None
    hooked = Attention().eval()
    hooked.k.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    ocsquant.quantize(hooked, fuse=True)
    assert hooked.q.shared.layers == [hooked.q, hooked.v]
    twice = Attention().eval()
    twice.v = twice.k
    ocsquant.quantize(twice, fuse=True)
    assert twice.q.shared is twice.k.shared is None


@torch.no_grad()
def test_what_waits_is_never_stale():
    apart, made = pair()
    x = torch.randn(5, 128)
    made.q(x)
    assert torch.equal(made.k(x.clone()), apart.k(x))  # another tensor
    x.mul_(2.0)
    assert torch.equal(made.k(x), apart.k(x))  # not the one it was
    assert torch.equal(made.v(x), apart.v(x))
    made.q(x)
    made.k.scale.mul_(2.0)
    apart.k.scale.mul_(2.0)
    assert torch.equal(made(x), apart(x))
    made.q(x)
    state = {name: t.clone() for name, t in made.k.state_dict().items()}
    made.k.load_state_dict({name: t.flip(0) if name == "bias" else t for name, t in state.items()})
    apart.k.bias.copy_(state["bias"].flip(0))
    assert torch.equal(made.k(x), apart.k(x))
    made.k = nn.Linear(128, 96)
    apart.k = made.k
    assert torch.equal(made(x), apart(x))


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + 1.0


@torch.no_grad()
def test_adapters_find_their_layer_computed():
    apart, made = pair()
    apart.k, made.k = Adapter(apart.k), Adapter(made.k)
    x = torch.randn(5, 128)
    assert names(made, x) == ["quantized_linears", "quantized_linear"]
    assert torch.equal(made(x), apart(x))


def test_compiled_exported_and_trained_they_compute_apart():
    apart, made = pair()
    x = torch.randn(5, 128)
    torch.compiler.reset()
    with torch.no_grad():
        expected = made(x)
        assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(torch.export.export(made, (x,)).module()(x), expected)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    made(leaf).sum().backward()
    apart(other).sum().backward()
    assert torch.equal(leaf.grad, other.grad)


def test_tracing_and_half_precision_compute_apart():
    apart, made = pair()
    x = torch.randn(5, 128)
    assert torch.equal(torch.jit.trace(made, x, check_trace=False)(x), apart(x))
    with torch.no_grad():
        names_of_half = names(made.half(), x.half())
        assert names_of_half == ["quantized_linear"] * 4


def test_a_file_with_layers_that_cannot_share_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ocsquant.io import KEY, _digest

    _, made = pair()
    ocsquant.save(made, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        tensors, text = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()[KEY]  # noqa: SIM118
    import json

    for groups in ([["q", "o"]], [["q"]], [["q", "q"]], [["q", "elsewhere"]]):
        record = json.loads(text)
        del record["digest"]
        record["shared"] = groups
        save_file(tensors, tmp_path / "bad", {KEY: json.dumps(dict(record, digest=_digest(record)))})
        with pytest.raises(ocsquant.CorruptCheckpointError):
            ocsquant.load(Attention(), tmp_path / "bad")


def weights(count=2, n=70, k=30):
    codes = [torch.randint(-9, 9, (n + i, k), dtype=torch.int8) for i in range(count)]
    return [ops.pack_weight(c) for c in codes], [torch.rand(n + i) for i in range(count)]


def test_operator():
    packed, scale = weights()
    bias = [torch.randn(70), None]
    none = [None, None]
    x = torch.randn(3, 30)
    arguments = (x, packed, scale, bias, 8, 16, 4.0, 0, 8, none, none, ["relu", "none"])
    torch.library.opcheck(LINEARS, arguments)
    first, second = LINEARS(*arguments)
    assert torch.equal(first, ops.quantized_linear(x, packed[0], scale[0], bias[0], nonlinearity="relu"))
    assert torch.equal(second, ops.quantized_linear(x, packed[1], scale[1]))
    wrong = {
        "x": {0: torch.tensor(1.0)},
        "packed": {1: [], 2: []},
        "scale": {2: scale[:1]},
        "bias": {3: [None]},
        "activation_bits": {4: 9},
        "max_outliers": {5: 65},
        "outlier_threshold": {6: 1.0},
        "group_size": {7: 8},
        "weight_bits": {8: 5},
        "zero": {9: [None]},
        "levels": {10: [torch.zeros(4, dtype=torch.int8), None]},
        "nonlinearity": {11: ["relu", "softplus"]},
    }
    for name, change in wrong.items():
        changed = [change.get(i, a) for i, a in enumerate(arguments)]
        with pytest.raises(RuntimeError, match=f"quantized_linears: .*{name}"):
            LINEARS(*changed)
