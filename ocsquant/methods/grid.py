"""The quantizer of weights: codes on a uniform grid, with a wider range for split channels.

code = clamp(rint(w * (1 / scale)), -r_k Q, r_k Q), Q = 2^(bits - 1) - 1, r_k the range of input channel k (1: not
split).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ocsquant.methods.clip import clip_threshold

SMALLEST_SCALE = 2.0**-120  # below it 1 / scale and scale * code leave float32's normal range
TAIL_LIMIT = 127  # a tail column is int8


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
    ranges: int32 [k]; bits, group_size (k where there is one group).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    ranges: Tensor
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """float32 [n, k]."""
        blocks = blocked(self.codes.float(), self.group_size)
        if self.zero is not None:
            blocks = blocks - self.zero[:, :, None]
        return (blocks * self.scale[:, :, None]).reshape(blocks.shape[0], -1)[:, : self.codes.shape[1]]

    def base_and_tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """base int8 [n, k] within +-Q, tail int8 [n, e], tail_index int32 [e]: base + tail gives the codes.

        Channels whose codes all fit the base need no tail column.
        """
        limit = code_limit(self.bits)
        base = self.codes.clamp(-limit, limit)
        rest = self.codes - base
        index = rest.any(dim=0).nonzero()[:, 0]
        return base.to(torch.int8), rest[:, index].to(torch.int8).contiguous(), index.to(torch.int32)


def blocked(w: Tensor, group_size: int) -> Tensor:
    """[n, k] as [n, groups, group_size], zeros behind the last columns."""
    n, k = w.shape
    return torch.nn.functional.pad(w, (0, -k % group_size)).reshape(n, -1, group_size)


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
) -> QuantizedWeight:
    """Quantize a float32 [n, k] matrix; `ranges` int32 [k] widens the codes of split channels.

    `step_threshold` [n, groups], instead of `clip`, gives the magnitude that code Q stands for.
    """
    n, k = w.shape
    ranges = torch.ones(k, dtype=torch.int32) if ranges is None else ranges
    size = min(group_size, k) if granularity == "group" else max(k, 1)
    if not symmetric:
        return _quantize_asymmetric(w, bits, size, ranges)
    limit = code_limit(bits)
    share, wide = blocked(w.abs() / ranges, size), blocked(ranges.expand(n, k).float(), size)
    if step_threshold is None:
        step_threshold = clip_threshold(share, wide, bits, clip, granularity == "tensor")
    scale = usable_scale(step_threshold.float() / limit)
    codes = (blocked(w, size) * (1.0 / scale)[:, :, None]).round_()
    codes = codes.clamp_(-wide * limit, wide * limit).reshape(n, -1)[:, :k]
    return QuantizedWeight(codes.to(torch.int16), scale, None, ranges, bits, size)


def _quantize_asymmetric(w: Tensor, bits: int, size: int, ranges: Tensor) -> QuantizedWeight:
    n, k = w.shape
    blocks, valid = blocked(w, size), blocked(torch.ones_like(w), size) > 0
    low = torch.where(valid, blocks, torch.zeros(())).amin(-1).clamp(max=0.0)
    high = torch.where(valid, blocks, torch.zeros(())).amax(-1).clamp(min=0.0)
    scale = usable_scale((high - low) / (2**bits - 1))
    inverse = 1.0 / scale
    zero = (-low * inverse).round_()
    codes = (blocks * inverse[:, :, None]).round_().add_(zero[:, :, None]).clamp_(0, 2**bits - 1)
    return QuantizedWeight(codes.reshape(n, -1)[:, :k].to(torch.int16), scale, zero, ranges, bits, size)


def weight_sqnr(w: Tensor, dequantized: Tensor) -> float:
    """Signal to quantization noise in dB; inf where nothing was lost."""
    noise = (w.double() - dequantized.double()).square().sum()
    signal = w.double().square().sum()
    if noise == 0 or signal == 0:
        return float("inf")
    return float(10 * torch.log10(signal / noise))
