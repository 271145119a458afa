"""Wrong calls, generated from the signatures: every argument of every public callable, by category.

Types come from the annotations, a tensor's dtype, rank, size and device from a right value; CASES adds ranges and what
is particular. An argument or category that is neither tried nor excused fails test_every_argument_has_its_cases.
"""

import copy
import inspect
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from networks import snapshot
from torch import nn

import ocsquant
from ocsquant import OCS, Activations, ArgumentError, ArgumentTypeError, Recipe, Weights, ops

MODEL = nn.Sequential(nn.Linear(128, 64))
QUANTIZED = ocsquant.quantize(copy.deepcopy(MODEL))
SPLIT = ocsquant.quantize(copy.deepcopy(MODEL), Recipe(Weights(bits=None, split=OCS(0.05)), None))
RECIPE = Recipe().to_json()


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def int8(*shape: int) -> torch.Tensor:
    return tensor(*shape, dtype=torch.int8)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


PACKED = ops.pack_weight(int8(70, 30), int8(70, 3))
INDEX = int32(1, 5, 29)


@dataclass
class Wrong:
    """A value with an error of its own, or whose error names something else than the argument."""

    value: Any
    error: type[Exception] | None = None
    text: str | None = None


@dataclass
class Case:
    """A callable, a right call, what is wrong beyond the generated values, and why a category has no wrong value."""

    call: Callable[..., Any]
    right: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, dict[str, Any]] = field(default_factory=dict)  # argument -> category -> value
    excused: dict[str, str] = field(default_factory=dict)  # "argument.category" -> reason

    @property
    def operator(self) -> bool:
        return self.call.__module__ == ops.__name__


NAN_MODEL = nn.Sequential(nn.Linear(128, 64))
NAN_MODEL[0].weight.data[3, 4] = float("nan")

