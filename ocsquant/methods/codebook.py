"""Weights as entries of a small table of levels instead of a uniform grid: k-means, NF4, and the nearest entry.

Levels are int8 multiples of the scale of their row or group, so that the integer kernels can multiply with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ocsquant.methods.grid import QuantizedWeight, blocked, group_length, quantize_levels, usable_scale

LEVEL_LIMIT = 127  # the largest level: the largest magnitude of a block is 127 steps
ITERATIONS = 60
FITTED = 1 << 22  # of more weights, evenly spread ones
# Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), appendix E: quantiles of a normal distribution, an exact zero.
NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip


def nf4_levels() -> Tensor:
    """int8 [1, 16]."""
    return (torch.tensor(NF4) * LEVEL_LIMIT).round().to(torch.int8)[None]


def kmeans(values: Tensor, count: int, weight: Tensor | None = None) -> Tensor:
    """Centres [rows, count], ascending, that minimize the (weighted) squared distance of each row's values to them.

    values: [rows, m]; weight: the same shape. Lloyd's iteration, exact on sorted values; its first centres follow the
    density to the power 1/3, the asymptotic optimum of a scalar quantizer, so that no random numbers are needed.
    """
    ordered, order = values.double().sort(1)
    mass = torch.ones_like(ordered) if weight is None else weight.double().gather(1, order)
    zero = torch.zeros_like(ordered[:, :1])
    masses = torch.cat([zero, mass.cumsum(1)], 1)
    moments = torch.cat([zero, (mass * ordered).cumsum(1)], 1)
    centres, first = _first_centres(ordered, count), torch.zeros_like(order[:, :1])
    for _ in range(ITERATIONS):
        bounds = torch.searchsorted(ordered, (centres[:, 1:] + centres[:, :-1]) / 2)
        edges = torch.cat([first, bounds, first + values.shape[1]], 1)
        held = masses.gather(1, edges).diff(dim=1)
        moved = torch.where(held > 0, moments.gather(1, edges).diff(dim=1) / held.clamp(min=1e-300), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _first_centres(ordered: Tensor, count: int) -> Tensor:
    # For sorted samples of density f the gaps are 1 / (m f): summing their 2/3 powers integrates f^(1/3).
    path = ordered.diff(dim=1).pow(2 / 3).cumsum(1)
    path = torch.cat([torch.zeros_like(ordered[:, :1]), path], 1)
    wanted = path[:, -1:] * ((torch.arange(count) + 0.5) / count)
    return ordered.gather(1, torch.searchsorted(path, wanted).clamp(max=ordered.shape[1] - 1))


def as_levels(centres: Tensor) -> Tensor:
    """Real levels [books, count] in units of the scale as int8, ascending."""
    return centres.round().clamp(-LEVEL_LIMIT, LEVEL_LIMIT).to(torch.int8).sort(1).values


def absmax_scale(w: Tensor, granularity: str, group_size: int) -> Tensor:
    """float32 [n, groups]: the step of int8 levels, 1/127 of the largest magnitude."""
    blocks = blocked(w.abs(), group_length(w.shape[1], granularity, group_size))
    largest = blocks.amax(-1)
    if granularity == "tensor":
        largest = largest.amax().expand(w.shape[0], 1)
    return usable_scale(largest / LEVEL_LIMIT)


def quantize_codebook(
    w: Tensor, bits: int, granularity: str, group_size: int, codebook: str, moments: Tensor | None
) -> QuantizedWeight:
    """A float32 [n, k] matrix as one table of 2^bits levels under its scales.

    "kmeans" fits the levels to the least squared error of the weights, or of the outputs where the second `moments`
    [1 or n, k] of the inputs are given; "nf4" is fixed.
    """
    k = w.shape[1]
    scale, size = absmax_scale(w, granularity, group_size), group_length(k, granularity, group_size)
    if codebook == "nf4":
        return quantize_levels(w, nf4_levels(), scale, bits, size)
    steps = scale[:, torch.arange(k) // size]
    weight = steps.square() if moments is None else steps.square() * moments
    every = w.numel() // FITTED + 1
    units, weight = (t.reshape(1, -1)[:, ::every] for t in (w / steps, weight))
    levels = as_levels(kmeans(units, 2**bits, weight))
    return quantize_levels(w, levels, scale, bits, size)
