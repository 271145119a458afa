"""The integer product of the kernels in plain PyTorch: the same bits, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EXACT = 2.0**24  # up to here float32 holds every whole number
EXACT_OPERAND = 2.0**11  # and up to here what a GPU may make of it in a product (TensorFloat-32)
VALUES = 2**22  # of the weight that are widened at a time


@torch.autocast("cpu", enabled=False)
def quantized_product(
    codes: Tensor, step: Tensor, integers: Tensor, scale: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    """float32 [m, n]: what `ocsquant.ops.quantized_linear` makes of whole float32 codes [m, k] and their step [m].

    integers: int16 [n, k], scale: float32 [n, groups] of `group_size` columns, bias: float32 [n] or None. Sums of whole
    numbers do not depend on the order as long as the float type holds them all; each group is rounded once.
    """
    y: Tensor | None = None
    for group in range(scale.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        sums = _exact_sums(codes[:, columns], integers[:, columns])
        part = sums * (step[:, None] * scale[:, group])
        y = part if y is None else y + part
    assert y is not None
    return y if bias is None else y + bias


def _exact_sums(codes: Tensor, integers: Tensor) -> Tensor:
    """float32 [m, n], each sum rounded once."""
    if codes.numel() == 0 or integers.numel() == 0:
        return codes.new_zeros(codes.shape[0], integers.shape[0])
    sizes, largest = codes.abs(), float(integers.abs().max())
    exact = float(sizes.sum(1).max()) * largest <= EXACT and max(float(sizes.max()), largest) <= EXACT_OPERAND
    dtype = torch.float32 if exact else torch.float64
    left, rows = codes.to(dtype), max(1, VALUES // integers.shape[1])
    parts = [F.linear(left, part.to(dtype)).float() for part in integers.split(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