CASES = {
    "OCS": Case(
        OCS,
        wrong={
            "expand_ratio": {"range": 1.5, "below": -0.1, "nan": float("nan")},
            "max_overhead": {"range": 2.0, "below": -0.1},
            "shares": {"range": "thirds"},
            "select": {"range": "best"},
        },
    ),
    "Weights": Case(
        Weights,
        wrong={
            "bits": {"range": 9, "below": 1, "without split": None},
            "granularity": {"range": "row"},
            "group_size": {"range": 4, "above": 131073},
            "clip": {"range": "percentile"},
        },
        excused={"split.range": "valid by construction"},
    ),
    "Activations": Case(
        Activations,
        wrong={
            "bits": {"range": 16, "below": 1},
            "max_outliers": {"range": 65, "below": -1},
            "outlier_threshold": {"range": 1.0, "above": 2e6},
        },
    ),
    "PerToken": Case(
        ocsquant.PerToken,
        wrong={"bits": {"range": 1}, "max_outliers": {"range": 1000}, "outlier_threshold": {"range": float("nan")}},
    ),
    "Recipe": Case(
        Recipe,
        wrong={
            "overrides": {"range": {"a": "W9A9"}, "keys": {3: "W8A8"}, "values": {"a": 8}},
            "ignore": {"range": ["a", 3]},
        },
        excused={"weights.range": "valid by construction", "activations.range": "valid by construction"},
    ),
    "Recipe.from_json": Case(
        Recipe.from_json,
        {"text": RECIPE},
        {
            "text": {
                "range": RECIPE.replace('"bits": 8', '"bits": 9'),
                "no json": "no",
                "no mapping": "[]",
                "empty": "{}",
                "unknown": RECIPE.replace("{", '{"more": 1,', 1),
                "weights": Recipe(ignore=("a",)).to_json().replace('"weights": {', '"weights": "ab", "w": {'),
                "ignore": RECIPE.replace('"ignore": null', '"ignore": "head"'),
                "deep": "[" * 100_000,
            }
        },
    ),
    "Recipe.to_json": Case(Recipe.to_json, {"self": Recipe()}, excused={"self": "valid by construction"}),
    "quantize": Case(
        ocsquant.quantize,
        {"model": MODEL},
        {
            "model": {
                "range": Wrong(nn.Sequential(nn.ReLU()), ocsquant.NothingToQuantizeError, "Sequential"),
                "not finite": Wrong(NAN_MODEL, ocsquant.NonFiniteError, "0.weight"),
            },
            "recipe": {"range": "W9A9"},
            "calibration": {"range": [torch.zeros(1, 128)]},
            "ignore": {"string": "0", "range": ["nothing"], "regex": ["re:("], "items": [3]},
            "filter_fn": {"range": lambda module, path: "yes"},
            "overrides": {"range": {"nothing": "W8A8"}, "values": {"0": "W9A9"}, "keys": {3: "W8A8"}},
        },
        {"calibration.type": "whatever is not None is out of range", "progress.range": "all three values are right"},
    ),
    "report": Case(ocsquant.report, {"model": QUANTIZED}, {"model": {"range": MODEL}}),
    "save": Case(
        ocsquant.save,
        {"model": QUANTIZED, "path": "file"},
        {
            "model": {"range": MODEL, "split": Wrong(SPLIT, ocsquant.UnsupportedModuleError, "'0'")},
            "path": {"range": Wrong("missing/file", FileNotFoundError, "missing")},
        },
    ),
    "load": Case(
        ocsquant.load,
        {"model": MODEL, "path": "file"},
        {
            "model": {"range": Wrong(nn.Sequential(nn.Linear(128, 32)), ocsquant.SchemaMismatchError, "layer '0'")},
            "path": {"range": Wrong("missing", FileNotFoundError, "missing")},
        },
    ),
    "verify_equivalence": Case(
        ocsquant.verify_equivalence,
        {"model": SPLIT, "reference": MODEL, "inputs": torch.zeros(1, 128)},
        {
            "model": {"range": MODEL},
            "reference": {
                "range": Wrong(nn.Sequential(nn.ReLU()), ocsquant.SchemaMismatchError),
                "size": Wrong(nn.Sequential(nn.Linear(128, 63)), ocsquant.SchemaMismatchError),
                "outputs": Wrong(nn.Sequential(MODEL[0], nn.Linear(64, 3)), ocsquant.SchemaMismatchError),
            },
            "tolerance": {"range": 2.0, "below": -1e-9, "nan": float("nan")},
        },
        {"inputs": "whatever the networks take; what they do not take, they refuse themselves"},
    ),
    "env": Case(ocsquant.env),
    "ops.cpu_isa": Case(ops.cpu_isa),
    "ops.pack_weight": Case(
        ops.pack_weight,
        {"codes": int8(70, 30), "tail": int8(70, 3)},
        {"codes": {"deep": int8(70, 131072)}},
        {"codes.range": "-128, which quantize never makes, is computed exactly too", "tail.range": "as codes"},
    ),
    "ops.unpack_weight": Case(
        ops.unpack_weight,
        {"packed": PACKED, "n": 70, "k": 30, "e": 3},
        {"n": {"range": 200}, "k": {"range": 40, "below": -1, "huge": 2**62}, "e": {"range": 9, "below": -2}},
        {"packed.range": "every byte is a code or a bound", "packed.device": "it is the only tensor"},
    ),
    "ops.quantized_linear": Case(
        ops.quantized_linear,
        {"x": tensor(2, 30), "packed": PACKED, "scale": tensor(70), "bias": tensor(70), "tail_index": INDEX},
        {
            "x": {"rank": tensor(), "size": tensor(2, 40), "half": tensor(2, 30, dtype=torch.float16)},
            "tail_index": {
                "size": Wrong(int32(*range(6)), text="tail columns"),
                "range": int32(1, 5, 30),
                "below": int32(-1, 5, 29),
                "order": int32(5, 1, 29),
            },
            "activation_bits": {"range": 9, "below": 1},
            "max_outliers": {"range": 65, "below": -1},
            "outlier_threshold": {"range": 1.0, "above": 2e6, "nan": float("nan")},
        },
        {
            "x.range": "NaN and Inf give NaN by definition",
            "packed.range": "every byte is a code or a bound",
            "scale.range": "it is only multiplied",
            "bias.range": "it is only added",
        },
    ),
    "ops.fake_quantize_split": Case(
        ops.fake_quantize_split,
        {"x": tensor(4, 6), "scale": tensor(4), "splits": int32(1, 1, 1, 2, 3, 1), "bits": 4},
        {
            "x": {"rank": tensor(6), "size": Wrong(tensor(4, 5), text="splits")},
            "splits": {"range": int32(1, 1, 1, 0, 1, 1)},
            "bits": {"range": 9, "below": 1},
        },
        {"x.range": "NaN passes through by definition", "scale.range": "a training step may push it anywhere"},
    ),
    "ops.dequantize_packed": Case(
        ops.dequantize_packed,
        {"packed": PACKED, "scale": tensor(70), "k": 30, "tail_index": INDEX},
        {
            "k": {"range": 64, "below": -1},
            "scale": {"size": Wrong(tensor(140), text="140")},
            "tail_index": {"size": Wrong(int32(*range(6)), text="e = 6"), "range": Wrong(int32(1, 5, 30), text="30")},
        },
        {"packed.range": "every byte is a code or a bound", "scale.range": "it is only multiplied"},
    ),
}

