"""What there is to quantize in a module: its weight matrices, and how one of them becomes codes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor, nn

from ocsquant.config import OCS, SplitQuant, Weights
from ocsquant.errors import NonFiniteError
from ocsquant.methods import ocs
from ocsquant.methods.codebook import quantize_codebook
from ocsquant.methods.gptq import InverseFactor, gptq, inverse_factor
from ocsquant.methods.grid import QuantizedWeight, code_limit, largest_range, quantize_weight
from ocsquant.methods.splitquant import quantize_splitquant
from ocsquant.methods.squant import squant

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
RECURRENT = (nn.LSTM, nn.GRU)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
KINDS = {"linear": (nn.Linear,), "conv": CONVOLUTIONS, "recurrent": RECURRENT, "embedding": EMBEDDINGS}
UNLIMITED = 2**15  # copies written out in float need no tail


@dataclass(frozen=True)
class Matrix:
    """One weight of a module, seen as float32 [outputs, channels * positions]; if `positions_first`, its columns in the
    `kernel_order`.
    """

    name: str
    shape: torch.Size
    values: Tensor
    channels: int
    positions: int
    moments: Tensor | None = None  # float32 [1 or outputs, channels], second ones of its inputs
    hessian: Tensor | None = None  # float32 [columns, columns], of its inputs
    positions_first: bool = False

    @cached_property
    def inverse_factor(self) -> InverseFactor:
        """Of the Hessian, for GPTQ."""
        assert self.hessian is not None
        return inverse_factor(self.hessian)

    @cached_property
    def kernel_order(self) -> Tensor:
        """int64 [columns]: those of the weight, as the integer kernels have them: [height][width][depth][channels]."""
        depth = self.shape[2] if len(self.shape) == 5 else 1
        own = torch.arange(self.channels * self.positions)
        return own.reshape(self.channels, depth, -1).permute(2, 1, 0).flatten()

    def in_kernel_order(self) -> Matrix:
        """The same with its positions first."""
        order = self.kernel_order
        hessian = None if self.hessian is None else self.hessian[order][:, order]
        return dataclasses.replace(self, values=self.values[:, order], hessian=hessian, positions_first=True)

    def in_own_order(self, columns: Tensor) -> Tensor:
        """[..., columns] of this matrix's order, as of the weight's own."""
        return columns[..., self.kernel_order.argsort()] if self.positions_first else columns

    def by_position(self, columns: Tensor) -> Tensor:
        """[outputs, columns] as [outputs, channels, positions]."""
        return self.in_own_order(columns).unflatten(1, (self.channels, self.positions))

    def as_kernels_have(self, weight: QuantizedWeight) -> QuantizedWeight:
        """This matrix quantized, with its columns in the kernel order."""
        if self.positions_first:
            return weight
        order = self.kernel_order
        return dataclasses.replace(weight, codes=weight.codes[:, order], ranges=weight.ranges[order])

    def spread(self, channels: Tensor) -> Tensor:
        """[..., channels] as [..., columns]."""
        columns = channels.repeat_interleave(self.positions, -1)
        return columns[..., self.kernel_order] if self.positions_first else columns

    def by_channel(self, groups: int) -> Tensor:
        """[outputs * positions / groups, input channels of all groups]: what multiplies each input channel."""
        parts = self.by_position(self.values).unflatten(0, (groups, -1))
        return parts.permute(1, 3, 0, 2).reshape(-1, groups * self.channels)

    def power(self) -> Tensor:
        """The squared norm, of the outputs where the moments of the inputs are known."""
        square = self.by_position(self.values.square()).sum(-1)
        return (square if self.moments is None else square * self.moments).sum()

    def magnitude(self) -> Tensor:
        """[outputs, channels]: the largest |w| over a kernel's positions."""
        return self.by_position(self.values.abs()).amax(-1)


def kind_of(module: nn.Module) -> str | None:
    """ "linear", "conv", "recurrent" or "embedding"; None for a module without weights to quantize.

    A subclass counts as its base only while it keeps the base's forward, or says that it is `quantized_as` one.
    """
    if (kind := getattr(module, "quantized_as", None)) is not None:
        return str(kind)
    for kind, bases in KINDS.items():
        if any(isinstance(module, base) and type(module).forward is base.forward for base in bases):
            return kind
    return None


def weight_names(module: nn.Module) -> list[str]:
    if isinstance(module, RECURRENT):
        # Its own list, which hooks that compute a weight (weight_norm, pruning) leave alone.
        return [name for name in module._flat_weights_names if name.startswith("weight_")]
    return ["weight"]


