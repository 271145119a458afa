"""Outlier channel splitting (Zhao et al. 2019, arXiv 1901.09504), sections 3.2 and 3.3, and its integer form.

Splitting input channel k into copies with shares s_1..s_n of its weight leaves the layer's output unchanged and the
largest weight smaller. With quantization-aware shares the copies' codes add up to the code of the unsplit weight, so
the whole effect of a split is a wider code range: r_k Q instead of Q, where 1 / r_k is the largest share.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ocsquant.methods.clip import clip_threshold
from ocsquant.methods.grid import blocked


def split_count(expand_ratio: float, channels: int) -> int:
    """How many splits a layer gets: ceil(r K)."""
    return math.ceil(expand_ratio * channels)


def shares_of(copies: int, shares: str) -> list[float]:
    """The share of each copy: equal ones, or those of the paper's tree, which always halves the largest."""
    if shares == "equal":
        return [1.0 / copies] * copies
    leaves = [-1.0]
    for _ in range(copies - 1):
        half = heapq.heappop(leaves) / 2
        heapq.heappush(leaves, half)
        heapq.heappush(leaves, half)
    return sorted((-leaf for leaf in leaves), reverse=True)


def range_of(copies: int, shares: str) -> int:
    """1 / the largest share: how many times Q the copies' codes reach together."""
    return copies if shares == "equal" else 2 ** (copies.bit_length() - 1)


@dataclass(frozen=True)
class SplitPlan:
    """How often each input channel appears: `copies` int32 [channels], 1 where it is not split."""

    copies: Tensor
    shares: str = "equal"

    def ranges(self) -> Tensor:
        """int32 [channels]: the code range of each channel in units of Q."""
        return torch.tensor([range_of(c, self.shares) for c in self.copies.tolist()], dtype=torch.int32)

    def added(self) -> int:
        """Copies beyond the originals."""
        return int(self.copies.sum()) - self.copies.numel()


def plan_largest(largest: Tensor, splits: int, shares: str = "equal", limit: int | None = None) -> SplitPlan:
    """The paper's choice: split the channel that holds the largest copy, one at a time, without data.

    largest: [channels], the largest |w| of each; limit: no range beyond it.
    """
    copies = [1] * largest.numel()
    heap = [(-value, channel) for channel, value in enumerate(largest.tolist())]
    heapq.heapify(heap)
    while splits > 0 and heap:
        _, channel = heapq.heappop(heap)
        if limit is not None and range_of(copies[channel] + 1, shares) > limit:
            continue
        copies[channel] += 1
        splits -= 1
        heapq.heappush(heap, (-float(largest[channel]) / range_of(copies[channel], shares), channel))
    return SplitPlan(torch.tensor(copies, dtype=torch.int32), shares)


def plan_by_counts(counts: Tensor, splits: int) -> SplitPlan:
    """The paper's choice for activations: the `splits` channels with the most outliers, each in two."""
    copies = torch.ones(counts.numel(), dtype=torch.int32)
    chosen = counts.argsort(descending=True, stable=True)[:splits]
    copies[chosen[counts[chosen] > 0]] = 2
    return SplitPlan(copies)


def plan_by_error(reach: Tensor, power: Tensor, splits: int, limit: int) -> SplitPlan:
    """As many of the largest channels, at most `splits`, as leave the smallest predicted error of the output.

    reach: [channels], the largest |x| of each; power: the squared norm of its weights. Channel k in n_k copies is
    rounded with step n_k s, s following the largest copy: the error is that of sum_k (n_k s)^2 power_k.
    """
    copies = torch.ones(reach.numel(), dtype=torch.int32)
    best, best_error = copies, torch.inf
    for step in range(splits + 1):
        share = reach.double() / copies
        error = float(share.max().square() * (copies.double().square() * power.double()).sum())
        if error < best_error:
            best, best_error = copies.clone(), error
        channel = int(share.argmax())
        if step == splits or copies[channel] == limit:
            break
        copies[channel] += 1
    return SplitPlan(best)


def splits_by_gain(
    magnitude: Tensor,
    bits: int,
    granularity: str,
    group_size: int,
    clip: str,
    limit: int,
    moments: Tensor | None = None,
) -> Iterator[tuple[int, float]]:
    """Channels in the order in which one more equal copy lowers the squared error most, with that gain.

    magnitude: [n, channels], |w| (of a convolution: its largest kernel position). Without clipping the error is that of
    rounding, step^2 / 12 for every weight of a block; with clipping, what the threshold cuts off, found anew as it
    moves. moments: [1 or n, channels], what an error of each channel counts under clip "output".
    """
    whole, channels = granularity == "tensor", magnitude.shape[1]
    size = min(group_size, channels) if granularity == "group" else channels
    if clip == "none":
        yield from _gain_of_steps(magnitude, bits, whole, size, limit)
    else:
        yield from _gain_of_clipping(magnitude, bits, whole, size, clip, limit, moments)


