"""The Python face of torch.ops.ocsquant: loads the library and tells torch what each operator does.

The operators raise RuntimeError for wrong arguments: their checks run in C++, once, on every call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocsquant.errors import BuildMismatchError
from ocsquant.layout import packed_shape


def _load() -> None:
    library = Path(__file__).parent / "_C.so"
    if hasattr(torch.ops.ocsquant, "cpu_isa") and str(library) not in torch.ops.loaded_libraries:
        raise BuildMismatchError(
            f"another copy of ocsquant's library is already in this process; not loading {library}"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        detail = error.__cause__ or error
        raise BuildMismatchError(
            f"ocsquant's library {library} cannot be loaded by torch {torch.__version__}: {detail}"
        ) from error
    torch.ops.ocsquant.cpu_isa()  # an unknown OCSQUANT_ISA is an error now, not at the first layer


_load()
_ops = torch.ops.ocsquant
# Going through the packet instead of the overload costs 0.4 us a call.
_quantized_linear = _ops.quantized_linear.default
_quantized_linear_train = _ops.quantized_linear_train.default
_scale_folded_linear = _ops.scale_folded_linear.default
_scale_folded_linear_train = _ops.scale_folded_linear_train.default
_fake_quantize_split = _ops.fake_quantize_split.default


def cpu_isa() -> tuple[str, str]:
    """The level the kernels run at ("avx512_vnni", "avx_vnni", "avx2" or "scalar"), and why that one."""
    return _ops.cpu_isa()


def pack_weight(codes: Tensor, tail: Tensor | None = None) -> Tensor:
    """Pack int8 weight codes into the layout the kernels read.

    Args:
        codes: int8 [n, k], one row per output, within -127..127.
        tail: int8 [n, e], codes to be added to those of the channels that `tail_index` of `quantized_linear` names.

    Returns:
        uint8 [ceil(n / 64), b + ceil(b / 1024), 64, 4] with b = ceil(k / 4) + ceil(e / 4): panels of 64 outputs, in
        each the codes + 128 in blocks of 4 channels, then bounds that tell the kernels where 16-bit sums suffice.
    """
    _check_there("pack_weight", "codes", codes)
    return _ops.pack_weight(codes, tail)


def unpack_weight(packed: Tensor, n: int, k: int, e: int = 0) -> tuple[Tensor, Tensor]:
    """The codes int8 [n, k] and tail int8 [n, e] that `pack_weight` was given."""
    _check_there("unpack_weight", "packed", packed)
    return _ops.unpack_weight(packed, n, k, e)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes side by side in as few bytes as they need, for weights that are only stored quantized.

    Args:
        codes: uint8 [n, k], below 2^bits.
        bits: 2..8.

    Returns:
        uint8 [n, ceil(k / 8) * bits]: eight codes in `bits` bytes, the first in the lowest bits.
    """
    _check_there("pack_codes", "codes", codes)
    return _ops.pack_codes(codes, bits)


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
    _check_there("dequantize_weight", "packed", packed)
    return _ops.dequantize_weight(packed, scale, k, bits, group_size, zero, levels, rows)


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    tail_index: Tensor | None = None,
    activation_bits: int = 8,
    max_outliers: int = 16,
    outlier_threshold: float = 4.0,
) -> Tensor:
    """Linear layer with integer weights, quantizing each token of `x` on the way in, with run-time outlier splitting.

    A token's step is min(absmax, outlier_threshold * rms) / (2^(activation_bits - 1) - 1); the few values beyond keep
    larger codes, which is exactly what splitting their channel for this token would give (OCS, arXiv 1901.09504,
    applied at run time). y = float(codes @ weight codes) * (step * scale) + bias, the sum in exact integers.

    Args:
        x: float32 or bfloat16 [..., k].
        packed: from `pack_weight`, for n outputs and k inputs; k plus tail columns at most 131072.
        scale: float32 [n], the weight step of each output.
        bias: float32 [n].
        tail_index: int32 [e], ascending: the input channel that each tail column of `packed` adds to.
        activation_bits: 2..8.
        max_outliers: 0..64 values of a token that may lie beyond the range; 0 is plain dynamic quantization.
        outlier_threshold: 2..1e6, in units of the token's root mean square.

    Returns:
        [..., n] in the dtype of `x`. A token with NaN or Inf gives NaN. The gradient with respect to `x` is that of the
        dequantized weight; nothing else gets one.
    """
    op = _quantized_linear_train if _trains(x) else _quantized_linear
    return op(x, packed, scale, bias, tail_index, activation_bits, max_outliers, outlier_threshold)


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
    outlier_threshold: float = 4.0,
) -> Tensor:
    """Linear layer whose weight codes have taken over scales of its input channels (OutlierTune, arXiv 2406.18832).

    With u = (x - input_shift) * input_inverse, y = float(codes @ weight codes) * scale + bias, where the codes are
    rint(u) clamped to +-Q, Q = 2^(activation_bits - 1) - 1: static quantization, one scale per input channel, nothing
    to look up inside the sum. A token of which at most `max_outliers` codes lie beyond Q keeps those, up to 32512: they
    left the calibrated range and are split instead of clipped. With `dynamic`, u is quantized token by token as
    `quantized_linear` does it (SmoothQuant, arXiv 2211.10438).

    Args:
        x: float32 or bfloat16 [..., k].
        packed: from `pack_weight`, the codes of W / input_inverse; k plus tail columns at most 65536 (dynamic: 131072).
        scale: float32 [n].
        input_inverse: float32 [k], one over the step of each input channel.
        input_shift: float32 [k], the middle of each channel's range; its part of the result belongs into the bias.
        bias: float32 [n].
        tail_index, activation_bits, max_outliers, outlier_threshold: as in `quantized_linear`; the threshold counts
            only where `dynamic`.

    Returns:
        [..., n] in the dtype of `x`. A token with NaN or Inf, in x or in u, gives NaN. The gradient with respect to `x`
        is that of the dequantized weight; nothing else gets one.
    """
    if dynamic is not True and dynamic is not False:  # the dispatcher takes None and numbers for it
        raise RuntimeError(f"scale_folded_linear: dynamic must be True or False, got {dynamic!r}")
    op = _scale_folded_linear_train if _trains(x) else _scale_folded_linear
    return op(
        x,
        packed,
        scale,
        input_inverse,
        input_shift,
        bias,
        tail_index,
        activation_bits,
        dynamic,
        max_outliers,
        outlier_threshold,
    )


