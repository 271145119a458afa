"""Wrong calls: every argument of every public callable, and a test that no argument is without a case."""

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import ocsquant
from ocsquant import ops

MODEL = nn.Sequential(nn.Linear(128, 64))
SPLIT = ocsquant.Recipe(ocsquant.Weights(bits=None, split=ocsquant.OCS(0.05)), None)
CODES = torch.randint(-127, 128, (70, 30), dtype=torch.int8)
TAIL, INDEX = torch.ones(70, 3, dtype=torch.int8), torch.tensor([1, 5, 29], dtype=torch.int32)


@dataclass
class Case:
    """A callable, a right call, and per argument the wrong values by category."""

    call: Callable[..., Any]
    right: dict[str, Any]
    wrong: dict[str, dict[str, Any]]
    error: type[Exception] | tuple[type[Exception], ...] = ocsquant.ArgumentError
    unchecked: dict[str, str] = field(default_factory=dict)  # argument -> why it has no wrong value


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def tensor_cases(
    right: torch.Tensor, wrong_dtype: torch.dtype, size: tuple[int, ...] | None, rank: tuple[int, ...]
) -> dict:
    """The categories every tensor argument has."""
    cases = {
        "type": 3.5,
        "dtype": right.to(wrong_dtype),
        "rank": tensor(*rank, dtype=right.dtype),
        "device": right.to("meta"),
    }
    return cases if size is None else cases | {"size": tensor(*size, dtype=right.dtype)}


PACKED, SCALE = ops.pack_weight(CODES, TAIL), tensor(70)
OPERATORS = (RuntimeError, TypeError, NotImplementedError)

CASES = {
    "OCS": Case(
        ocsquant.OCS,
        {},
        {
            "expand_ratio": {"type": "much", "range": 1.5, "below": -0.1},
            "max_overhead": {"type": "much", "range": 2.0},
            "shares": {"type": 3, "range": "thirds"},
            "quantization_aware": {"type": "yes"},
            "select": {"type": None, "range": "best"},
        },
    ),
    "Weights": Case(
        ocsquant.Weights,
        {},
        {
            "bits": {"type": "8", "range": 9, "below": 1, "bool": True, "fraction": 4.5},
            "granularity": {"type": 1, "range": "row"},
            "group_size": {"type": "128", "range": 4},
            "symmetric": {"type": 1},
            "clip": {"type": 2, "range": "percentile"},
            "split": {"type": 0.05},
        },
    ),
    "Activations": Case(
        ocsquant.Activations,
        {},
        {
            "bits": {"type": "8", "range": 16},
            "max_outliers": {"type": 1.5, "range": 65, "below": -1},
            "outlier_threshold": {"type": "4", "range": 1.0},
        },
    ),
    "PerToken": Case(
        ocsquant.PerToken,
        {},
        {
            "bits": {"type": None, "range": 1},
            "max_outliers": {"type": "16", "range": 1000},
            "outlier_threshold": {"type": None, "range": float("nan")},
        },
    ),
    "Recipe": Case(
        ocsquant.Recipe,
        {},
        {
            "weights": {"type": 8},
            "activations": {"type": "int8"},
            "overrides": {"type": ["a"], "keys": {3: "W8A8"}, "range": {"a": "W9A9"}, "values": {"a": 8}},
            "ignore": {"type": "lm_head", "items": [3]},
        },
    ),
    "Recipe.from_json": Case(
        ocsquant.Recipe.from_json,
        {"text": ocsquant.Recipe().to_json()},
        {"text": {"type": 3, "range": "{}", "text": "no"}},
    ),
    "quantize": Case(
        lambda model, **kwargs: ocsquant.quantize(
            copy.deepcopy(model) if isinstance(model, nn.Module) else model, **kwargs
        ),
        {"model": MODEL},
        {
            "model": {"type": 3, "class": nn.Linear},
            "recipe": {"type": 8, "range": "W9A9"},
            "calibration": {"range": [torch.zeros(1, 128)]},
            "ignore": {"type": "0", "range": ["nothing"], "regex": ["re:("]},
            "filter_fn": {"type": 3, "answer": lambda module, path: "yes"},
            "overrides": {"type": ["0"], "range": {"nothing": "W8A8"}, "values": {"0": "W9A9"}},
            "simulate": {"type": "yes"},
            "fold_batchnorm": {"type": 1},
            "progress": {"type": "bar"},
        },
    ),
    "report": Case(
        ocsquant.report, {"model": ocsquant.quantize(copy.deepcopy(MODEL))}, {"model": {"type": 3, "range": MODEL}}
    ),
    "save": Case(
        ocsquant.save,
        {"model": ocsquant.quantize(copy.deepcopy(MODEL)), "path": "unused"},
        {"model": {"type": 3, "range": MODEL}, "path": {"type": 3}},
    ),
    "load": Case(ocsquant.load, {"model": MODEL, "path": "unused"}, {"model": {"type": 3}, "path": {"type": 3}}),
    "verify_equivalence": Case(
        ocsquant.verify_equivalence,
        {
            "model": ocsquant.quantize(copy.deepcopy(MODEL), SPLIT),
            "reference": MODEL,
            "inputs": torch.zeros(1, 128),
        },
        {
            "model": {"type": 3, "range": MODEL},
            "reference": {"type": None},
            "tolerance": {"type": "small", "range": 2.0},
        },
        unchecked={"inputs": "whatever the networks take"},
    ),
    "env": Case(ocsquant.env, {}, {}),
    "ops.cpu_isa": Case(ops.cpu_isa, {}, {}),
    "ops.pack_weight": Case(
        ops.pack_weight,
        {"codes": CODES, "tail": TAIL},
        {
            "codes": tensor_cases(CODES, torch.int16, None, (3, 3, 3))
            | {"range": tensor(70, 131072, dtype=torch.int8), "device": None},
            "tail": tensor_cases(TAIL, torch.float32, (69, 3), (70,)),
        },
        OPERATORS,
    ),
    "ops.unpack_weight": Case(
        ops.unpack_weight,
        {"packed": PACKED, "n": 70, "k": 30, "e": 3},
        {
            "packed": tensor_cases(PACKED, torch.float32, (2, 3, 64, 4), (2, 2)) | {"device": None},
            "n": {"type": "70", "range": 200, "below": -1},
            "k": {"type": "30", "range": 40, "huge": 2**62},
            "e": {"type": "3", "range": 9, "below": -2},
        },
        OPERATORS,
    ),
    "ops.quantized_linear": Case(
        ops.quantized_linear,
        {"x": tensor(2, 30), "packed": PACKED, "scale": SCALE, "bias": tensor(70), "tail_index": INDEX},
        {
            "x": tensor_cases(tensor(2, 30), torch.float16, (2, 40), ()) | {"device": None},
            "packed": tensor_cases(PACKED, torch.float32, (2, 3, 64, 4), (2, 2)),
            "scale": tensor_cases(SCALE, torch.float64, (300,), (70, 1)),
            "bias": tensor_cases(tensor(70), torch.float64, (69,), (70, 1)),
            "tail_index": tensor_cases(INDEX, torch.int64, None, (3, 1))
            | {
                "range": torch.tensor([1, 5, 30], dtype=torch.int32),
                "order": torch.tensor([5, 1, 29], dtype=torch.int32),
            },
            "activation_bits": {"type": "8", "range": 9, "below": 1},
            "max_outliers": {"type": "16", "range": 65, "below": -1},
            "outlier_threshold": {"type": "4", "range": 1.0, "nan": float("nan")},
        },
        OPERATORS,
    ),
    "ops.fake_quantize_split": Case(
        ops.fake_quantize_split,
        {"x": tensor(4, 6), "scale": tensor(4), "splits": tensor(6, dtype=torch.int32), "bits": 4},
        {
            "x": tensor_cases(tensor(4, 6), torch.float64, None, (6,)) | {"device": None},
            "scale": tensor_cases(tensor(4), torch.float64, (5,), (4, 1)),
            "splits": tensor_cases(tensor(6, dtype=torch.int32), torch.int64, (5,), (6, 1))
            | {"range": torch.zeros(6, dtype=torch.int32)},
            "bits": {"type": "4", "range": 9, "below": 1},
        },
        OPERATORS,
    ),
    "ops.dequantize_packed": Case(
        ops.dequantize_packed,
        {"packed": PACKED, "scale": SCALE, "k": 30, "tail_index": INDEX},
        {"packed": {"dtype": PACKED.float(), "rank": PACKED[0]}, "k": {"type": "30", "range": 64}},
        OPERATORS,
        {"scale": "its length is n of packed, and packed is named", "tail_index": "its length is e of packed"},
    ),
}


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
    return names | operators | {"Recipe.from_json"}


