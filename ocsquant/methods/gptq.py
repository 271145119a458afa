"""Rounding that makes up for itself: each column's error is carried into the columns not rounded yet.

GPTQ (Frantar et al. 2023, arXiv 2210.17323), algorithm 1, on any grid of `QuantizedWeight`: scales, zero points, wide
ranges of split channels and levels are those found before; only the codes change. Columns go in the order of falling
second moments of their inputs ("act-order"), with groups where they are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ocsquant.errors import ArgumentError
from ocsquant.methods.grid import QuantizedWeight

BLOCK = 128
VALUES = 2**23  # of whole rows at a time: they do not depend on each other
DAMPING = 0.01  # share of the mean second moment added to the diagonal


@dataclass(frozen=True)
class InverseFactor:
    """order: int64 [k], the columns by falling second moment; upper: triangular float32 [k, k] in that order, U with
    U^T U the inverse of the damped Hessian."""

    order: Tensor
    upper: Tensor


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> InverseFactor:
    """Of a float32 [k, k] Hessian, the sum of u u^T over a layer's inputs u (any factor)."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    return InverseFactor(order, _upper(hessian[order][:, order].double(), damping))


def gptq(w: Tensor, grid: QuantizedWeight, factor: InverseFactor) -> QuantizedWeight:
    """The weight [n, k] with codes chosen for the least squared error of the layer's output.

    A channel whose input is always zero keeps its nearest code.
    """
    count = max(1, VALUES // max(w.shape[1], 1))
    if w.shape[0] > count:
        codes = torch.empty_like(grid.codes)
        for i in range(0, w.shape[0], count):
            codes[i : i + count] = gptq(w[i : i + count], grid.rows(i, i + count), factor).codes
        return dataclasses.replace(grid, codes=codes)
    columns, upper = factor.order.tolist(), factor.upper
    rest = w[:, factor.order]
    codes = grid.codes.clone()
    for first in range(0, len(columns), BLOCK):
        last = min(first + BLOCK, len(columns))
        block, own = rest[:, first:last], upper[first:last, first:last]
        errors = torch.empty_like(block)
        for i in range(last - first):
            column = columns[first + i]
            group = column // grid.group_size
            value = block[:, i : i + 1]
            code = grid.encode(value, group, grid.ranges[column])
            codes[:, column] = code[:, 0].to(torch.int16)
            error = (value - grid.decode(code, group)) / own[i, i]
            block[:, i + 1 :].addmm_(error, own[i : i + 1, i + 1 :], alpha=-1.0)
            errors[:, i] = error[:, 0]
        rest[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1.0)
    return dataclasses.replace(grid, codes=codes)


def _upper(hessian: Tensor, damping: float) -> Tensor:
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    added = damping * mean if mean > 0 else 1.0
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype)
    while added < float("inf"):
        lower, failed = torch.linalg.cholesky_ex(hessian + added * identity)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
        added *= 10.0  # inputs that span far fewer directions than there are channels
    raise ArgumentError("hessian", "finite numbers", "NaN or Inf")
