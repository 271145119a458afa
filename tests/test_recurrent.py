"""QuantizedLSTM and QuantizedGRU in the place of torch's modules: calling conventions, gradients, files, compile."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import ocsquant
from ocsquant import OCS, PerToken, Recipe, SplitQuant, Weights
from ocsquant.nn import QuantizedGRU, QuantizedLSTM


def quantized(module, recipe="W8A8"):
    """By name: also what is too small to gain."""
    return ocsquant.quantize(copy.deepcopy(module), overrides={"": recipe})


def float_twin(module, like):
    """torch's module over the dequantized weights."""
    twin = copy.deepcopy(like)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(getattr(module, name))
    return twin


def flat(result):
    """All tensors of an output."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


configurations = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([nn.LSTM, nn.GRU]),
        "input_size": st.integers(1, 20),
        "hidden_size": st.integers(2, 24),
        "num_layers": st.integers(1, 3),
        "bidirectional": st.booleans(),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "proj": st.booleans(),
    }
)


@settings(max_examples=500, deadline=None)
@given(
    configuration=configurations,
    form=st.sampled_from(["batch", "one", "packed", "packed unsorted", "strided"]),
    given_state=st.booleans(),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_every_call_of_the_float_module(configuration, form, given_state, lengths, seed):
    """Wiring: near the float module over the same weights, whose inputs are not rounded."""
    torch.manual_seed(seed)
    kind, proj = configuration.pop("kind"), configuration.pop("proj")
    if proj and kind is nn.LSTM:
        configuration["proj_size"] = configuration["hidden_size"] - 1
    module = kind(**configuration)
    q = quantized(module)
    twin, batch, steps, size = float_twin(q, module), len(lengths), max(lengths), module.input_size
    if form == "one":
        x = torch.randn(steps, size)
    elif form.startswith("packed"):
        lengths = lengths if "unsorted" in form else sorted(lengths, reverse=True)
        x = pack_sequence([torch.randn(n, size) for n in lengths], enforce_sorted="unsorted" not in form)
    else:
        shape = (batch, steps, size) if module.batch_first else (steps, batch, size)
        x = torch.randn(*shape) if form == "batch" else torch.randn(*shape[:2], 2 * size)[..., ::2]
    state = None
    if given_state:
        count, one = module.num_layers * (1 + module.bidirectional), () if form == "one" else (batch,)
        state = torch.randn(count, *one, module.proj_size or module.hidden_size)
        state = (state, torch.randn(count, *one, module.hidden_size)) if kind is nn.LSTM else state
    with torch.no_grad():
        ours, theirs = flat(q(x, state)), flat(twin(x, state))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 0.1
        assert (a - b).square().mean() < 2e-3 * b.square().mean() + 4e-4
    assert type(q(x)[0]) is type(twin(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_input_is_that_of_the_output(dtype):
    module = nn.LSTM(20, 40)
    q = quantized(module).to(dtype)
    x = torch.randn(5, 2, 20)
    y, (h, c) = q(x.to(dtype))
    assert {y.dtype, h.dtype, c.dtype} == {dtype}
    assert q.hh_l0.scale.dtype == torch.float32
    torch.testing.assert_close(y.float(), q(x)[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "module",
    [nn.LSTM(12, 16, 2, bidirectional=True), nn.GRU(12, 16, bias=False), nn.LSTM(12, 16, proj_size=5)],
    ids=["lstm", "gru", "projected"],
)
def test_gradient_is_that_of_the_dequantized_weights(module, packed):
    q = quantized(module)
    twin = float_twin(q, module)
    x = torch.randn(4, 3, 12)
    grads = []
    for m in (q, twin):
        leaf = x.clone().requires_grad_()
        given_x = pack_sequence([leaf[:4, 0], leaf[:2, 1], leaf[:1, 2]]) if packed else leaf
        y = flat(m(given_x))[0]
        (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
        grads.append(leaf.grad)
    with torch.no_grad():
        assert torch.equal(flat(q(x))[0], flat(q(x.clone().requires_grad_()))[0])
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[1].norm()


def test_dropout_between_layers_in_training_only():
    q = quantized(nn.LSTM(12, 64, 2, dropout=0.5))
    x = torch.randn(4, 3, 12)
    assert torch.equal(q.eval()(x)[0], q(x)[0])
    q.train()
    assert not torch.equal(q(x)[0], q(x)[0])


RECIPES = {
    "groups of zero points": Recipe(Weights(bits=4, granularity="group", group_size=16, symmetric=False)),
    "split": Recipe(Weights(bits=5, split=OCS(expand_ratio=0.1))),
    "codebook": Recipe(Weights(bits=2, split=SplitQuant())),
    "plain tokens of 6 bits": Recipe(Weights(bits=6), PerToken(bits=6, max_outliers=0)),
}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_the_codes_of_the_simulation(name, kind):
    module = kind(48, 40, 2)
    q, simulated = (
        quantized(module, RECIPES[name]),
        ocsquant.quantize(copy.deepcopy(module), RECIPES[name], simulate=True),
    )
    for weight, parameter in simulated.named_parameters():
        if weight.startswith("weight"):
            torch.testing.assert_close(getattr(q, weight), parameter.data, rtol=1e-5, atol=1e-7)
    x = torch.randn(5, 3, 48)
    with torch.no_grad():
        torch.testing.assert_close(q(x)[0], simulated(x)[0], rtol=0, atol=0.1)


class Tagger(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.rnn = kind(64, 96, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(192, 128)

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_default_report_file_and_copies(kind, tmp_path):
    torch.manual_seed(0)
    model, ids = Tagger(kind), torch.randint(0, 300, (3, 7))
    before = model(ids)
    ocsquant.quantize(model)
    assert type(model.rnn) is (QuantizedLSTM if kind is nn.LSTM else QuantizedGRU)
    report = ocsquant.report(model)
    assert [(row.path, row.scheme) for row in report.layers] == [("embed", "W8A16"), ("rnn", "W8A8"), ("head", "W8A8")]
    assert report.total_after < 0.35 * report.total_before
    y = model(ids)
    assert (y - before).square().mean() < 1e-3 * before.square().mean()
    assert torch.equal(copy.deepcopy(model)(ids), y)
    ocsquant.save(model, tmp_path / "file")
    for again in (Tagger(kind), copy.deepcopy(model)):
        assert torch.equal(ocsquant.load(again, tmp_path / "file")(ids), y)
    with torch.device("meta"):
        empty = Tagger(kind)
    assert torch.equal(ocsquant.load(empty, tmp_path / "file")(ids), y)
    assert ocsquant.report(model).layers == report.layers
    with pytest.raises(ocsquant.NothingToQuantizeError, match="already quantized"):
        ocsquant.quantize(model)
    state = model.state_dict()
    other = ocsquant.quantize(Tagger(kind))
    other.load_state_dict(state)
    assert torch.equal(other(ids), y)


@pytest.mark.parametrize(
    "other",
    [lambda: nn.GRU(64, 96, 2), lambda: nn.LSTM(64, 96), lambda: nn.LSTM(64, 96, 2, batch_first=True), nn.Identity],
)
def test_a_file_of_another_module_is_refused(other, tmp_path):
    model = nn.Sequential(ocsquant.quantize(nn.LSTM(64, 96, 2)))
    ocsquant.save(model, tmp_path / "file")
    with pytest.raises(ocsquant.SchemaMismatchError):
        ocsquant.load(nn.Sequential(other()), tmp_path / "file")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_compile_and_export(kind):
    model, ids = ocsquant.quantize(Tagger(kind)).eval(), torch.randint(0, 300, (3, 7))
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(ids)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), expected)
        exported = torch.export.export(
            model, (ids,), dynamic_shapes=({0: torch.export.Dim("b"), 1: torch.export.Dim("t")},)
        )
        assert torch.equal(exported.module()(ids), expected)
        longer = torch.randint(0, 300, (2, 11))
        assert torch.equal(exported.module()(longer), model(longer))


def test_compile_with_a_transposed_state():
    q, x = quantized(nn.GRU(12, 16)), torch.randn(5, 4, 12)
    state = torch.randn(16, 4, 1).permute(2, 1, 0)
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(q, fullgraph=True)(x, state)[0], q(x, state)[0])


@pytest.mark.parametrize("how", [nn.utils.weight_norm, lambda m, name: prune.l1_unstructured(m, name, 0.5)])
def test_a_computed_weight_stays_float_with_the_reason(how):
    model = nn.ModuleDict({"rnn": nn.LSTM(64, 64), "head": nn.Linear(128, 128)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how(model["rnn"], "weight_hh_l0")
    ocsquant.quantize(model)
    reason = {row.path: row.reason for row in ocsquant.report(model).layers}["rnn"]
    assert "weight_hh_l0 is computed by a hook" in reason


def test_what_trains_beside_frozen_layers_stays_float():
    model = nn.ModuleDict({"frozen": nn.Linear(128, 128).requires_grad_(False), "rnn": nn.GRU(64, 64)})
    ocsquant.quantize(model)
    assert type(model["rnn"]) is nn.GRU


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: q(torch.randn(4, 3, 13)), "input"),
        (lambda q: q(torch.randn(12)), "input"),
        (lambda q: q(torch.ones(4, 3, 12, dtype=torch.int32)), "input"),
        (lambda q: q(torch.randn(4, 3, 12), torch.randn(1, 3, 16)), "hx"),
        (lambda q: q(torch.randn(4, 3, 12), (torch.randn(1, 3, 16), torch.randn(1, 2, 16))), "hx"),
        (lambda q: q(torch.randn(4, 12), (torch.randn(1, 1, 16), torch.randn(1, 1, 16))), "hx"),
    ],
)
def test_wrong_calls_name_the_argument(call, message):
    with pytest.raises(ocsquant.ArgumentError, match=message):
        call(quantized(nn.LSTM(12, 16)))


@pytest.mark.parametrize(
    ("module", "recipe", "reason"),
    [
        (nn.LSTM(64, 64), Recipe(activations=ocsquant.PerTensorStatic()), "LSTM with calibrated inputs"),
        (nn.GRU(64, 64), Recipe(Weights(symmetric=False)), "zero points at 8 bits"),
        (nn.GRU(64, 64), "W4A16", "no weight-only form for GRU"),
        (nn.LSTM(64, 31), "W8A8", "too small to gain: 31 hidden units"),
    ],
)
def test_what_has_no_kernel_says_so(module, recipe, reason):
    with pytest.raises(ocsquant.NothingToQuantizeError, match=reason):
        ocsquant.quantize(module, recipe, calibration=[torch.randn(5, 3, 64)])