def matrices(module: nn.Module, path: str) -> Iterator[Matrix]:
    """The weights of a module; they and the biases are checked to be finite."""
    for name, bias in module.named_parameters(recurse=False):
        if "bias" in name:
            _check_finite(bias.detach(), f"{path}.{name}")
    for name in weight_names(module):
        weight = getattr(module, name).detach()
        values = weight.float().reshape(weight.shape[0], -1)
        _check_finite(values, f"{path}.{name}")
        positions = weight[0, 0].numel() if weight.dim() > 2 else 1
        yield Matrix(name, weight.shape, values, weight.shape[1], positions)


def range_limit(weights: Weights) -> int:
    """No channel's range beyond what a base code and one int8 tail code hold, simulated or not."""
    return UNLIMITED if weights.bits is None else largest_range(weights.bits)


def _check_finite(values: Tensor, where: str) -> None:
    if values.numel() and not all(map(math.isfinite, values.aminmax())):
        bad = ~values.isfinite()
        raise NonFiniteError(where.lstrip("."), int(bad.sum()), int(bad.flatten().nonzero()[0]))


def splits_in_order(matrix: Matrix, weights: Weights) -> Iterator[tuple[int, float]]:
    """Channels by error gain (`ocs.splits_by_gain`)."""
    moments = matrix.moments if weights.clip == "output" else None
    return ocs.splits_by_gain(
        matrix.magnitude(),
        weights.bits or 8,
        weights.granularity,
        weights.group_size,
        weights.clip,
        range_limit(weights),
        moments,
    )


def plan_splits(matrix: Matrix, weights: Weights) -> ocs.SplitPlan | None:
    """Which channels of one matrix to split, for `expand_ratio`; None where nothing is to be split."""
    split = weights.ocs
    if split is None or split.max_overhead is not None:
        return None
    splits = ocs.split_count(split.expand_ratio, matrix.channels)
    if splits == 0:
        return None
    if split.select == "max":
        return ocs.plan_largest(matrix.magnitude().amax(0), splits, split.shares, range_limit(weights))
    return plan_from(matrix, split, (channel for channel, _ in islice(splits_in_order(matrix, weights), splits)))


def plan_from(matrix: Matrix, split: OCS, channels: Iterator[int]) -> ocs.SplitPlan:
    copies = torch.ones(matrix.channels, dtype=torch.int32)
    for channel in channels:
        copies[channel] += 1
    return ocs.SplitPlan(copies, split.shares)


@torch.autocast("cpu", enabled=False)
def quantize_matrix(matrix: Matrix, weights: Weights, plan: ocs.SplitPlan | None) -> QuantizedWeight:
    """The codes of one weight, clipped after splitting."""
    grid, rounding = _nearest(matrix, weights, plan), weights.rounded_by(image=len(matrix.shape) > 3)
    if rounding == "gptq" and matrix.hessian is not None:
        return gptq(matrix.values, grid, matrix.inverse_factor)
    together = 1 if matrix.positions_first else matrix.positions
    return squant(matrix.values, grid, together) if rounding == "squant" else grid


def _nearest(matrix: Matrix, weights: Weights, plan: ocs.SplitPlan | None) -> QuantizedWeight:
    assert weights.bits is not None
    values, bits, granularity, size = matrix.values, weights.bits, weights.granularity, weights.group_size
    moments = None if matrix.moments is None else matrix.spread(matrix.moments)
    if isinstance(weights.split, SplitQuant):
        s = weights.split
        return quantize_splitquant(values, bits, granularity, s.parts, s.clusters, s.ranges, s.boundaries)
    if weights.codebook is not None:
        return quantize_codebook(values, bits, granularity, size, weights.codebook, moments)
    ranges = None if plan is None else matrix.spread(plan.ranges())
    quantized = quantize_weight(
        values, bits, granularity, size, weights.symmetric, weights.clip, ranges, moments=moments
    )
    if plan is None or weights.ocs is None or weights.ocs.quantization_aware:
        return quantized
    copies = ocs.SplitPlan(matrix.spread(plan.copies), plan.shares)
    columns = torch.arange(matrix.values.shape[1]) // quantized.group_size
    codes = ocs.naive_codes(values, quantized.scale[:, columns], copies, code_limit(bits))
    return dataclasses.replace(quantized, codes=codes)


def stored_bytes(quantized: QuantizedWeight, plan: ocs.SplitPlan | None, positions: int) -> int:
    """Bytes of codes, scales, zero points, levels and tail columns, codes packed to their bits."""
    n, k = quantized.codes.shape
    groups = quantized.scale.shape[1]
    tail = 0 if plan is None else int((plan.copies > 1).sum()) * positions
    zero = 0 if quantized.zero is None else n * groups * quantized.bits / 8
    levels = 0 if quantized.levels is None else quantized.levels.numel()
    return int(n * k * quantized.bits / 8 + n * groups * 4 + zero + levels + n * tail + 4 * tail)
