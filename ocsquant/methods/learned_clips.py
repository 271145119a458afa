"""A layer's input on the 2^bits levels between two clips (activation regularisation, arXiv 2404.03605), and where
those clips best start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ocsquant.methods.grid import QuantizedWeight
from ocsquant.methods.products import quantized_product

VALUES = 1 << 16  # of a sample that the search looks at
STEPS = 24  # positions of each clip in a round of the search, to either side
ROUNDS = 4


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")  # whatever the default is


@dataclass(frozen=True)
class ClippedInput:
    """u = x_k i_k, i powers of two, becomes q step + low, where q = rint((clamp(u, low, high) - low) / step).

    There are 2^bits levels. low, high, step and inverse_step are float32 scalars; input_inverse is i, float32 [k], or
    None for ones. The numbers are those of `ocsquant.ops.fake_quantize_clip`.
    """

    low: Tensor
    high: Tensor
    step: Tensor
    inverse_step: Tensor
    bits: int
    input_inverse: Tensor | None = None

    @classmethod
    def between(
        cls, low: Tensor, high: Tensor, bits: int, align_zero: bool, input_inverse: Tensor | None = None
    ) -> ClippedInput:
        """Of two float32 clips of one entry each."""
        low, high = low.detach().float().reshape(()), high.detach().float().reshape(())
        levels = _scalar(2**bits - 1)
        least = (_scalar(1e-6) * torch.maximum(low.abs(), high.abs())).clamp(min=1e-12)
        high = torch.where(high - low < least, low + least, high)
        width = high - low
        step, inverse = width / levels, levels / width
        if align_zero:
            low = torch.round(low * inverse) * step
            high = low + width
        return cls(low, high, step, inverse, bits, input_inverse)

    def apply(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with, for float32 inputs [m, k]."""
        return self._levels(x) * self.step + self.low

    def _levels(self, x: Tensor) -> Tensor:
        if self.input_inverse is not None:
            x = x * self.input_inverse
        place = (torch.minimum(torch.maximum(x, self.low), self.high) - self.low) * self.inverse_step
        return place.round().clamp(max=float(2**self.bits - 1))

    def unfold(self, weight: Tensor) -> Tensor:
        """The weight itself: it is scaled with its input already."""
        return weight

    def offset(self, quantized: QuantizedWeight) -> Tensor:
        """float64 [n]: what each output has beside the product of the codes."""
        middle = self.low.double() + 2 ** (self.bits - 1) * self.step.double()
        return quantized.dequantize().double().sum(1) * middle

    def product(
        self, x: Tensor, integers: Tensor, scale: Tensor, group_size: int, offset: Tensor, bias: Tensor | None
    ) -> Tensor:
        """float32 [m, n]: what `scale_folded_linear` makes of float32 x [m, k], on any device.

        integers, scale, group_size: as of `quantized_product`; offset: of `offset`; bias: float32 [n] or None.
        """
        codes, total = self._levels(x) - 2.0 ** (self.bits - 1), offset if bias is None else offset + bias.double()
        step = torch.where(x.isfinite().all(1), 1.0, torch.nan)  # as of every kernel: such a token gives NaN
        codes = torch.where(step.isnan()[:, None], 0.0, codes)
        return quantized_product(codes, step, integers, scale * self.step, group_size, total.float())

    def operands(
        self, quantized: QuantizedWeight, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """scale, bias, input_inverse and input_shift of `scale_folded_linear`.

        The grid's lower end adds the same to every output of a row; the sum is that of the quantized weights, so that
        the result is the one training saw.
        """
        ones = (
            torch.ones(quantized.codes.shape[1], dtype=torch.float32)
            if self.input_inverse is None
            else self.input_inverse
        )
        moved = self.offset(quantized)
        total = moved if bias is None else moved + bias.double()
        # Dividing by a power of two and multiplying again loses nothing: the codes stay those of `apply`.
        return quantized.scale[:, 0] * self.step, total.float(), self.inverse_step * ones, self.low / ones


def percentile_clips(values: Tensor, share: float = 0.001) -> tuple[float, float]:
    """The `share` and 1 - `share` quantiles of float32 values."""
    ordered = values.flatten().sort().values
    last = ordered.numel() - 1
    return float(ordered[round(share * last)]), float(ordered[round((1 - share) * last)])


def mse_clips(values: Tensor, bits: int, align_zero: bool) -> tuple[float, float]:
    """The clips of least squared error on float32 values: one moved at a time, over an ever finer range."""
    flat = values.flatten()
    flat = flat[:: -(-flat.numel() // VALUES)]
    low, high = float(flat.min()), float(flat.max())
    reach = high - low
    if reach == 0.0:
        return low, high

    def error(a: float, b: float) -> float:
        grid = ClippedInput.between(_scalar(a), _scalar(b), bits, align_zero)
        return float((grid.apply(flat) - flat).square().sum(dtype=torch.float64))

    best, span = error(low, high), reach
    for _ in range(ROUNDS):
        for _ in range(2):  # each clip's best place depends on the other's
            for upper in (True, False):
                middle = high if upper else low
                for i in range(-STEPS, STEPS + 1):
                    moved = middle + span * i / STEPS
                    a, b = (low, moved) if upper else (moved, high)
                    if b - a > reach * 1e-3 and (found := error(a, b)) < best:
                        best, low, high = found, a, b
        span *= 3 / STEPS
    return low, high