def wrong_calls() -> list[Any]:
    """One set of parameters per wrong value; "device": None where the others must follow this argument's device."""
    return [
        pytest.param(case, argument, value, id=f"{name}-{argument}-{category}")
        for name, case in CASES.items()
        for argument, values in case.wrong.items()
        for category, value in values.items()
        if not (category == "device" and value is None)
    ]


def test_every_argument_of_every_public_callable_has_a_case():
    assert set(CASES) == public_callables()
    for name, case in CASES.items():
        target = ocsquant.quantize if name == "quantize" else case.call
        assert set(inspect.signature(target).parameters) == set(case.wrong) | set(case.unchecked), name


@pytest.mark.parametrize(("case", "argument", "value"), wrong_calls())
def test_wrong_call_names_the_argument(case, argument, value):
    with pytest.raises(case.error) as caught:
        case.call(**case.right | {argument: value})
    assert argument in str(caught.value), caught.value


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("save", "load")])
def test_the_right_call_is_right(name):
    case = CASES[name]
    case.call(**case.right)


def test_errors_survive_pickling():
    errors = [
        ocsquant.ArgumentError("bits", "2..8", 9),
        ocsquant.ArgumentTypeError("bits", "2..8", "8"),
        ocsquant.NonFiniteError("a.weight", 3, 7),
        ocsquant.UnsupportedModuleError("a.b", "because"),
        ocsquant.CorruptCheckpointError("x"),
        ocsquant.NothingToQuantizeError("nothing"),
    ]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_error_kin():
    assert issubclass(ocsquant.ArgumentError, ValueError)
    assert issubclass(ocsquant.ArgumentTypeError, TypeError)
    assert issubclass(ocsquant.CheckpointError, RuntimeError)
    assert all(
        issubclass(getattr(ocsquant, name), ocsquant.Error) for name in ocsquant.__all__ if name.endswith("Error")
    )


def test_a_wrong_call_leaves_the_model_untouched():
    model = copy.deepcopy(MODEL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for argument, values in CASES["quantize"].wrong.items():
        for value in values.values():
            if argument != "model":
                with pytest.raises(ocsquant.ArgumentError):
                    ocsquant.quantize(model, **{argument: value})
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