# A value of each kind, and the words of an annotation that accept it.
KINDS: dict[str, tuple[Any, set[str]]] = {
    "None": (None, {"None"}),
    "bool": (True, {"bool"}),
    "int": (3, {"int", "float"}),
    "float": (2.5, {"float"}),
    "str": ("word", {"str"}),
    "bytes": (b"word", set()),
    "list": ([0.5], {"Iterable", "tuple"}),
    "dict": ({}, {"Mapping"}),
    "tensor": (tensor(2), {"Tensor"}),
    "module": (MODEL, {"Module", "Callable"}),
    "class": (nn.Linear, {"Callable"}),
    "object": (object(), set()),
}
OTHER_DTYPE = {torch.float32: torch.float64, torch.int8: torch.int16, torch.uint8: torch.int8, torch.int32: torch.int64}


def words(parameter: inspect.Parameter) -> set[str]:
    """The outermost words of an annotation: of "Iterable[str] | None", Iterable and None."""
    return set(re.findall(r"\w+", re.sub(r"\[.*?\]+", "", str(parameter.annotation))))


def generated(case: Case, parameter: inspect.Parameter) -> dict[str, Any]:
    """The wrong values that follow from the annotation and, for a tensor, from the right value."""
    accepted = words(parameter)
    if "Any" in accepted:
        return {}
    # torch's parser takes a bool for a number.
    taken = {"bool"} if case.operator and accepted & {"int", "float"} else set()
    values = {
        f"type {kind}": value for kind, (value, fits) in KINDS.items() if not fits & accepted and kind not in taken
    }
    if "Tensor" in accepted and parameter.name in case.right:
        right = case.right[parameter.name]
        values |= {
            "dtype": right.to(OTHER_DTYPE[right.dtype]),
            "rank": right[None],
            "size": torch.cat([right, right]),
            "device": right.to("meta"),
        }
    return values


def wrong_values(name: str, argument: str) -> dict[str, Any]:
    case = CASES[name]
    values = generated(case, inspect.signature(case.call).parameters[argument]) | case.wrong.get(argument, {})
    return {c: v for c, v in values.items() if f"{argument}.{c.split()[0]}" not in case.excused}


def public_callables() -> set[str]:
    results = (ocsquant.Layer, ocsquant.Report, ocsquant.Environment, ocsquant.Equivalence)
    names = {
        name
        for name in ocsquant.__all__
        if callable(thing := getattr(ocsquant, name))
        and not (isinstance(thing, type) and (issubclass(thing, Exception) or thing in results))
    }
    operators = {
        f"ops.{n}"
        for n, f in inspect.getmembers(ops, inspect.isfunction)
        if not n.startswith("_") and f.__module__ == ops.__name__
    }
    return names | operators | {"Recipe.from_json", "Recipe.to_json"}


