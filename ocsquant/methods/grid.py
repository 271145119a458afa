"""The quantizer of weights: codes on a uniform grid, with a wider range for split channels, or indices of levels.

code = clamp(rint(w * (1 / scale)), -r_k Q, r_k Q), Q = 2^(bits - 1) - 1, r_k the range of input channel k (1: not
split); with a zero point clamp(rint(w * (1 / scale)) + zero, 0, 2^bits - 1); with levels the nearest of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ocsquant.methods.clip import clip_range, clip_threshold

SMALLEST_SCALE = 2.0**-120  # below it 1 / scale and scale * code leave float32's normal range
TAIL_LIMIT = 127  # a tail column is int8
ROWS_OF = 2**20  # values that are quantized at a time, where rows do not depend on each other


def code_limit(bits: int) -> int:
    """Q, the largest code of a symmetric grid of `bits` bits."""
    return 2 ** (bits - 1) - 1


def largest_range(bits: int) -> int:
    """How many times Q the base code and one int8 tail code reach together."""
    return (code_limit(bits) + TAIL_LIMIT) // code_limit(bits)


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized [n, k] matrix.

    codes: int16 [n, k]; scale: float32 [n, groups]; zero: float32 [n, groups] or None (symmetric);
    ranges: int32 [k]; bits: of a stored code; group_size (k where there is one group);
    levels: int8 [1 or n, entries], ascending, that codes are indices of, or None (codes are the numbers themselves).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    ranges: Tensor
    bits: int
    group_size: int
    levels: Tensor | None = None

    def encode(self, w: Tensor, group: int, ranges: Tensor) -> Tensor:
        """Whole float32 codes [n, m] of values [n, m] of one group, on this weight's grid; ranges: [m]."""
        scale = self.scale[:, group, None]
        if self.levels is not None:
            return nearest_level(w * (1.0 / scale), self.levels).float()
        if self.zero is not None:
            return _uniform_codes(w, scale, self.zero[:, group, None], 2**self.bits - 1)
        return _uniform_codes(w, scale, None, ranges * float(code_limit(self.bits)))

    def decode(self, codes: Tensor, group: int) -> Tensor:
        """float32 [n, m], what codes of one group stand for."""
        numbers = self._numbers(codes)
        if self.zero is not None:
            numbers = numbers - self.zero[:, group, None]
        return numbers * self.scale[:, group, None]

    def _numbers(self, codes: Tensor) -> Tensor:
        return codes.float() if self.levels is None else _look_up(self.levels, codes).float()

    def integers(self) -> Tensor:
        """int16 [n, k]: what an integer kernel multiplies with: codes less their zero points, or their levels."""
        if self.levels is not None:
            return _look_up(self.levels, self.codes).to(torch.int16)
        if self.zero is None:
            return self.codes
        zero = self.zero.to(torch.int16).repeat_interleave(self.group_size, 1)
        return self.codes - zero[:, : self.codes.shape[1]]

    def storage(self) -> tuple[int, Tensor | None, Tensor | None]:
        """weight_bits, zero and levels of `ops.pack_weight` for `integers`; tables of every row take whole bytes."""
        wide = self.bits > 6 or (self.levels is not None and self.levels.shape[0] > 1)
        if wide:
            return 8, None, None
        zero = None if self.zero is None else self.zero.T.to(torch.uint8).contiguous()
        return self.bits + self.bits % 2, zero, None if self.levels is None else self.levels[0]

    def dequantize(self) -> Tensor:
        """float32 [n, k]."""
        blocks = blocked(self._numbers(self.codes), self.group_size)
        if self.zero is not None:
            blocks = blocks - self.zero[:, :, None]
        return (blocks * self.scale[:, :, None]).reshape(blocks.shape[0], -1)[:, : self.codes.shape[1]]

    def rows(self, first: int, last: int) -> QuantizedWeight:
        """The same of rows [first, last) alone."""
        levels = self.levels
        return replace(
            self,
            codes=self.codes[first:last],
            scale=self.scale[first:last],
            zero=None if self.zero is None else self.zero[first:last],
            levels=levels if levels is None or len(levels) == 1 else levels[first:last],
        )

    def base_and_tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """base int8 [n, k], tail int8 [n, e], tail_index int32 [e]: base + tail gives the integers.

        Codes of a uniform grid are cut at +-Q; channels whose codes all fit need no tail column.
        """
        integers = self.integers()
        limit = code_limit(self.bits) if self.levels is None and self.zero is None else TAIL_LIMIT
        low, high = integers.amin(0), integers.amax(0)
        index = ((low < -limit) | (high > limit)).nonzero()[:, 0]
        wide = integers[:, index]
        base = integers.to(torch.int8)
        base[:, index] = wide.clamp(-limit, limit).to(torch.int8)
        return base, (wide - base[:, index]).to(torch.int8), index.to(torch.int32)


