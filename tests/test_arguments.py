"""Wrong calls, generated from the signatures: every argument of every public callable, by category.

Types come from the annotations, a tensor's dtype, rank, size and device from a right value; CASES adds ranges and what
is particular. An argument or category that is neither tried nor excused fails test_every_argument_has_its_cases.
"""

import copy
import inspect
import pickle
import re
import sys
from typing import Any

import pytest
import torch
from networks import snapshot
from torch import nn
from wrong_calls import CASES, MODEL, QUANTIZED, SEEN, TOGETHER
from wrong_operator_calls import Case, Wrong, tensor

import ocsquant
from ocsquant import ArgumentError, ArgumentTypeError, Recipe, ops

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
OTHER_DTYPE = {
    torch.float32: torch.float64,
    torch.int8: torch.int16,
    torch.uint8: torch.int8,
    torch.int32: torch.int64,
    torch.int64: torch.int32,
}


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


METHODS = ("from_json", "to_json", "merge", "save", "load")


def public_callables() -> set[str]:
    results = (
        ocsquant.Option,
        ocsquant.Sensitivity,
        ocsquant.Layer,
        ocsquant.Report,
        ocsquant.Environment,
        ocsquant.Equivalence,
    )
    names = {
        name
        for name in ocsquant.__all__
        if callable(thing := getattr(ocsquant, name))
        and not (isinstance(thing, type) and (issubclass(thing, Exception) or thing in results))
    }
    operators = {f"ops.{n}" for n, f in inspect.getmembers(ops, inspect.isfunction) if not n.startswith("_")}
    training = {f"qat.{n}" for n in ocsquant.qat.__all__ if n != "QATLinear"}
    methods = {f"{c.__name__}.{n}" for c in (Recipe, ocsquant.Statistics) for n in METHODS if hasattr(c, n)}
    return names | operators | training | methods


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
    SEEN.save("statistics")


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
        assert re.fullmatch(rf"{argument}(\[.*\]|\.\w+)?", error.arg), error.arg
    if isinstance(error, ocsquant.Error):
        check_pickling(error)
    assert [snapshot(m) for m in models] == before


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("name", CASES)
def test_the_right_call_is_right(name):
    CASES[name].call(**copy.deepcopy(CASES[name].right))


@pytest.mark.parametrize(("argument", "call"), TOGETHER)
def test_values_that_do_not_go_together(argument, call):
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.arg == argument


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
