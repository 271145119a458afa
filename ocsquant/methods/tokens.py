"""Run-time outlier channel splitting of activations, in plain PyTorch: what `quantized_linear` does to its input."""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 64


def sum_of_squares(x: Tensor) -> Tensor:
    """float32 [m]: 64 running sums over positions modulo 64, then added in halves; the order every kernel follows."""
    lanes = torch.nn.functional.pad(x, (0, -x.shape[1] % LANES)).unflatten(1, (-(-x.shape[1] // LANES), LANES))
    total = x.new_zeros(x.shape[0], LANES)
    for block in range(lanes.shape[1]):
        total = total + lanes[:, block] * lanes[:, block]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def quantize_tokens(x: Tensor, bits: int, max_outliers: int, outlier_threshold: float) -> tuple[Tensor, Tensor]:
    """Codes (whole float32) [m, k] and steps [m] of float32 tokens [m, k]; a non-finite token has a NaN step."""
    # Not numbers of the CPU: what lies on a GPU would be multiplied by their inverse, which rounds otherwise.
    limit, width, threshold = x.new_tensor([float(2 ** (bits - 1) - 1), float(x.shape[1]), outlier_threshold])
    absmax = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    step = absmax / limit
    if max_outliers > 0 and x.shape[1]:
        squares = sum_of_squares(x)
        # float32 square roots of torch are not correctly rounded on every CPU; through float64 they are.
        rms = (squares / width).double().sqrt().float()
        usable = (squares >= 2.0**-100) & squares.isfinite()
        step = torch.where(usable, torch.minimum(absmax, threshold * rms) / limit, step)
    step = torch.where(step < 2.0**-120, torch.zeros_like(step), step)
    codes = _codes(x, step)
    crowded = (
        ((codes.abs() > limit).sum(1) > max_outliers) & absmax.isfinite() if max_outliers else torch.zeros(1).bool()
    )
    if crowded.any():
        bound = x[crowded].abs().topk(max_outliers + 1, dim=1).values[:, -1] / limit
        step[crowded] = torch.where(bound < 2.0**-120, torch.zeros_like(bound), bound)
        codes = _codes(x, step)
    bad = ~absmax.isfinite()
    codes[bad] = 0.0
    step[bad] = torch.nan
    return codes, step


def _codes(x: Tensor, step: Tensor) -> Tensor:
    inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step))
    return (x * inverse[:, None]).round_()
