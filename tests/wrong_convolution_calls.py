"""Right and wrong values for every argument of quantized_conv2d."""

from typing import Any

import torch
from wrong_operator_calls import EXCUSED_LINEAR, WRONG_LINEAR, WRONG_STORAGE, Case, Wrong, int8, int32, tensor

from ocsquant import ops

WINDOW = {
    f"{name}_{side}": {"range": least - 1, "huge": 1 << 20}
    for name, least in {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}.items()
    for side in "hw"
}
ZERO = tensor(1, 70, dtype=torch.uint8)
WRONG: dict[str, dict[str, Any]] = {
    "x": {"size": Wrong(tensor(2, 6, 8, 8), text="channel of x"), "small": tensor(2, 3, 1, 8)},
    "scale": {"size": Wrong(tensor(140), text="140")},
    "tail_index": {"size": Wrong(int32(*range(6)), text="tail columns"), "range": int32(1, 30)},
    **{name: WRONG_LINEAR[name] for name in ("activation_bits", "max_outliers", "outlier_threshold")},
    **WRONG_STORAGE,
    "zero": WRONG_STORAGE["zero"] | {"rank": ZERO[0], "size": torch.cat([ZERO, ZERO]), "range": ZERO},
    **WINDOW,
    "groups": {"range": 0, "channels": 2},
    "nonlinearity": {"range": Wrong("swish", text="none, relu")},
    "residual": {"size": Wrong(tensor(2, 70, 6, 5), text="sizes of the output, 2 x 70 x 6 x 6")},
    **{name: {"size": Wrong(tensor(4), text="3 entries")} for name in ("input_inverse", "input_shift")},
    "group_size": {"range": 24, "below": -16, "scale": Wrong(16, text="scale")},
}

CONVOLUTION_CASES = {
    "ops.quantized_conv2d": Case(
        ops.quantized_conv2d,
        {
            "x": tensor(2, 3, 8, 8),
            "packed": ops.pack_weight(int8(70, 27), int8(70, 2)),
            "scale": tensor(70),
            "bias": tensor(70),
            "tail_index": int32(1, 26),
            "kernel_h": 3,
            "kernel_w": 3,
            "input_inverse": tensor(3).abs() + 1,
            "input_shift": tensor(3),
            "residual": tensor(2, 70, 6, 6),
        },
        WRONG,
        {
            **EXCUSED_LINEAR,
            "input_inverse.range": "what is not finite after it gives NaN",
            "input_shift.range": "as input_inverse",
            "residual.range": "any value may be added",
        },
    ),
}
