"""LSTM and GRU layers whose recurrent weights are integers, over all steps of one direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocsquant.ops.library import bind, check_flag, compiled

_quantized_lstm = compiled.quantized_lstm.default
_quantized_gru = compiled.quantized_gru.default


def quantized_lstm(
    gates: Tensor,
    h: Tensor,
    c: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    tail_index: Tensor | None = None,
    activation_bits: int = 8,
    max_outliers: int = 16,
    outlier_threshold: float = 4.0,
    group_size: int = 0,
    weight_bits: int = 8,
    zero: Tensor | None = None,
    levels: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    projection_packed: Tensor | None = None,
    projection_scale: Tensor | None = None,
    projection_tail_index: Tensor | None = None,
    projection_group_size: int = 0,
    projection_weight_bits: int = 8,
    projection_zero: Tensor | None = None,
    projection_levels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of an LSTM layer; each step's last output is quantized token by token as `quantized_linear` does.

    With i, f, g, o = gates[t] + quantized_linear(h, packed, ...): c = sigmoid(f) c + sigmoid(i) tanh(g),
    h = sigmoid(o) tanh(c), times the projection if there is one.

    Args:
        gates: float32 [rows, 4 hidden], what the input adds (W_ih x + b_ih), the rows of a step together.
        h: float32 [batch, outputs], the first state; outputs is hidden without a projection.
        c: float32 [batch, hidden], the first cell state.
        packed, scale, bias, tail_index, group_size, weight_bits, zero, levels: W_hh [4 hidden, outputs] and b_hh, as in
            `quantized_linear`.
        activation_bits, max_outliers, outlier_threshold: as in `quantized_linear`.
        batch_sizes: int64 [steps], rows of each step, not increasing (as of a PackedSequence); None: batch each.
        reverse: the last step first.
        projection_*: W_hr [outputs, hidden] in the form of the other weight.

    Returns:
        float32 [rows, outputs], h after the last step of each sequence, and c.
    """
    check_flag("quantized_lstm", "reverse", reverse)
    return _quantized_lstm(
        gates,
        h,
        c,
        packed,
        scale,
        bias,
        tail_index,
        activation_bits,
        max_outliers,
        outlier_threshold,
        group_size,
        weight_bits,
        zero,
        levels,
        batch_sizes,
        reverse,
        projection_packed,
        projection_scale,
        projection_tail_index,
        projection_group_size,
        projection_weight_bits,
        projection_zero,
        projection_levels,
    )


def quantized_gru(
    gates: Tensor,
    h: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    tail_index: Tensor | None = None,
    activation_bits: int = 8,
    max_outliers: int = 16,
    outlier_threshold: float = 4.0,
    group_size: int = 0,
    weight_bits: int = 8,
    zero: Tensor | None = None,
    levels: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One direction of a GRU layer; each step's last output is quantized token by token as `quantized_linear` does.

    With r, z, n the parts of gates[t] and r', z', n' those of quantized_linear(h, packed, ...):
    fresh = tanh(n + sigmoid(r + r') n'), h = fresh + sigmoid(z + z') (h - fresh).

    Args:
        gates: float32 [rows, 3 hidden], what the input adds (W_ih x + b_ih), the rows of a step together.
        h: float32 [batch, hidden], the first state.
        packed, scale, bias, tail_index, group_size, weight_bits, zero, levels: W_hh [3 hidden, hidden] and b_hh, as in
            `quantized_linear`.
        activation_bits, max_outliers, outlier_threshold: as in `quantized_linear`.
        batch_sizes, reverse: as in `quantized_lstm`.

    Returns:
        float32 [rows, hidden], and h after the last step of each sequence.
    """
    check_flag("quantized_gru", "reverse", reverse)
    return _quantized_gru(
        gates,
        h,
        packed,
        scale,
        bias,
        tail_index,
        activation_bits,
        max_outliers,
        outlier_threshold,
        group_size,
        weight_bits,
        zero,
        levels,
        batch_sizes,
        reverse,
    )


@torch.library.register_fake("ocsquant::quantized_lstm")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = bind("quantized_lstm", args)
    y = a["gates"].new_empty((a["gates"].shape[0], a["h"].shape[1]))
    return y, a["h"].new_empty(a["h"].shape), a["c"].new_empty(a["c"].shape)


@torch.library.register_fake("ocsquant::quantized_gru")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    a = bind("quantized_gru", args)
    return a["gates"].new_empty((a["gates"].shape[0], a["h"].shape[1])), a["h"].new_empty(a["h"].shape)
