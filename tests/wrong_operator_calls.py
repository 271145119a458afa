"""Right and wrong values for every argument of every operator, and what such a case is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ocsquant import ops


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def int8(*shape: int) -> torch.Tensor:
    return tensor(*shape, dtype=torch.int8)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


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
        return self.call.__module__.startswith(ops.__name__)


PACKED = ops.pack_weight(int8(70, 30), int8(70, 3))
INDEX = int32(1, 5, 29)


# What the two linear operators share.
WRONG_LINEAR: dict[str, dict[str, Any]] = {
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
    "nonlinearity": {"range": "softplus"},
}
EXCUSED_LINEAR = {
    "x.range": "NaN and Inf give NaN by definition",
    "packed.range": "every byte is a code or a bound",
    "scale.range": "it is only multiplied",
    "bias.range": "it is only added",
}

# Beside a right call at 8 bits; test_low_bits.py has those at fewer.
WRONG_STORAGE: dict[str, dict[str, Any]] = {
    "weight_bits": {"range": 5, "below": 1},
    "zero": {
        "dtype": tensor(1, 70),
        "rank": tensor(70, dtype=torch.uint8),
        "size": tensor(2, 70, dtype=torch.uint8),
        "range": tensor(1, 70, dtype=torch.uint8),
        "device": tensor(1, 70, dtype=torch.uint8).to("meta"),
    },
    "levels": {
        "dtype": tensor(16),
        "rank": int8(1, 16),
        "size": int8(17),
        "range": int8(16),
        "device": int8(16).to("meta"),
    },
}
WRONG_GROUPS: dict[str, Any] = {"range": 24, "below": -16, "tail": Wrong(16, text="tail")}

OPERATOR_CASES = {
    "ops.cpu_isa": Case(ops.cpu_isa),
    "ops.pack_weight": Case(
        ops.pack_weight,
        {"codes": int8(70, 30), "tail": int8(70, 3)},
        {"codes": {"deep": int8(70, 131072)}, **WRONG_STORAGE, "group_size": WRONG_GROUPS},
        {"codes.range": "-128, which quantize never makes, is computed exactly too", "tail.range": "as codes"},
    ),
    "ops.unpack_weight": Case(
        ops.unpack_weight,
        {"packed": PACKED, "n": 70, "k": 30, "e": 3},
        {
            "n": {"range": 200},
            "k": {"range": 40, "below": -1, "huge": 2**62},
            "e": {"range": 9, "below": -2},
            **WRONG_STORAGE,
            "group_size": WRONG_GROUPS,
        },
        {"packed.range": "every byte is a code or a bound", "packed.device": "it is the only tensor"},
    ),
    "ops.pack_codes": Case(
        ops.pack_codes,
        {"codes": tensor(3, 5, dtype=torch.uint8), "bits": 4},
        {
            "codes": {
                "size": Wrong(tensor(3, 5, dtype=torch.uint8) * 16, text="codes"),
                "range": tensor(3, 5, dtype=torch.uint8) * 255,
            },
            "bits": {"range": 9, "below": 1},
        },
        {"codes.device": "it is the only tensor"},
    ),
    "ops.dequantize_weight": Case(
        ops.dequantize_weight,
        {
            "packed": tensor(3, 8, dtype=torch.uint8),
            "scale": tensor(3, 2),
            "k": 16,
            "bits": 4,
            "group_size": 8,
            "rows": torch.tensor([0, 2]),
        },
        {
            "packed": {"size": Wrong(tensor(6, 8, dtype=torch.uint8), text="scale")},
            "k": {"range": 17, "below": -1, "huge": 2**62},
            "bits": {"range": 9, "below": 1},
            "group_size": {"range": 0, "below": -8, "other": Wrong(2**62, text="scale")},
            "zero": {
                "dtype": tensor(3, 2, dtype=torch.float64),
                "rank": tensor(3),
                "size": tensor(3, 1),
                "device": tensor(3, 2).to("meta"),
            },
            "levels": {
                "dtype": tensor(1, 16),
                "rank": tensor(16, dtype=torch.int8),
                "size": tensor(2, 16, dtype=torch.int8),
                "entries": tensor(1, 17, dtype=torch.int8),
                "device": int8(1, 16).to("meta"),
            },
            "rows": {"range": torch.tensor([3]), "below": torch.tensor([-1]), "size": torch.tensor([0, 70])},
        },
        {
            "packed.range": "every byte holds codes",
            "scale.range": "it is only multiplied",
            "zero.range": "it is only subtracted",
            "levels.range": "every int8 is a level",
        },
    ),
    "ops.quantized_linear": Case(
        ops.quantized_linear,
        {"x": tensor(2, 30), "packed": PACKED, "scale": tensor(70), "bias": tensor(70), "tail_index": INDEX},
        WRONG_LINEAR
        | WRONG_STORAGE
        | {
            "group_size": {
                "range": 24,
                "below": -16,
                "scale": Wrong(16, text="scale"),
                "huge": Wrong(2**60, text="scale"),
            }
        },
        EXCUSED_LINEAR,
    ),
    "ops.scale_folded_linear": Case(
        ops.scale_folded_linear,
        {
            "x": tensor(2, 30),
            "packed": PACKED,
            "scale": tensor(70),
            "input_inverse": tensor(30),
            "input_shift": tensor(30),
            "bias": tensor(70),
            "tail_index": INDEX,
            "max_outliers": 2,
        },
        WRONG_LINEAR | WRONG_STORAGE | {"symmetric": {"outliers": Wrong(False, text="symmetric")}},
        EXCUSED_LINEAR
        | {
            "input_inverse.range": "what is not finite after it gives NaN",
            "input_shift.range": "as input_inverse",
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
    "ops.fake_quantize_clip": Case(
        ops.fake_quantize_clip,
        {"x": tensor(4, 6), "clip_neg": -tensor(1), "clip_pos": tensor(1), "bits": 4},
        {"bits": {"range": 9, "below": 1}},
        {
            "x.rank": "any is right",
            "x.size": "any is right",
            "x.range": "NaN passes through and Inf is clipped, by definition",
            "clip_neg.rank": "one entry is one entry",
            "clip_neg.range": "a training step may push it anywhere",
            "clip_pos.rank": "one entry is one entry",
            "clip_pos.range": "as clip_neg",
        },
    ),
    "ops.nonlinear": Case(
        ops.nonlinear,
        {"x": tensor(4, 6), "nonlinearity": "gelu"},
        {"nonlinearity": {"range": "softplus"}},
        {"x.rank": "any", "x.size": "any", "x.range": "NaN gives NaN", "x.device": "it is the only tensor"},
    ),
    "ops.kurtosis": Case(
        ops.kurtosis,
        {"y": tensor(4, 6)},
        {"y": {"range": tensor(4, 0)}},
        {"y.rank": "any above 0", "y.size": "any is right", "y.device": "it is the only tensor"},
    ),
    "ops.dequantize_packed": Case(
        ops.dequantize_packed,
        {"packed": PACKED, "scale": tensor(70), "k": 30, "tail_index": INDEX},
        {
            "k": {"range": 64, "below": -1},
            "scale": {"size": Wrong(tensor(140), text="140")},
            "tail_index": {"size": Wrong(int32(*range(6)), text="e = 6"), "range": Wrong(int32(1, 5, 30), text="30")},
            **WRONG_STORAGE,
            "group_size": {"range": -16, "scale": Wrong(16, text="scale")},
        },
        {"packed.range": "every byte is a code or a bound", "scale.range": "it is only multiplied"},
    ),
}
