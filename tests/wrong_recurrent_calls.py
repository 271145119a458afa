"""Right and wrong values for every argument of quantized_lstm and quantized_gru."""

from typing import Any

import torch
from wrong_operator_calls import EXCUSED_LINEAR, WRONG_LINEAR, WRONG_STORAGE, Case, Wrong, int8, int32, tensor

from ocsquant import ops

BATCH_SIZES = torch.tensor([2, 2, 1, 1])

# Two sequences of four and two steps, 8 hidden units, projected to 5 outputs with a tail column.
LSTM: dict[str, Any] = {
    "gates": tensor(6, 32),
    "h": tensor(2, 5),
    "c": tensor(2, 8),
    "packed": ops.pack_weight(int8(32, 5), int8(32, 2)),
    "scale": tensor(32),
    "bias": tensor(32),
    "tail_index": int32(1, 4),
    "batch_sizes": BATCH_SIZES,
    "projection_packed": ops.pack_weight(int8(5, 8), int8(5, 1)),
    "projection_scale": tensor(5),
    "projection_tail_index": int32(7),
}
GRU: dict[str, Any] = {
    "gates": tensor(6, 24),
    "h": tensor(2, 8),
    "packed": ops.pack_weight(int8(24, 8), int8(24, 2)),
    "scale": tensor(24),
    "bias": tensor(24),
    "tail_index": int32(1, 4),
    "batch_sizes": BATCH_SIZES,
}


def storage(outputs: int, prefix: str = "") -> dict[str, dict[str, Any]]:
    """What is wrong with the storage of a weight of so many outputs at 8 bits."""
    zero = tensor(1, outputs, dtype=torch.uint8)
    wrong = WRONG_STORAGE | {
        "zero": WRONG_STORAGE["zero"] | {"rank": zero[0], "size": torch.cat([zero, zero]), "range": zero},
        "group_size": {"range": 24, "below": -16, "scale": Wrong(16, text="scale")},
    }
    return {prefix + name: values for name, values in wrong.items()}


WRONG: dict[str, dict[str, Any]] = {
    name: WRONG_LINEAR[name] for name in ("activation_bits", "max_outliers", "outlier_threshold")
} | {
    "gates": {"size": Wrong(tensor(7, 32), text="rows of gates")},
    "tail_index": {"size": Wrong(int32(0, 1, 2, 3, 4, 5), text="tail columns"), "range": int32(1, 9)},
    "batch_sizes": {
        "size": torch.tensor([2, 2, 2, 2]),
        "range": torch.tensor([3, 2, 1]),
        "order": torch.tensor([1, 2, 2, 1]),
        "below": torch.tensor([2, 2, 2, 0]),
    },
}
EXCUSED = {
    "gates.range": "NaN and Inf give NaN by definition",
    "h.range": "as gates",
    "packed.range": EXCUSED_LINEAR["packed.range"],
    "scale.range": EXCUSED_LINEAR["scale.range"],
    "bias.range": EXCUSED_LINEAR["bias.range"],
}

RECURRENT_CASES = {
    "ops.quantized_lstm": Case(
        ops.quantized_lstm,
        LSTM,
        WRONG
        | storage(32)
        | storage(5, "projection_")
        | {
            "projection_tail_index": {
                "size": Wrong(int32(0, 1, 2, 3, 4, 5), text="tail columns"),
                "range": int32(8),
            },
            "projection_scale": {"missing": None},
            "scale": {"size": Wrong(tensor(64), text="64")},
        },
        EXCUSED
        | {
            "c.range": "as gates",
            "projection_packed.range": EXCUSED_LINEAR["packed.range"],
            "projection_scale.range": EXCUSED_LINEAR["scale.range"],
        },
    ),
    "ops.quantized_gru": Case(
        ops.quantized_gru,
        GRU,
        WRONG
        | storage(24)
        | {
            "gates": {"size": Wrong(tensor(7, 24), text="rows of gates")},
            "scale": {"size": Wrong(tensor(48), text="48")},
        },
        EXCUSED,
    ),
}