def _look_up(levels: Tensor, codes: Tensor) -> Tensor:
    return levels.expand(codes.shape[0], -1).gather(1, codes.long())


def blocked(w: Tensor, group_size: int) -> Tensor:
    """[n, k] as [n, groups, group_size], zeros behind the last columns."""
    n, k = w.shape
    missing = -k % group_size
    return (torch.nn.functional.pad(w, (0, missing)) if missing else w).reshape(n, -1, group_size)


def usable_scale(scale: Tensor) -> Tensor:
    """A scale of an all-zero row (or one too small for float32) becomes 1."""
    return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)


def quantize_weight(
    w: Tensor,
    bits: int,
    granularity: str = "channel",
    group_size: int = 128,
    symmetric: bool = True,
    clip: str = "none",
    ranges: Tensor | None = None,
    step_threshold: Tensor | None = None,
    moments: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a float32 [n, k] matrix; `ranges` int32 [k] widens the codes of split channels.

    `step_threshold` [n, groups], instead of `clip`, gives the magnitude that code Q stands for; `moments` [1 or
    n, k], the second moments of the inputs, weigh the errors of clip "output".
    """
    n, k = w.shape
    size = group_length(k, granularity, group_size)
    rows = n if granularity == "tensor" else max(1, ROWS_OF // max(k, 1))

    def quantized(own: slice) -> QuantizedWeight:
        threshold = None if step_threshold is None else step_threshold[own]
        weighing = moments if moments is None or len(moments) == 1 else moments[own]
        return _quantize_rows(w[own], bits, size, symmetric, clip, ranges, threshold, weighing, granularity == "tensor")

    if n <= rows:
        return quantized(slice(n))
    codes, scale = torch.empty(n, k, dtype=torch.int16), w.new_empty(n, -(-k // size))
    zero = None if symmetric else torch.empty_like(scale)
    for i in range(0, n, rows):
        own = slice(i, i + rows)
        part = quantized(own)
        codes[own], scale[own] = part.codes, part.scale
        if zero is not None and part.zero is not None:
            zero[own] = part.zero
    return replace(part, codes=codes, scale=scale, zero=zero)


def _quantize_rows(
    w: Tensor,
    bits: int,
    size: int,
    symmetric: bool,
    clip: str,
    ranges: Tensor | None,
    threshold: Tensor | None,
    moments: Tensor | None,
    whole: bool,
) -> QuantizedWeight:
    n, k = w.shape
    limit = code_limit(bits)
    if ranges is None and symmetric and clip == "none" and not whole and threshold is None:
        blocks = blocked(w, size)
        low, high = blocks.aminmax(dim=-1)
        scale = usable_scale(torch.maximum(high, -low) / limit)
        codes = _flat(_uniform_codes(blocks, scale[:, :, None], None, limit), k)
        return QuantizedWeight(codes, scale, None, torch.ones(k, dtype=torch.int32), bits, size)
    ranges = torch.ones(k, dtype=torch.int32) if ranges is None else ranges
    weighing = None if moments is None else blocked(moments.expand(n, k), size)
    if not symmetric:
        return _quantize_asymmetric(w, bits, size, clip, ranges, weighing)
    share, wide = blocked(w.abs() / ranges, size), blocked(ranges.expand(n, k).float(), size)
    if threshold is None:
        threshold = clip_threshold(share, wide, bits, clip, whole, weighing)
    scale = usable_scale(threshold.float() / limit)
    codes = _flat(_uniform_codes(blocked(w, size), scale[:, :, None], None, wide * limit), k)
    return QuantizedWeight(codes, scale, None, ranges, bits, size)


def _flat(codes: Tensor, k: int) -> Tensor:
    """int16 [n, k] of float codes in blocks."""
    return codes.reshape(codes.shape[0], -1)[:, :k].to(torch.int16)


def _uniform_codes(w: Tensor, scale: Tensor, zero: Tensor | None, limit: Any) -> Tensor:
    """Whole float32 codes, scale and zero broadcast over w: within +-limit, or with zero points in 0..limit."""
    codes = (w * (1.0 / scale)).round_()
    return codes.clamp_(-limit, limit) if zero is None else codes.add_(zero).clamp_(0, limit)


def group_length(k: int, granularity: str, group_size: int) -> int:
    """Input columns that share a scale."""
    return min(group_size, k) if granularity == "group" else max(k, 1)


def _quantize_asymmetric(
    w: Tensor, bits: int, size: int, clip: str, ranges: Tensor, moments: Tensor | None
) -> QuantizedWeight:
    blocks = blocked(w, size)  # the zeros behind the last columns widen no range: 0 is always inside
    low, high = blocks.amin(-1).clamp(max=0.0), blocks.amax(-1).clamp(min=0.0)
    low, high = clip_range(blocks, low, high, bits, clip, moments)
    scale = usable_scale((high - low) / (2**bits - 1))
    zero = (-low * (1.0 / scale)).round_()
    codes = _uniform_codes(blocks, scale[:, :, None], zero[:, :, None], 2**bits - 1)
    return QuantizedWeight(_flat(codes, w.shape[1]), scale, zero, ranges, bits, size)


def quantize_levels(w: Tensor, levels: Tensor, scale: Tensor, bits: int, size: int) -> QuantizedWeight:
    """Each weight the nearest of int8 `levels` [1 or n, entries] times `scale` [n, groups] of `size` columns."""
    n, k = w.shape
    units = (blocked(w, size) * (1.0 / scale)[:, :, None]).reshape(n, -1)[:, :k]
    ranges = torch.ones(k, dtype=torch.int32)
    return QuantizedWeight(nearest_level(units, levels), scale, None, ranges, bits, size, levels)


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """int16 indices of the nearest of `levels` [books, count] for values [n, m], books 1 or n."""
    entries = levels.float()
    middle = (entries[:, 1:] + entries[:, :-1]) / 2
    if entries.shape[0] == 1:
        return torch.bucketize(values.contiguous(), middle[0]).to(torch.int16)
    return torch.searchsorted(middle, values.contiguous()).to(torch.int16)


def weight_sqnr(pairs: Iterable[tuple[Tensor, QuantizedWeight]]) -> float:
    """Signal to quantization noise in dB of weights [n, k] and their quantized forms; inf where nothing was lost."""
    noise = signal = 0.0
    for w, quantized in pairs:
        rows = max(1, ROWS_OF // max(w.shape[1], 1))
        for i in range(0, w.shape[0], rows):
            part = w[i : i + rows]
            noise += _power(quantized.rows(i, i + rows).dequantize().sub_(part))
            signal += _power(part)
    return 10 * math.log10(signal / noise) if noise and signal else math.inf


def _power(t: Tensor) -> float:
    """Sum of squares; in float32, which is four times as fast, where that does not leave its range."""
    flat = t.flatten()
    power = float(flat.dot(flat))
    return power if 1e-30 < power < math.inf else float(flat.double().square().sum())
