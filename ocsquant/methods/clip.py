"""Which magnitude the largest code stands for: none, least squared error (of weights or outputs), ACIQ, KL divergence.

All take the magnitudes a *copy* of a channel holds (|w| / r), so that clipping happens after splitting, as the OCS
paper says (its reference code clips before).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MSE_STEPS = 64
KL_BINS, KL_START = 1001, 128


def clip_threshold(
    share: Tensor, ranges: Tensor, bits: int, method: str, whole: bool, moments: Tensor | None = None
) -> Tensor:
    """The magnitude of code Q for each block.

    share: [n, groups, size], magnitudes |w| / r, zeros as padding; ranges: the same shape, r of each value; moments:
    the same shape, what the squared error of each value counts ("output": the second moment of its input channel).
    whole: one threshold for everything. Returns [n, groups].
    """
    n, groups, _ = share.shape
    if whole:
        share, ranges = share.reshape(1, 1, -1), ranges.reshape(1, 1, -1)
        moments = None if moments is None else moments.reshape(1, 1, -1)
    maximum = share.amax(-1)
    if method in ("mse", "output"):
        threshold = _least_squares(share, ranges, bits, maximum, moments if method == "output" else None)
    elif method == "aciq":
        threshold = torch.minimum(_aciq(share, bits), maximum)
    elif method == "kl":
        threshold = torch.minimum(_kl(share, bits), maximum)
    else:
        threshold = maximum
    return threshold.expand(n, groups)


def clip_range(
    blocks: Tensor, low: Tensor, high: Tensor, bits: int, method: str, moments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The ends [n, groups] of an asymmetric grid over blocks [n, groups, size]: both drawn in by one factor.

    low <= 0 <= high are the full range; moments: as of `clip_threshold`.
    """
    if method == "none":
        return low, high
    best, factor = torch.full_like(low, math.inf), torch.ones_like(low)
    for step in range(MSE_STEPS // 4, MSE_STEPS + 1):
        share = step / MSE_STEPS
        scale = ((high - low) * (share / (2**bits - 1))).clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        zero = (-low[..., None] * share / scale).round_()
        code = (blocks / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
        error = _error(code.sub_(zero).mul_(scale).sub_(blocks), moments if method == "output" else None)
        better = error <= best
        best, factor = torch.where(better, error, best), torch.where(better, share, factor)
    return low * factor, high * factor


def _error(difference: Tensor, moments: Tensor | None) -> Tensor:
    square = difference.square_()
    return (square if moments is None else square.mul_(moments)).sum(-1)


def _least_squares(share: Tensor, ranges: Tensor, bits: int, maximum: Tensor, moments: Tensor | None) -> Tensor:
    """Sweep evenly spaced thresholds for the least (weighted) squared error of the quantized values."""
    limit = 2 ** (bits - 1) - 1
    value = share * ranges
    best = torch.full_like(maximum, math.inf)
    threshold = maximum.clone()
    for step in range(1, MSE_STEPS + 1):
        candidate = maximum * (step / MSE_STEPS)
        scale = (candidate / limit).clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        code = torch.minimum((value / scale).round_(), ranges * limit)
        error = _error(code.mul_(scale) - value, moments)
        better = error <= best
        best = torch.where(better, error, best)
        threshold = torch.where(better, candidate, threshold)
    return threshold


def _aciq(share: Tensor, bits: int) -> Tensor:
    """Banner et al. 2019 (arXiv 1810.05723), the closed form of the better fitting of a Gaussian and a Laplacian."""
    count = (share > 0).sum(-1).clamp(min=1)
    deviation = share.sum(-1) / count
    sigma = (share.square().sum(-1) / count).sqrt()
    # Mean log-likelihood of each fit; the larger one is the better.
    gaussian = -sigma.clamp(min=1e-30).log() - 0.5 * math.log(2 * math.pi * math.e)
    laplacian = -(2 * deviation.clamp(min=1e-30)).log() - 1.0
    return torch.where(gaussian > laplacian, sigma * gaussian_clip(bits), deviation * laplacian_clip(bits))


def laplacian_clip(bits: int) -> float:
    """alpha / b that minimizes 2 b^2 exp(-alpha / b) + alpha^2 / (3 * 4^bits): alpha/b * exp(alpha/b) = 3 * 4^bits."""
    u = 2.0
    for _ in range(100):
        u = math.log(3 * 4**bits / u)
    return u


def gaussian_clip(bits: int) -> float:
    """alpha / sigma that minimizes the clipping error of a Gaussian plus alpha^2 / (3 * 4^bits), by bisection."""

    def slope(u: float) -> float:
        clipping = u * math.erfc(u / math.sqrt(2)) - math.sqrt(2 / math.pi) * math.exp(-u * u / 2)
        return 2 * clipping + 2 * u / (3 * 4**bits)

    low, high = 0.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low


def _kl(share: Tensor, bits: int) -> Tensor:
    """Migacz 2017 (TensorRT): the threshold whose quantized histogram diverges least from the clipped one."""
    flat = share.reshape(-1, share.shape[-1])
    return torch.stack([_kl_of_block(block[block > 0], bits) for block in flat]).reshape(share.shape[:-1])


def _kl_of_block(value: Tensor, bits: int) -> Tensor:
    if value.numel() == 0:
        return torch.zeros(())
    top = value.max()
    histogram = torch.histc(value.float(), bins=KL_BINS, min=0.0, max=float(top)).double()
    levels = 2 ** (bits - 1)
    best, threshold = math.inf, float(top)
    for bins in range(max(KL_START, levels), KL_BINS + 1):
        reference = histogram[:bins].clone()
        reference[-1] += histogram[bins:].sum()
        # Each level spreads its count evenly over the bins it covers that were not empty.
        level = (torch.arange(bins) * levels) // bins
        filled = (histogram[:bins] > 0).double()
        mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, histogram[:bins])
        cells = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
        quantized = filled * (mass / cells.clamp(min=1))[level]
        p, q = reference / reference.sum(), quantized / quantized.sum().clamp(min=1e-30)
        used = p > 0  # a cell that q leaves empty and p does not would be infinitely far: it counts as 1e-12
        divergence = float((p[used] * (p[used] / q[used].clamp(min=1e-12)).log()).sum())
        if divergence < best:
            best, threshold = divergence, float(top) * bins / KL_BINS
    return torch.tensor(threshold, dtype=torch.float32)
