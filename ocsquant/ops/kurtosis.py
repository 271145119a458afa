"""Kurtosis of rows, the penalty of activation regularisation (Nrusimha et al. 2024, arXiv 2404.03605)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocsquant.ops.library import check_devices, check_there, compiled

_kurtosis = compiled.kurtosis.default


def kurtosis(y: Tensor) -> Tensor:
    """K = m4 / m2^2 of each row, with central moments over its d entries; 3 for a Gaussian, never less than 1.

    Args:
        y: float32 or bfloat16 [..., d]. A row of one entry, or constant to float32 (m2 at most 1e-10 of the mean
            square, or below 2^-100), has K = 0 and gradient 0; a row with NaN or Inf has NaN.

    Returns:
        float32 [...], statistics in float32. dK/dy_i = 4 / (d sigma) (w_i^3 - m3 - K w_i) with w = (y - mean) / sigma.
    """
    check_there("kurtosis", "y", y)
    return _kurtosis(y)


@torch.library.register_fake("ocsquant::kurtosis")
def _(y: Tensor) -> Tensor:
    torch._check(y.dim() >= 1, lambda: "kurtosis: y must have at least one dimension, got a scalar")
    return y.new_empty(y.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("ocsquant::kurtosis_backward")
def _(grad: Tensor, y: Tensor) -> Tensor:
    check_devices("kurtosis_backward", grad=grad, y=y)
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.register_fake("ocsquant::kurtosis_anchor")
def _(grad: Tensor, penalty: int, share: Tensor | None = None) -> Tensor:
    return torch.empty_like(grad)


@torch.library.register_fake("ocsquant::kurtosis_inject")
def _(grad: Tensor, y: Tensor, scale: Tensor, weight: float, target: float, log: Tensor) -> Tensor:
    check_devices("kurtosis_inject", grad=grad, y=y, scale=scale, log=log)
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return compiled.kurtosis_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("ocsquant::kurtosis", _backward, setup_context=_setup)