def arguments() -> list[tuple[str, str]]:
    return [(name, a) for name, case in CASES.items() for a in inspect.signature(case.call).parameters]


def wrong_calls() -> list[Any]:
    return [
        pytest.param(name, argument, category, value, id=f"{name}-{argument}-{category}")
        for name, argument in arguments()
        if argument not in CASES[name].excused
        for category, value in wrong_values(name, argument).items()
    ]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The path "file" of the cases of save and load."""
    monkeypatch.chdir(tmp_path)
    ocsquant.save(QUANTIZED, "file")


def test_every_public_callable_has_a_case():
    assert set(CASES) == public_callables()


@pytest.mark.parametrize(("name", "argument"), arguments())
def test_every_argument_has_its_cases(name, argument):
    """Tensors in all six categories, everything else by type and range, a bool by type alone."""
    case = CASES[name]
    accepted = words(inspect.signature(case.call).parameters[argument])
    needed = {"type", "range"}
    if "Tensor" in accepted:
        needed |= {"dtype", "rank", "size", "device"}
    if accepted == {"bool"}:
        needed -= {"range"}
    tried = {category.split()[0] for category in wrong_values(name, argument)}
    excused = {category for category in needed if f"{argument}.{category}" in case.excused}
    assert argument in case.excused or needed <= tried | excused, needed - tried - excused
    known = {a for n, a in arguments() if n == name}
    assert set(case.wrong) | {key.partition(".")[0] for key in case.excused} <= known


def check_pickling(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert repr(vars(again)) == repr(vars(error))  # by text: NaN equals nothing


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(("name", "argument", "category", "value"), wrong_calls())
def test_wrong_call_names_the_argument_and_changes_nothing(name, argument, category, value):
    case = CASES[name]
    wrong = value if isinstance(value, Wrong) else Wrong(value)
    kind = (RuntimeError, TypeError) if case.operator else ArgumentTypeError if "type " in category else ArgumentError
    call = {**case.right, argument: wrong.value}
    models = [m for m in call.values() if isinstance(m, nn.Module)]
    before = [snapshot(m) for m in models]
    with pytest.raises(wrong.error or kind) as caught:
        case.call(**call)
    error = caught.value
    # torch's parser repeats the whole schema, which names every argument.
    text = str(error).partition("Declaration:")[0]
    assert wrong.text in text if wrong.text else re.search(rf"\b{argument}s?\b", text), text
    if isinstance(error, ArgumentError):
        assert re.fullmatch(rf"{argument}(\[.*\])?", error.arg), error.arg
    if isinstance(error, ocsquant.Error):
        check_pickling(error)
    assert [snapshot(m) for m in models] == before


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("name", CASES)
def test_the_right_call_is_right(name):
    CASES[name].call(**copy.deepcopy(CASES[name].right))


def test_progress_needs_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ArgumentError, match=r"^progress must be"):
        ocsquant.quantize(copy.deepcopy(MODEL), progress=True)


EXAMPLES = {"ArgumentError": ("bits", "2..8", 9), "ArgumentTypeError": ("bits", "2..8", "8")}
EXAMPLES |= {"NonFiniteError": ("a.weight", 3, 7), "UnsupportedModuleError": ("a.b", "because")}


@pytest.mark.parametrize("name", [name for name in ocsquant.__all__ if name.endswith("Error")])
def test_errors_survive_pickling(name):
    check_pickling(getattr(ocsquant, name)(*EXAMPLES.get(name, ("what happened",))))


def test_error_kin():
    assert issubclass(ocsquant.ArgumentError, ValueError)
    assert issubclass(ocsquant.ArgumentTypeError, TypeError)
    assert issubclass(ocsquant.CheckpointError, RuntimeError)
    assert all(
        issubclass(getattr(ocsquant, name), ocsquant.Error) for name in ocsquant.__all__ if name.endswith("Error")
    )