def _trains(x: object) -> bool:
    return getattr(x, "requires_grad", False) and torch.is_grad_enabled()  # anything but a tensor: the op says so


def fake_quantize_split(x: Tensor, scale: Tensor, splits: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize a weight whose input channel c is split in splits[c] copies (quantization-aware OCS).

    y = clamp(rint(x / s), -n_c Q, n_c Q) * s with Q = 2^(bits - 1) - 1, computed with 1/s in float32. NaN passes
    through. Gradients are straight-through: dx is the incoming gradient g inside the range and 0 outside; the scale's
    is the sum of g * (rint(x/s) - x/s) inside and +-n_c Q g outside (LSQ, arXiv 1902.08153, without its optional
    factor).

    Args:
        x: float32 or bfloat16 [n, channels, ...]: a linear or convolution weight.
        scale: float32, a scalar or [n], positive.
        splits: int32 [channels], at least 1.
        bits: 2..8.
    """
    return _fake_quantize_split(x, scale, splits, bits)


def dequantize_packed(packed: Tensor, scale: Tensor, k: int, tail_index: Tensor | None) -> Tensor:
    """The float32 [n, k] matrix that a packed weight stands for."""
    _check_vector("dequantize_packed", "scale", scale, torch.float32)
    if tail_index is not None:
        _check_vector("dequantize_packed", "tail_index", tail_index, torch.int32)
    codes, tail = unpack_weight(packed, scale.shape[0], k, 0 if tail_index is None else tail_index.shape[0])
    _check_devices("dequantize_packed", packed=packed, scale=scale, tail_index=tail_index)
    total = codes.float()
    if tail_index is not None:
        total.index_add_(1, tail_index.long(), tail.float())
    return total * scale[:, None]


def _check_there(op: str, name: str, tensor: object) -> None:
    """Without any tensor the dispatcher finds no kernel, and its error names no argument."""
    if tensor is None:
        raise RuntimeError(f"{op}: {name} must be a tensor, got None")


def _check_vector(op: str, name: str, tensor: object, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() != 1:
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise RuntimeError(f"{op}: {name} must be a {dtype} vector, got {got}")


def _check_devices(op: str, **tensors: Tensor | None) -> None:
    """A meta tensor among CPU ones brings the dispatcher here instead of to the kernel, which checks the rest."""
    (first, device), *others = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    for name, other in others:
        if other != device:
            raise RuntimeError(f"{op}: {name} must be on {device}, as {first} is, got {other}")


@torch.library.register_fake("ocsquant::pack_weight")
def _(codes: Tensor, tail: Tensor | None = None) -> Tensor:
    _check_devices("pack_weight", codes=codes, tail=tail)
    n, k = codes.shape
    e = 0 if tail is None else tail.shape[1]
    return codes.new_empty(packed_shape(n, k, e), dtype=torch.uint8)


@torch.library.register_fake("ocsquant::unpack_weight")
def _(packed: Tensor, n: int, k: int, e: int = 0) -> tuple[Tensor, Tensor]:
    return packed.new_empty((n, k), dtype=torch.int8), packed.new_empty((n, e), dtype=torch.int8)


@torch.library.register_fake("ocsquant::pack_codes")
def _(codes: Tensor, bits: int) -> Tensor:
    n, k = codes.shape
    return codes.new_empty((n, -(-k // 8) * bits), dtype=torch.uint8)


@torch.library.register_fake("ocsquant::dequantize_weight")
def _(
    packed: Tensor,
    scale: Tensor,
    k: int,
    bits: int,
    group_size: int,
    zero: Tensor | None = None,
    levels: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    _check_devices("dequantize_weight", packed=packed, scale=scale, zero=zero, levels=levels, rows=rows)
    return scale.new_empty(((packed if rows is None else rows).shape[0], k))


def _linear_fake(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None, tail_index: Tensor | None = None, *_: Any
) -> Tensor:
    _check_devices("quantized_linear", x=x, packed=packed, scale=scale, bias=bias, tail_index=tail_index)
    torch._check(x.dim() >= 1, lambda: "quantized_linear: x must have at least one dimension, got a scalar")
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


torch.library.register_fake("ocsquant::quantized_linear", _linear_fake)
torch.library.register_fake("ocsquant::quantized_linear_train", _linear_fake)


def _folded_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    input_inverse: Tensor,
    input_shift: Tensor | None = None,
    bias: Tensor | None = None,
    tail_index: Tensor | None = None,
    *_: Any,
) -> Tensor:
    vectors = {"input_inverse": input_inverse, "input_shift": input_shift, "bias": bias, "tail_index": tail_index}
    _check_devices("scale_folded_linear", x=x, packed=packed, scale=scale, **vectors)
    torch._check(x.dim() >= 1, lambda: "scale_folded_linear: x must have at least one dimension, got a scalar")
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


torch.library.register_fake("ocsquant::scale_folded_linear", _folded_fake)
torch.library.register_fake("ocsquant::scale_folded_linear_train", _folded_fake)


@torch.library.register_fake("ocsquant::fake_quantize_split")
def _(x: Tensor, scale: Tensor, splits: Tensor, bits: int) -> Tensor:
    _check_devices("fake_quantize_split", x=x, scale=scale, splits=splits)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("ocsquant::fake_quantize_split_backward")
def _(grad: Tensor, x: Tensor, scale: Tensor, splits: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    _check_devices("fake_quantize_split_backward", grad=grad, x=x, scale=scale, splits=splits)
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(scale)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, _, tail_index, *_ = inputs
    ctx.k = x.shape[-1]
    ctx.save_for_backward(packed, scale, tail_index)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale, tail_index = ctx.saved_tensors
    dx = grad @ dequantize_packed(packed, scale, ctx.k, tail_index).to(grad.dtype)
    return dx, None, None, None, None, None, None, None


def _folded_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, inverse, _, _, tail_index, *_ = inputs
    ctx.k = x.shape[-1]
    ctx.save_for_backward(packed, scale, inverse, tail_index)


def _folded_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale, inverse, tail_index = ctx.saved_tensors
    weight = dequantize_packed(packed, scale, ctx.k, tail_index) * inverse
    return grad @ weight.to(grad.dtype), *[None] * 10


def _fake_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, splits, ctx.bits = inputs
    ctx.save_for_backward(x, scale, splits)


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, splits = ctx.saved_tensors
    dx, dscale = _ops.fake_quantize_split_backward(grad, x, scale, splits, ctx.bits)
    return dx, dscale, None, None


torch.library.register_autograd("ocsquant::quantized_linear_train", _linear_backward, setup_context=_linear_setup)
torch.library.register_autograd("ocsquant::scale_folded_linear_train", _folded_backward, setup_context=_folded_setup)
torch.library.register_autograd(
    "ocsquant::fake_quantize_split", _fake_quantize_backward, setup_context=_fake_quantize_setup
)
