"""Rounding without data so that errors cancel where inputs are alike: over a kernel, and over an output's weights.

SQuant (Guo et al. 2022, arXiv 2202.07471), algorithms 1 to 4: starting from the nearest codes, those with the largest
errors take their other neighbour until the errors of each kernel, then those of each output (of each of its groups of
one scale) add up to at most half a step; a move over a kernel may be taken back for that. Neighbouring pixels and
positive inputs make sums of errors count; where inputs are neither, rounding to nearest leaves less.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ocsquant.methods.grid import ROWS_OF, QuantizedWeight, blocked, code_limit


def squant(w: Tensor, grid: QuantizedWeight, positions: int) -> QuantizedWeight:
    """The weight [n, channels * positions] with codes on the same uniform grid, each at most one from its nearest."""
    step = max(1, ROWS_OF // w.shape[1])
    parts = [_rows(w[i : i + step], grid.rows(i, i + step), positions) for i in range(0, w.shape[0], step)]
    return dataclasses.replace(grid, codes=torch.cat([grid.codes[:0], *parts]))


def _rows(w: Tensor, grid: QuantizedWeight, positions: int) -> Tensor:
    n, k = w.shape
    place = blocked(w, grid.group_size) / grid.scale[:, :, None]
    if grid.zero is None:
        limit = blocked(grid.ranges[None] * float(code_limit(grid.bits)), grid.group_size)
        place = torch.minimum(torch.maximum(place, -limit), limit)  # what clipping cuts off is nobody's to make up
    else:
        place = (place + grid.zero[:, :, None]).clamp(0, 2**grid.bits - 1)
    codes = blocked(grid.codes.float(), grid.group_size)
    if grid.group_size % positions:
        positions = 1  # groups end inside of kernels
    error = (codes - place).masked_fill(blocked(torch.ones(1, k), grid.group_size) == 0, 0.0)
    error = error.unflatten(-1, (-1, positions))
    moves = _over_kernels(error) if positions > 1 else torch.zeros_like(error)
    moves += _over_outputs(error - moves)
    return (codes - moves.reshape(codes.shape)).reshape(n, -1)[:, :k].to(torch.int16)


def _over_kernels(error: Tensor) -> Tensor:
    """-1, 0 or 1 [..., channels, positions], to be subtracted: as many of the largest errors as there are whole steps
    in a kernel's sum."""
    total = error.sum(-1)
    return _largest(error * total.sign()[..., None], total.abs().round()) * total.sign()[..., None]


def _over_outputs(error: Tensor) -> Tensor:
    """The same for an output's sum: the largest error of each of the kernels that have most of it."""
    kernels = error.sum(-1)
    total = kernels.sum(-1)
    sign = total.sign()[..., None]
    largest, at = (error * sign[..., None]).max(-1)
    share = (kernels * sign).masked_fill(largest <= 0, -torch.inf)
    chosen = _largest(share, total.abs().round()) * (largest > 0) * sign
    return torch.zeros_like(error).scatter_(-1, at[..., None], chosen[..., None])


def _largest(values: Tensor, count: Tensor) -> Tensor:
    """1 for the `count` [...] largest of values [..., m], 0 for the rest."""
    most = min(int(count.max()), values.shape[-1])
    at = values.topk(most, -1).indices
    return torch.zeros_like(values).scatter_(-1, at, (torch.arange(most) < count[..., None]).to(values.dtype))
