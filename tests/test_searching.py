"""Sensitivity and search: errors of the real quantizers, budgets, choices no worse than uniform ones."""

import itertools
import json

import pytest
import torch
from test_io import state_bytes
from torch import nn

import ocsquant
from ocsquant import OCS, ArgumentError, Recipe, SplitQuant, Weights
from ocsquant.searching import Option, Sensitivity, _choose


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.rnn = nn.Embedding(40, 64), nn.LSTM(64, 64, batch_first=True)
        self.conv, self.last = nn.Conv1d(64, 64, 3), nn.Linear(64, 70, bias=False)
        self.aside = nn.Linear(64, 64)  # its output hardly counts

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.conv(self.rnn(self.emb(ids))[0].transpose(1, 2)).transpose(1, 2)
        return {"y": self.last(y + 1e-3 * self.aside(y)), "ids": ids}


@pytest.fixture(scope="module")
def measured() -> tuple[Model, list[torch.Tensor], Sensitivity]:
    torch.manual_seed(0)
    model, batches = Model(), [torch.randint(40, (4, 12)) for _ in range(3)]
    before, tensors = state_bytes(model), [*map(id, model.parameters())]
    table = ocsquant.sensitivity(model, batches, simulate=True)
    assert state_bytes(model) == before
    assert [*map(id, model.parameters())] == tensors
    assert model.rnn._flat_weights[0] is model.rnn.weight_ih_l0
    return model, batches, table


def test_errors_are_those_of_the_layers_own_outputs(measured):
    model, batches, table = measured
    made = ocsquant.quantize(nn.Sequential(model), table.candidates["W5"], calibration=batches, simulate=True)
    model = made[0]  # quantized in place
    with torch.no_grad():
        torch.manual_seed(0)
        original = Model()
        lost = power = 0.0
        for ids in batches:
            y = original.rnn(original.emb(ids))[0].transpose(1, 2)
            exact, got = (m.conv._conv_forward(y, m.conv.weight, None) for m in (original, model))
            lost += float((got - exact).square().sum())
            power += float(exact.square().sum())
    assert table.options["conv"]["W5"].error == pytest.approx(lost / power, rel=1e-3)


def test_importance_tells_what_counts(measured):
    _, _, table = measured
    assert set(table.options) == {"emb", "rnn", "conv", "last", "aside"} == set(table.importance)
    assert table.importance["aside"] < 1e-3 * min(table.importance[p] for p in ("conv", "last"))
    assert table.importance["last"] == pytest.approx(1.0, rel=0.2)
    for row in table.options.values():
        errors = [row[n].error for n in ("W3 g64", "W5", "W6", "W8")]
        assert errors == sorted(errors, reverse=True)
    assert json.loads(table.to_json())["weights"]["last"] == 70 * 64
    assert "importance" in str(table)
    assert "aside" in str(table)


def stored_bits(model: nn.Module, table: Sensitivity) -> float:
    lines = {line.path: line for line in ocsquant.report(model).layers}
    biases = {p: sum(4 * b.numel() for n, b in m.named_parameters(recurse=False) if "bias" in n) for p, m in
              model.named_modules()}  # fmt: skip
    used = sum(lines[path].bytes_after - biases[path] for path in table.options)
    return 8 * used / sum(table.weights.values())


@pytest.mark.parametrize("budget", [3.8, 4.4, 5.3, 6.0, 9.0])
def test_recipes_keep_their_budget_and_spend_it_where_it_counts(measured, budget):
    _, batches, table = measured
    torch.manual_seed(0)
    model = Model()
    recipe = ocsquant.search(model, table, budget)
    assert Recipe.from_json(recipe.to_json()) == recipe
    made = ocsquant.quantize(model, recipe, calibration=batches, simulate=True)
    assert stored_bits(made, table) <= budget + 1e-9
    names = {recipe: name for name, recipe in table.candidates.items()}
    chosen = {path: names[_recipe_of(recipe, path)] for path in table.options}
    harm = sum(table.harm(path, name) for path, name in chosen.items())
    total = sum(table.weights.values())
    for name in table.candidates:
        if 8 * sum(row[name].bytes for row in table.options.values()) / total <= budget:
            assert harm <= sum(table.harm(path, name) for path in table.options) * (1 + 1e-12)
    if budget == 4.4:
        assert table.options["aside"][chosen["aside"]].bytes <= table.options["aside"]["W4 g64"].bytes


def _recipe_of(recipe: Recipe, path: str) -> Recipe:
    found = (recipe.overrides or {}).get(path)
    return found or Recipe(recipe.weights, recipe.activations)


