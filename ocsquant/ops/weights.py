"""Weights as the kernels store them: packing, unpacking, dequantizing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocsquant.layout import packed_shape
from ocsquant.ops.library import bind, check_devices, check_there, check_vector, compiled


def pack_weight(
    codes: Tensor,
    tail: Tensor | None = None,
    weight_bits: int = 8,
    zero: Tensor | None = None,
    levels: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    """Pack int8 weight codes into the layout the kernels read.

    Args:
        codes: int8 [n, k], one row per output: the integers that are multiplied, within -127..127. Below 8 bits they
            are stored as numbers 0..2^weight_bits - 1: code + 2^(weight_bits - 1), code + zero, or an index of levels.
        tail: int8 [n, e], codes to be added to those of the channels that `tail_index` of `quantized_linear` names.
        weight_bits: 8, 6, 4 or 2 a code takes; the tail's always take 8.
        zero: uint8 [1, n], or with group_size [ceil(k / group_size), n], below 2^weight_bits; None at 8 bits.
        levels: int8 [at most 2^weight_bits], all that codes may be; None at 8 bits and beside zero.
        group_size: 0, or a multiple of 16: input channels that share a zero point; 0 beside a tail.

    Returns:
        uint8 [ceil(n / 64), blocks, 64, 4]: panels of 64 outputs, in each the codes in blocks of 4 channels (below 8
        bits of so many more), then bounds that tell the kernels where 16-bit sums suffice.
    """
    check_there("pack_weight", "codes", codes)
    return compiled.pack_weight(codes, tail, weight_bits, zero, levels, group_size)


def unpack_weight(
    packed: Tensor,
    n: int,
    k: int,
    e: int = 0,
    weight_bits: int = 8,
    zero: Tensor | None = None,
    levels: Tensor | None = None,
    group_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """The codes int8 [n, k] and tail int8 [n, e] that `pack_weight` was given, with the same other arguments."""
    check_there("unpack_weight", "packed", packed)
    return compiled.unpack_weight(packed, n, k, e, weight_bits, zero, levels, group_size)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes side by side in as few bytes as they need, for weights that are only stored quantized.

    Args:
        codes: uint8 [n, k], below 2^bits.
        bits: 2..8.

    Returns:
        uint8 [n, ceil(k / 8) * bits]: eight codes in `bits` bytes, the first in the lowest bits.
    """
    check_there("pack_codes", "codes", codes)
    return compiled.pack_codes(codes, bits)


def dequantize_weight(
    packed: Tensor,
    scale: Tensor,
    k: int,
    bits: int,
    group_size: int,
    zero: Tensor | None = None,
    levels: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The float32 matrix that packed codes stand for: (code - zero) * scale, or levels[code] * scale.

    Args:
        packed: from `pack_codes`, for n rows of k codes of `bits` bits.
        scale: float32 [n, ceil(k / group_size)], one for every `group_size` columns.
        k, bits, group_size: columns; 2..8 bits of a code; at least 1.
        zero: float32, of the shape of `scale`, or None: 2^(bits - 1).
        levels: int8 [1 or n, at most 2^bits], what codes are indices of (at most 6 bits), or None. An index beyond them
            gives 0.
        rows: int64 [m], which rows to give, in this order; None: all.

    Returns:
        float32 [n or m, k].
    """
    check_there("dequantize_weight", "packed", packed)
    return compiled.dequantize_weight(packed, scale, k, bits, group_size, zero, levels, rows)


def dequantize_packed(
    packed: Tensor,
    scale: Tensor,
    k: int,
    tail_index: Tensor | None,
    group_size: int = 0,
    weight_bits: int = 8,
    zero: Tensor | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """The float32 [n, k] matrix that a packed weight stands for; the arguments are those of `quantized_linear`."""
    op = "dequantize_packed"
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 0:
        raise RuntimeError(f"{op}: group_size must be a whole number of at least 0, got {group_size!r}")
    groups = -(-k // group_size) if group_size else 1
    rows = scale[0] if group_size and isinstance(scale, Tensor) and scale.dim() == 2 else scale
    check_vector(op, "scale", rows, torch.float32)
    if group_size and scale.shape[0] != groups:
        raise RuntimeError(f"{op}: scale must have {groups} groups for group_size {group_size}, got {scale.shape[0]}")
    if tail_index is not None:
        check_vector(op, "tail_index", tail_index, torch.int32)
    e = 0 if tail_index is None else tail_index.shape[0]
    codes, tail = unpack_weight(packed, rows.shape[0], k, e, weight_bits, zero, levels, group_size)
    check_devices(op, packed=packed, scale=scale, tail_index=tail_index)
    total = codes.float()
    if tail_index is not None:
        total.index_add_(1, tail_index.long(), tail.float())
    if group_size:
        return total * scale.T.repeat_interleave(group_size, 1)[:, :k]
    return total * scale[:, None]


@torch.library.register_fake("ocsquant::pack_weight")
def _(*args: Any) -> Tensor:
    a = bind("pack_weight", args)
    (n, k), e = a["codes"].shape, 0 if a["tail"] is None else a["tail"].shape[1]
    return a["codes"].new_empty(packed_shape(n, k, e, a["weight_bits"]), dtype=torch.uint8)


@torch.library.register_fake("ocsquant::unpack_weight")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    a = bind("unpack_weight", args)
    return tuple(a["packed"].new_empty((a["n"], a[size]), dtype=torch.int8) for size in "ke")


@torch.library.register_fake("ocsquant::pack_codes")
def _(codes: Tensor, bits: int) -> Tensor:
    n, k = codes.shape
    return codes.new_empty((n, -(-k // 8) * bits), dtype=torch.uint8)


@torch.library.register_fake("ocsquant::dequantize_weight")
def _(*args: Any) -> Tensor:
    a = bind("dequantize_weight", args)
    rows = a["packed"] if a["rows"] is None else a["rows"]
    return a["scale"].new_empty((rows.shape[0], a["k"]))
