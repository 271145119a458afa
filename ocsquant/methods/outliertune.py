"""Scales and shifts of a layer's input channels, folded into its weights, from what calibration saw.

One transform with parameters holds OutlierTune (arXiv 2406.18832: static per channel, symmetrized), SmoothQuant (arXiv
2211.10438: alpha), the shift of Outlier Suppression+ (arXiv 2304.09145) and plain static scales:

    u_k = (x_k - z_k) / s_k,   W'_jk = s_k W_jk,   b'_j = b_j + sum_k z_k W_jk,   y = W' u + b'
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ocsquant.methods.grid import SMALLEST_SCALE, QuantizedWeight, code_limit
from ocsquant.methods.tokens import quantize_tokens

LARGEST_CODE = 32512  # csrc/core/kernels.h: what a value beyond the calibrated range may become
FLOOR = 127  # no channel's factor below the median over this: a dead one must not take the whole row's range


@dataclass(frozen=True)
class InputTransform:
    """inverse float32 [k] is 1 / s; shift float32 [k] or None is z; dynamic: u is quantized per token, not rounded."""

    inverse: Tensor
    shift: Tensor | None
    dynamic: bool

    def scale(self) -> Tensor:
        return 1.0 / self.inverse

    def fold(self, weight: Tensor, groups: int = 1) -> Tensor:
        """W' of the float32 weight [n, k]; of a convolution k is its channels / groups times the kernel's positions."""
        return weight * columns(self.scale(), weight, groups)

    def unfold(self, weight: Tensor, groups: int = 1) -> Tensor:
        """The weight [n, k] that `fold` makes W' of."""
        return weight * columns(self.inverse, weight, groups)

    def apply(self, x: Tensor) -> Tensor:
        """u of float32 [m, k] inputs, which may be the patches of a convolution."""
        return (x if self.shift is None else x - columns(self.shift, x)) * columns(self.inverse, x)

    def operands(
        self, quantized: QuantizedWeight, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """scale, bias, input_inverse and input_shift of `scale_folded_linear`, for a weight that was folded."""
        return quantized.scale[:, 0], self.folded_bias(weight, bias), self.inverse, self.shift

    def folded_bias(self, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor | None:
        """b' of the unfolded float32 weight [n, k]."""
        if self.shift is None:
            return bias
        moved = (weight.double() * columns(self.shift, weight, groups).double()).sum(1)
        return (moved if bias is None else moved + bias.double()).float()


def columns(channels: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Values of a layer's input channels for each entry of its weight [n, k]: [1, k], with groups [n, k]."""
    each = channels.reshape(groups, -1)
    each = each.repeat_interleave(weight.shape[1] // each.shape[1], 1)
    return each if groups == 1 else each.repeat_interleave(weight.shape[0] // groups, 0)


def input_transform(
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    bits: int,
    scale: str,
    alpha: float | None,
    shift: bool,
    copies: Tensor | None = None,
) -> InputTransform:
    """From the calibrated range low..high of each channel, float32 [k], and the float32 weight [n, k].

    scale "channel": s_k = m_k t with m_k = r_k^alpha / max_j|W_jk|^(1 - alpha) and t = max_k(r_k / m_k) / Q, r_k the
    largest magnitude after the shift; alpha = 1 gives OutlierTune's s_k = r_k / Q. "tensor": the same, m_k = 1 where no
    alpha is given. "token": s_k = m_k over its median. With `copies` m_k is their number.
    """
    middle = (low.double() + high.double()) / 2 if shift else torch.zeros_like(low.double())
    reach = torch.maximum(high - middle, middle - low).clamp(min=0.0)
    if alpha is None and scale == "channel":
        alpha = 1.0
    factor = torch.ones_like(reach) if copies is None else copies.double()
    if alpha is not None:
        largest = weight.double().abs().amax(0)
        largest = largest.clamp(min=_floor(largest))
        factor = reach.clamp(min=_floor(reach)) ** alpha / largest ** (1 - alpha)
        factor = factor.clamp(min=_floor(factor))
    step = factor / factor.median() if copies is None else factor
    if scale != "token":
        t = float((reach / factor).max()) / code_limit(bits)
        step = factor * (t if t > 0 else 1.0)
    step = step.clamp(min=SMALLEST_SCALE, max=1 / SMALLEST_SCALE)
    return InputTransform((1.0 / step).float(), middle.float() if shift else None, scale == "token")


def _floor(values: Tensor) -> float:
    median = float(values.median())
    return median / FLOOR if median > 0 else max(float(values.max()), 1.0) / FLOOR


def transformed_codes(
    x: Tensor, transform: InputTransform, bits: int, max_outliers: int, outlier_threshold: float
) -> tuple[Tensor, Tensor]:
    """What `scale_folded_linear` multiplies: whole float32 codes [m, k] and the step [m] of float32 tokens [m, k]."""
    u = transform.apply(x)
    if transform.dynamic:
        return quantize_tokens(u, bits, max_outliers, outlier_threshold)
    limit = code_limit(bits)
    bad = ~u.isfinite().all(1)
    codes = u.clamp(-LARGEST_CODE, LARGEST_CODE).round_()
    clipped = (codes.abs() > limit).sum(1) > max_outliers
    codes[clipped] = codes[clipped].clamp(-limit, limit)
    codes[bad] = 0.0
    return codes, torch.where(bad, torch.nan, x.new_ones(x.shape[0]))
