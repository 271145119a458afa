"""SplitQuant (Song & Lin 2025, arXiv 2501.12428): weights cut by value in parts that each have a grid of their own.

The paper replaces a layer by one layer per part, each with zeros where the others have values. With the zeros masked,
the parts are one matrix whose entries come from parts * 2^bits levels: one codebook, one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ocsquant.methods.codebook import absmax_scale, as_levels, kmeans
from ocsquant.methods.grid import QuantizedWeight, quantize_levels

EXHAUSTIVE = 512  # values up to which every pair of boundaries is tried; beyond, a grid that is made finer
CANDIDATES, REFINE = 128, 16


def quantize_splitquant(
    w: Tensor, bits: int, granularity: str, parts: int, clusters: str, ranges: str, boundaries: str
) -> QuantizedWeight:
    """A float32 [n, k] matrix as one codebook per layer or per row; the arguments are those of `ocsquant.SplitQuant`.

    The result's `bits` are those of a stored index.
    """
    scale = absmax_scale(w, granularity, w.shape[1])
    units = w / scale
    values = units if clusters == "row" else units.reshape(1, -1)
    bounds = cluster_bounds(values, parts) if boundaries == "kmeans" else optimal_bounds(values, bits)
    if ranges == "row":
        own = absmax_scale(w, "channel", w.shape[1])
        bounds, values, scale = bounds * (scale / own), w / own, own
    levels = as_levels(part_levels(values, bounds, bits))
    return quantize_levels(w, levels, scale, (levels.shape[1] - 1).bit_length(), w.shape[1])


def cluster_bounds(values: Tensor, parts: int) -> Tensor:
    """The paper's boundaries [rows, parts - 1]: midpoints between the k-means centres of each row of values."""
    centres = kmeans(values, parts)
    return (centres[:, 1:] + centres[:, :-1]) / 2


def part_levels(values: Tensor, bounds: Tensor, bits: int) -> Tensor:
    """Levels [rows, parts * 2^bits], ascending: each part's range, evenly divided.

    values: [rows, m]; bounds: [1 or rows, parts - 1]. A part without values repeats its boundary.
    """
    rows = values.shape[0]
    part = part_of(values, bounds)
    steps = torch.linspace(0, 1, 2**bits, dtype=torch.float64)
    edge = torch.cat([bounds[:, :1], bounds], 1).expand(rows, -1)
    levels = []
    for p in range(bounds.shape[1] + 1):
        inside = part == p
        low = torch.where(inside, values, torch.inf).amin(1).double()
        high = torch.where(inside, values, -torch.inf).amax(1).double()
        low, high = (torch.where(end.isfinite(), end, edge[:, p]) for end in (low, high))
        levels.append(low[:, None] + (high - low)[:, None] * steps)
    return torch.cat(levels, 1)


def part_of(values: Tensor, bounds: Tensor) -> Tensor:
    """Which part each value belongs to: lower w <= b_0, ..., upper w >= b_last as in the paper."""
    return (values[:, :, None] > bounds.to(values.dtype)[:, None, :]).sum(-1)


def optimal_bounds(values: Tensor, bits: int) -> Tensor:
    """Three parts with the least squared error of quantizing each to 2^bits levels over its range: bounds [rows, 2].

    Exact by trying all pairs up to 512 distinct values a row; beyond, all pairs of 128 quantiles and the k-means
    boundaries, then again around the best pair until neighbours are adjacent. Never worse than k-means.
    """
    start = cluster_bounds(values, 3)
    return torch.stack([_optimal_of_row(row, first, bits) for row, first in zip(values.double(), start, strict=True)])


def _optimal_of_row(row: Tensor, start: Tensor, bits: int) -> Tensor:
    ordered, counts = row.unique(return_counts=True)
    m = ordered.numel()
    if m < 3:
        return start
    errors = _RangeErrors(ordered, counts.double(), 2**bits)
    cut = torch.searchsorted(ordered, start, right=True).clamp(1, m - 1)  # parts begin at these indices
    width = 1 if m <= EXHAUSTIVE else m // CANDIDATES
    grids = [torch.arange(1, m, width)] * 2
    while True:
        best = _best_pair(errors, *(torch.cat([grid, own]) for grid, own in zip(grids, cut.split(1), strict=True)))
        if width == 1:
            return (ordered[best - 1] + ordered[best]) / 2
        width = max(1, width // REFINE)
        reach = torch.arange(-2 * REFINE, 2 * REFINE + 1) * width
        grids, cut = [(centre + reach).clamp(1, m - 1) for centre in best], best


def _best_pair(errors: _RangeErrors, first: Tensor, second: Tensor) -> Tensor:
    """The pair i <= j with the least error of [0, i), [i, j), [j, m)."""
    below = errors(torch.zeros_like(first), first)
    above = errors(second, torch.full_like(second, errors.size))
    i, j = torch.meshgrid(first, second, indexing="ij")
    total = (below[:, None] + above)[i <= j] + errors(i[i <= j], j[i <= j])
    best = total.argmin()
    return torch.stack([i[i <= j][best], j[i <= j][best]])


class _RangeErrors:
    """Squared error of rounding sorted values [first, last) to evenly spaced levels over their own range."""

    def __init__(self, ordered: Tensor, counts: Tensor, levels: int) -> None:
        self.ordered, self.levels, self.size = ordered, levels, ordered.numel()
        zero = torch.zeros(1, dtype=torch.float64)
        self.counts, self.sums, self.squares = (
            torch.cat([zero, (counts * ordered**power).cumsum(0)]) for power in range(3)
        )

    def __call__(self, first: Tensor, last: Tensor) -> Tensor:
        low = self.ordered[first.clamp(max=self.size - 1)]
        high = self.ordered[(last - 1).clamp(min=0)]
        step = (high - low).clamp(min=0) / (self.levels - 1)
        total = torch.zeros_like(low)
        begin = first
        for level in range(self.levels):
            end = last
            if level < self.levels - 1:
                edge = low + (level + 0.5) * step
                end = torch.minimum(torch.maximum(torch.searchsorted(self.ordered, edge), begin), last)
            value = low + level * step
            count, mass, power = (t[end] - t[begin] for t in (self.counts, self.sums, self.squares))
            total += power - 2 * value * mass + value * value * count
            begin = end
        return torch.where(last > first, total, torch.zeros_like(total))
