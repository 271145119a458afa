"""Integer linear layers that quantize their input on the way in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocsquant.ops.library import bind, check_flag, compiled, wants_gradient
from ocsquant.ops.nonlinear import followed
from ocsquant.ops.weights import dequantize_packed

# Going through the packet instead of the overload costs 0.4 us a call.
QUANTIZED_LINEAR = compiled.quantized_linear.default
# What an overload's __call__ calls; not for code that is being compiled, where the overload itself is what is known.
QUANTIZED_LINEAR_BARE = QUANTIZED_LINEAR._op
SCALE_FOLDED_LINEAR = compiled.scale_folded_linear.default
SCALE_FOLDED_LINEAR_BARE = SCALE_FOLDED_LINEAR._op
SCALE_FOLDED_LINEAR_NONLINEAR = compiled.scale_folded_linear_nonlinear.default
QUANTIZED_LINEAR_NARROW = compiled.quantized_linear_narrow.default
QUANTIZED_LINEAR_NONLINEAR = compiled.quantized_linear_nonlinear.default
QUANTIZED_LINEARS = compiled.quantized_linears.default
_quantized_linear_train = compiled.quantized_linear_train.default
_scale_folded_linear_train = compiled.scale_folded_linear_train.default
BYTE = 8  # bits
DEFAULT_THRESHOLD = 4.0


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    tail_index: Tensor | None = None,
    activation_bits: int = 8,
    max_outliers: int = 16,
    outlier_threshold: float = DEFAULT_THRESHOLD,
    group_size: int = 0,
    weight_bits: int = 8,
    zero: Tensor | None = None,
    levels: Tensor | None = None,
    nonlinearity: str = "none",
) -> Tensor:
    """Linear layer with integer weights, quantizing each token of `x` on the way in, with run-time outlier splitting.

    A token's step is min(absmax, outlier_threshold * rms) / (2^(activation_bits - 1) - 1); the few values beyond keep
    larger codes, which is exactly what splitting their channel for this token would give (OCS, arXiv 1901.09504,
    applied at run time). y = float(codes @ weight codes) * (step * scale) + bias, the sum in exact integers.

    Args:
        x: float32 or bfloat16 [..., k].
        packed: from `pack_weight`, for n outputs and k inputs; k plus tail columns at most 131072.
        scale: float32 [n], the weight step of each output; with group_size, [ceil(k / group_size), n]. Groups are
            summed exactly each, multiplied by (step * scale) and added in float32, the first group first.
        bias: float32 [n].
        tail_index: int32 [e], ascending: the input channel that each tail column of `packed` adds to; None with groups.
        activation_bits: 2..8.
        max_outliers: 0..64 values of a token that may lie beyond the range; 0 is plain dynamic quantization.
        outlier_threshold: 2..1e6, in units of the token's root mean square.
        group_size: 0, or a multiple of 16: input channels that share a step of an output's weights.
        weight_bits, zero, levels: what `pack_weight` was given.
        nonlinearity: what y passes before it is written, as of `nonlinear`.

    Returns:
        [..., n] in the dtype of `x`. A token with NaN or Inf gives NaN. The gradient with respect to `x` is that of the
        dequantized weight; nothing else gets one.
    """
    operands = (x, packed, scale, bias, tail_index, activation_bits, max_outliers, outlier_threshold, group_size)
    if wants_gradient(x):
        y = _quantized_linear_train(*operands, weight_bits, zero, levels)
        return followed("quantized_linear", y, nonlinearity)
    if nonlinearity != "none":
        return QUANTIZED_LINEAR_NONLINEAR(*operands, weight_bits, zero, levels, nonlinearity)
    if weight_bits is BYTE and zero is None and levels is None:
        return QUANTIZED_LINEAR(*operands)
    return QUANTIZED_LINEAR_NARROW(*operands, weight_bits, zero, levels)


def scale_folded_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    input_inverse: Tensor,
    input_shift: Tensor | None = None,
    bias: Tensor | None = None,
    tail_index: Tensor | None = None,
    activation_bits: int = 8,
    dynamic: bool = False,
    max_outliers: int = 0,
    outlier_threshold: float = DEFAULT_THRESHOLD,
    symmetric: bool = True,
    weight_bits: int = 8,
    zero: Tensor | None = None,
    levels: Tensor | None = None,
    nonlinearity: str = "none",
) -> Tensor:
    """Linear layer whose weight codes have taken over scales of its input channels (OutlierTune, arXiv 2406.18832).

    With u = (x - input_shift) * input_inverse, y = float(codes @ weight codes) * scale + bias, where the codes are
    rint(u) clamped to +-Q, Q = 2^(activation_bits - 1) - 1: static quantization, one scale per input channel, nothing
    to look up inside the sum. A token of which at most `max_outliers` codes lie beyond Q keeps those, up to 32512: they
    left the calibrated range and are split instead of clipped. With `dynamic`, u is quantized token by token as
    `quantized_linear` does it (SmoothQuant, arXiv 2211.10438). Without `symmetric`, the codes are rint(u) clamped to
    0..2Q + 1, less Q + 1: a range that starts at input_shift, whose part of the result belongs into the bias too.

    Args:
        x: float32 or bfloat16 [..., k].
        packed: from `pack_weight`, the codes of W / input_inverse; k plus tail columns at most 65536 (dynamic: 131072).
        scale: float32 [n].
        input_inverse: float32 [k], one over the step of each input channel.
        input_shift: float32 [k], the middle of each channel's range; its part of the result belongs into the bias.
        bias: float32 [n].
        tail_index, activation_bits, max_outliers, outlier_threshold: as in `quantized_linear`; the threshold counts
            only where `dynamic`, and max_outliers is 0 without `symmetric`.
        weight_bits, zero, levels: what `pack_weight` was given.
        nonlinearity: as in `quantized_linear`.

    Returns:
        [..., n] in the dtype of `x`. A token with NaN or Inf, in x or in u, gives NaN. The gradient with respect to `x`
        is that of the dequantized weight; nothing else gets one.
    """
    check_flag("scale_folded_linear", "dynamic", dynamic)
    check_flag("scale_folded_linear", "symmetric", symmetric)
    operands = (x, packed, scale, input_inverse, input_shift, bias, tail_index, activation_bits)
    form = (dynamic, max_outliers, outlier_threshold, symmetric, weight_bits, zero, levels)
    if wants_gradient(x):
        return followed("scale_folded_linear", _scale_folded_linear_train(*operands, *form), nonlinearity)
    bytes_alone = weight_bits is BYTE and zero is None and levels is None
    # A threshold that counts for nothing must be one all the same: the operator checks it.
    if dynamic or not bytes_alone or nonlinearity != "none" or outlier_threshold is not DEFAULT_THRESHOLD:
        return SCALE_FOLDED_LINEAR_NONLINEAR(*operands, *form, nonlinearity)
    return SCALE_FOLDED_LINEAR(*operands, max_outliers, symmetric)


def _register_fake(name: str, op: str) -> None:
    @torch.library.register_fake(f"ocsquant::{name}")
    def _(*args: Any) -> Tensor:
        a = bind(name, args)
        x = a["x"]
        torch._check(x.dim() >= 1, lambda: f"{op}: x must have at least one dimension, got a scalar")
        return x.new_empty((*x.shape[:-1], a["scale"].shape[-1]))


for _op, _names in {
    "quantized_linear": ("", "_narrow", "_nonlinear", "_train"),
    "scale_folded_linear": ("", "_nonlinear", "_train"),
}.items():
    for _name in _names:
        _register_fake(_op + _name, _op)


@torch.library.register_fake("ocsquant::quantized_linears")
def _(x: Tensor, packed: list[Tensor], scale: list[Tensor], *args: Any) -> list[Tensor]:
    torch._check(x.dim() >= 1, lambda: "quantized_linears: x must have at least one dimension, got a scalar")
    return [x.new_empty((*x.shape[:-1], s.shape[-1])) for s in scale]


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, _, tail_index, _, _, _, ctx.group_size, ctx.weight_bits, zero, levels = inputs
    ctx.k = x.shape[-1]
    ctx.save_for_backward(packed, scale, tail_index, zero, levels)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale, tail_index, zero, levels = ctx.saved_tensors
    form = (ctx.k, tail_index, ctx.group_size, ctx.weight_bits, zero, levels)
    return grad @ dequantize_packed(packed, scale, *form).to(grad.dtype), *[None] * 11


def _folded_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, inverse, _, _, tail_index, *_, ctx.weight_bits, zero, levels = inputs
    ctx.k = x.shape[-1]
    ctx.save_for_backward(packed, scale, inverse, tail_index, zero, levels)


def _folded_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale, inverse, tail_index, zero, levels = ctx.saved_tensors
    weight = dequantize_packed(packed, scale, ctx.k, tail_index, 0, ctx.weight_bits, zero, levels) * inverse
    return grad @ weight.to(grad.dtype), *[None] * 14


torch.library.register_autograd("ocsquant::quantized_linear_train", _linear_backward, setup_context=_linear_setup)
torch.library.register_autograd("ocsquant::scale_folded_linear_train", _folded_backward, setup_context=_folded_setup)
