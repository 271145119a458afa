"""Integer convolutions that quantize their input on the way in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocsquant.ops.library import bind, compiled

QUANTIZED_CONV2D = compiled.quantized_conv2d.default


def quantized_conv2d(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    tail_index: Tensor | None = None,
    kernel_h: int = 1,
    kernel_w: int = 1,
    stride_h: int = 1,
    stride_w: int = 1,
    padding_h: int = 0,
    padding_w: int = 0,
    dilation_h: int = 1,
    dilation_w: int = 1,
    activation_bits: int = 8,
    max_outliers: int = 16,
    outlier_threshold: float = 4.0,
    weight_bits: int = 8,
    zero: Tensor | None = None,
    levels: Tensor | None = None,
    groups: int = 1,
    input_inverse: Tensor | None = None,
    input_shift: Tensor | None = None,
    nonlinearity: str = "none",
    residual: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    """2d convolution with integer weights, quantizing each sample of `x` on the way in, group by group.

    The step of a group of a sample's channels is min(absmax, outlier_threshold * rms) / (2^(activation_bits - 1) - 1);
    values beyond keep larger codes, which is exactly what splitting them would give (OCS, arXiv 1901.09504, at run
    time), unless there are more than max_outliers for each of its pixels: then the step is that of absmax.

    A kernel of one element without padding is a linear layer over pixels: each has a step of its own, as a token of
    `quantized_linear`.

    Args:
        x: float32 [samples, channels, height, width], contiguous or channels last in memory (which is faster). Where it
            lies decides how the step is summed up, and may change its last bit.
        packed: from `pack_weight`, for n outputs and kernel_h * kernel_w * channels / groups inputs in this order; with
            tail columns at most 131072.
        scale, bias: float32 [n]; scale [column groups, n] with group_size.
        tail_index, weight_bits, zero, levels: as in `quantized_linear`.
        kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w: at least 1.
        padding_h, padding_w: rows and columns of zeros on each side.
        activation_bits: 2..8.
        max_outliers: 0..64; 0 is plain dynamic quantization.
        outlier_threshold: 2..1e6, in units of the root mean square of the sample's group.
        groups: of channels and of outputs, each convolved alone, in order; divides both.
        input_inverse: float32 [channels] or None. With it nothing of x is measured: the codes are those of step 1 of
            (x - input_shift) * input_inverse, the scales being in the weights already (OutlierTune, arXiv 2406.18832),
            and outlier_threshold does not matter. Values beyond the range keep larger codes, up to max_outliers for
            each pixel of a group of a sample (for kernels of one element: of each pixel); where there are more, all of
            them are clamped. Tail columns included then at most 65536.
        input_shift: float32 [channels] or None, with input_inverse and padding 0 only.
        nonlinearity: of the output, as in `quantized_linear`.
        residual: float32 of the sizes of the output, added to it before the nonlinearity; or None.
        group_size: 0, or a multiple of 16: columns of the weight that share a scale, as in `quantized_linear`; for
            groups 1.

    Returns:
        float32 [samples, n, out height, out width], in memory as `x`. A group of a sample (of a pixel) with NaN or
        Inf gives NaN.
    """
    return QUANTIZED_CONV2D(
        x,
        packed,
        scale,
        bias,
        tail_index,
        kernel_h,
        kernel_w,
        stride_h,
        stride_w,
        padding_h,
        padding_w,
        dilation_h,
        dilation_w,
        activation_bits,
        max_outliers,
        outlier_threshold,
        weight_bits,
        zero,
        levels,
        groups,
        input_inverse,
        input_shift,
        nonlinearity,
        residual,
        group_size,
    )


@torch.library.register_fake("ocsquant::quantized_conv2d")
def _(*args: Any) -> Tensor:
    a = bind("quantized_conv2d", args)
    x = a["x"]
    torch._check(x.dim() == 4, lambda: f"quantized_conv2d: x must have 4 dimensions, got {x.dim()}")
    out = [
        (size + 2 * a[f"padding_{side}"] - a[f"dilation_{side}"] * (a[f"kernel_{side}"] - 1) - 1) // a[f"stride_{side}"]
        + 1
        for side, size in zip("hw", x.shape[2:], strict=True)
    ]
    y = x.new_empty((x.shape[0], a["scale"].shape[-1], *out))
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.to(memory_format=torch.channels_last) if last else y