def _gain_of_steps(magnitude: Tensor, bits: int, whole: bool, size: int, limit: int) -> Iterator[tuple[int, float]]:
    n, channels = magnitude.shape
    if whole:
        magnitude = magnitude.amax(0, keepdim=True)
    copies = torch.ones(channels)
    share = blocked(magnitude.clone(), size)  # [rows, groups, size]
    offset = torch.arange(share.shape[1]) * size
    weight = size * (n if whole else 1) / (12 * (2 ** (bits - 1) - 1) ** 2)
    first = torch.arange(channels) // size
    top, at = share.topk(min(2, size), dim=-1)
    while True:
        holder = at[..., 0] + offset
        held = copies[holder.clamp(max=channels - 1)]
        second = top[..., 1] if size > 1 else torch.zeros_like(top[..., 0])
        after = torch.maximum(second, top[..., 0] * held / (held + 1))
        gain = torch.zeros(share.shape[1] * size).index_add_(
            0, holder.reshape(-1), (weight * (top[..., 0].square() - after.square())).reshape(-1)
        )[:channels]
        gain[copies >= limit] = -1.0
        channel = int(gain.argmax())
        if gain[channel] <= 0:
            return
        yield channel, float(gain[channel])
        copies[channel] += 1
        group = int(first[channel])
        share[:, group, channel - group * size] = magnitude[:, channel] / copies[channel]
        moved = (at[:, group] == channel - group * size).any(-1)
        top[moved, group], at[moved, group] = share[moved, group].topk(min(2, size), dim=-1)


def _gain_of_clipping(
    magnitude: Tensor, bits: int, whole: bool, size: int, clip: str, limit: int, moments: Tensor | None
) -> Iterator[tuple[int, float]]:
    n, channels = magnitude.shape
    copies = torch.ones(channels)
    counts = torch.ones_like(magnitude) if moments is None else moments.expand_as(magnitude)
    counted = blocked(counts, size)
    # The threshold moves slowly: it is searched again after every eighth of a percent of the channels.
    batch = max(1, channels // 800)
    while True:
        wide = blocked(copies.expand(n, channels).contiguous(), size)
        share = blocked(magnitude / copies, size)
        threshold = clip_threshold(share, wide, bits, clip, whole, counted)
        bound = threshold[:, :, None].expand_as(share).reshape(n, -1)[:, :channels]
        lost = (magnitude - copies * bound).clamp(min=0).square()
        after = (magnitude - (copies + 1) * bound).clamp(min=0).square()
        gain = (lost - after).mul_(counts).sum(0)
        gain[copies >= limit] = -1.0
        best = gain.topk(min(batch, channels))
        if best.values[0] <= 0:
            return
        for channel, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            if value > 0:
                yield channel, value
                copies[channel] += 1


def expand_weight(w: Tensor, plan: SplitPlan, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The split layer written out: weights [n, channels + added, ...] and the input channel each column reads.

    Without `step` each copy is its share of the weight (naive). With `step` (broadcast over w) the shares are
    quantization-aware: of two halves, (w - step/2) / 2 and (w + step/2) / 2; an exact zero stays zero.
    """
    columns, index = [w.clone()], list(range(w.shape[1]))
    for channel, copies in enumerate(plan.copies.tolist()):
        if copies == 1:
            continue
        parts = _parts(w[:, channel], copies, plan.shares, None if step is None else step.expand_as(w)[:, channel])
        columns[0][:, channel] = parts[0]
        columns.extend(part[:, None] for part in parts[1:])
        index.extend([channel] * (copies - 1))
    return torch.cat(columns, dim=1), torch.tensor(index)


def _parts(w: Tensor, copies: int, shares: str, step: Tensor | None) -> list[Tensor]:
    if shares == "equal":
        if step is None:
            return [w / copies] * copies
        shift = [(i - (copies - 1) / 2) for i in range(copies)]
        return [torch.where(w == 0, w, (w + s * step) / copies) for s in shift]
    parts = [(1.0, w)]
    for _ in range(copies - 1):
        largest = max(range(len(parts)), key=lambda i: parts[i][0])
        share, value = parts.pop(largest)
        half = torch.zeros_like(w) if step is None else torch.where(value == 0, torch.zeros_like(w), step / 4)
        parts += [(share / 2, value / 2 - half), (share / 2, value / 2 + half)]
    return [value for _, value in parts]


def naive_codes(w: Tensor, scale: Tensor, plan: SplitPlan, limit: int) -> Tensor:
    """The sum of the codes of naive copies: what the paper's first variant computes, kept for its tables.

    w [n, channels], scale broadcast over it. int16 [n, channels].
    """
    total = torch.zeros_like(w)
    for copies in plan.copies.unique().tolist():
        columns = plan.copies == copies
        for share in shares_of(copies, plan.shares):
            value = (w[:, columns] * share) * (1.0 / scale.expand_as(w)[:, columns])
            total[:, columns] += value.round().clamp(-limit, limit)
    return total.to(torch.int16)