def test_small_tables_are_solved_nearly_as_well_as_by_trying_everything():
    torch.manual_seed(4)
    names = ("a", "b", "c")
    for _ in range(30):
        options = {
            f"l{i}": {n: Option(int(200 * (j + 1) + torch.randint(90, ())), float(torch.rand(())) / 4**j)
                      for j, n in enumerate(names)}
            for i in range(6)
        }  # fmt: skip
        importance = {path: float(torch.rand(())) for path in options}
        table = Sensitivity(options, dict.fromkeys(options, 1000), importance, dict.fromkeys(names, Recipe()))

        def harm(choice):
            return sum(table.harm(path, name) for path, name in choice.items())  # noqa: B023

        best = min(
            harm(dict(zip(options, pick, strict=True)))
            for pick in itertools.product(names, repeat=6)
            if sum(options[p][n].bytes for p, n in zip(options, pick, strict=True)) <= 2600
        )
        got = _choose(table, 2600)
        assert sum(options[p][n].bytes for p, n in got.items()) <= 2600
        assert harm(got) <= best * 1.5 + 1e-3


def test_own_candidates_filters_and_patterns():
    torch.manual_seed(0)
    model, batches = Model().train(), [torch.randint(40, (4, 12))]
    table = ocsquant.sensitivity(
        model,
        iter(batches),
        {"small": "W4A16", "book": Recipe(Weights(2, split=SplitQuant()), None)},
        ignore=["emb"],
        filter_fn=lambda module, path: path != "rnn",
        simulate=True,
    )
    assert model.training
    assert set(table.options) == {"conv", "last", "aside"}
    recipe = ocsquant.search(model, table, 5.0)
    assert recipe.ignore == ("emb", "rnn")
    ocsquant.quantize(model, recipe, simulate=True)
    assert type(model.rnn) is nn.LSTM
    one = ocsquant.search(nn.Linear(64, 64), [torch.randn(9, 64)], 9.0)
    assert one.weights.bits == 8


def test_wrong_requests(measured):
    model, _, table = measured
    with pytest.raises(ArgumentError, match=r"budget must be at least 3\.\d+, the bits"):
        ocsquant.search(model, table, 2.0)
    with pytest.raises(ArgumentError, match="candidates must be None with a Sensitivity"):
        ocsquant.search(model, table, 5.0, {"a": "W4A16"})
    with pytest.raises(ArgumentError, match="ignore must be None with a Sensitivity"):
        ocsquant.search(model, table, 5.0, ignore=["emb"])
    with pytest.raises(ArgumentError, match="an expand_ratio"):
        ocsquant.sensitivity(model, [], {"a": Recipe(Weights(8, split=OCS(max_overhead=0.1)))})
    with pytest.raises(ArgumentError, match="another model"):
        ocsquant.search(nn.Linear(64, 64), table, 5.0)
    with pytest.raises(ArgumentError, match="without overrides"):
        ocsquant.sensitivity(model, [], {"a": Recipe(ignore=("b",))})
    with pytest.raises(ocsquant.NotCalibratedError, match="no floating-point tensor"):
        ocsquant.sensitivity(Argmax(64, 64), [torch.randn(3, 64)])


class Branches(nn.Module):
    """One of two layers, by the input; what is masked is -inf; the input is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.att = nn.Linear(64, 64), nn.Linear(64, 64), nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2.0)
        y = self.a(x) if x.sum() > 0 else self.b(x)
        y = y + self.att(y, y, y, need_weights=False)[0]
        return torch.cat([y, torch.full_like(y, -torch.inf)], -1)


def test_layers_that_only_some_batches_reach():
    torch.manual_seed(0)
    model, x = Branches(), torch.rand(3, 8, 64)
    batches = [x.clone(), -x]

    def linears(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear)

    table = ocsquant.sensitivity(model, batches, filter_fn=linears)
    assert torch.equal(batches[0], x)
    assert all(0.2 < table.importance[path] < 5.0 for path in ("a", "b"))
    assert set(table.options) == {"a", "b", "att.out_proj"}
    recipe = ocsquant.search(model, table, 9.0)
    assert recipe.ignore is None
    made = ocsquant.quantize(model, recipe, calibration=batches)
    assert sum(line.kernel is not None for line in ocsquant.report(made).layers) == 3


def test_what_quantize_would_leave_float_does_not_count():
    model = nn.ModuleDict({"lstm": nn.LSTM(64, 64), "linear": nn.Linear(64, 64)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return model["linear"](model["lstm"](x)[0])

    assert set(ocsquant.sensitivity(Both(), [torch.randn(5, 2, 64)]).options) == {"parts.linear"}


class Argmax(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.inner = nn.Linear(*sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).argmax(-1)


def test_a_mixture_must_promise_more_than_a_few_percent():
    """Else one recipe everywhere is kept: the prediction is no better than that."""

    def table(gain):
        rows = {
            "a": {"small": Option(50, 1.0), "even": Option(100, 0.5), "large": Option(150, 0.4)},
            "b": {"small": Option(50, 1.0 - gain), "even": Option(100, 0.9), "large": Option(150, 0.9)},
        }
        return Sensitivity(rows, {"a": 100, "b": 100}, {"a": 1.0, "b": 1.0}, {})

    def chosen(gain):
        made = table(gain)
        made.candidates.update(dict.fromkeys(("small", "even", "large"), Recipe()))
        return _choose(made, 200)

    assert chosen(0.0) == {"a": "even", "b": "even"}
    assert chosen(0.02) == {"a": "even", "b": "even"}
    assert chosen(0.09) == {"a": "large", "b": "small"}
