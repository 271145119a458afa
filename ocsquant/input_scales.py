"""Which scales the inputs of the planned layers get from calibration, and where a token's own step serves better."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from ocsquant.config import OCS, Activations, Weights
from ocsquant.errors import NotCalibratedError, first_few
from ocsquant.hessians import by_output, check_width, second_moments, unseen_by_design
from ocsquant.layers import CONVOLUTIONS, Matrix, matrices, plan_splits, quantize_matrix, range_limit
from ocsquant.methods import ocs
from ocsquant.methods.learned_clips import ClippedInput
from ocsquant.methods.outliertune import InputTransform, input_transform, transformed_codes
from ocsquant.methods.tokens import quantize_tokens
from ocsquant.nn.convolution import pads
from ocsquant.observers import InputStatistics, Statistics
from ocsquant.planning import Target
from ocsquant.suitability import fixed_inputs_problem


def fix_input_scales(model: nn.Module, targets: list[Target], statistics: Statistics | None) -> None:
    """Give the targets whose recipe asks for calibrated inputs their transform, or a recipe with a step per token."""
    asking = [t for t in targets if t.recipe.weights.bits is not None and _asks(t)]
    if asking and statistics is None:
        raise NotCalibratedError(
            f"calibration must be batches or statistics for this recipe: {len(asking)} layers need to know their "
            f"inputs, the first is '{asking[0].path}'"
        )
    unseen = []
    for target in asking:
        assert statistics is not None
        seen = statistics.get(target.path)
        if seen is not None:
            _fix(target, seen)
        elif (why := unseen_by_design(model, target)) is not None:
            _per_token(target, why)
        else:
            unseen.append(target.path)
    if unseen:
        raise NotCalibratedError(f"calibration reached none of these layers: {first_few(unseen)}")


def _asks(target: Target) -> bool:
    activations = target.recipe.activations
    if activations is None or not activations.needs_calibration:
        return False
    return fixed_inputs_problem(target.source, activations) is None


def _fix(target: Target, seen: InputStatistics) -> None:
    a = target.recipe.activations
    assert a is not None
    (matrix,) = matrices(target.source, target.path)
    check_width(target, matrix.name, seen)
    if seen.count == 0 or not (seen.minimum.isfinite() & seen.maximum.isfinite()).all():
        raise NotCalibratedError(f"calibration saw no input of '{target.path}'")
    if a.scale == "channel":
        folded, token = _errors(target, matrix, seen)
        if not folded <= token:
            _per_token(target, f"output error {token / folded:.2f} of that with folded scales")
            return
    if not a.symmetric:
        low, high = seen.minimum.min(), seen.maximum.max()
        target.transform = ClippedInput.between(low.clamp(max=0.0), high.clamp(min=0.0), a.bits, align_zero=True)
        return
    weight = matrix.by_channel(target.groups)
    if a.split is not None:
        target.copies = _copies(a.split, target.recipe.weights, weight, seen)
    target.transform = _transform(target, seen.minimum, seen.maximum, weight, target.copies)


def _copies(split: OCS, weights: Weights, weight: Tensor, seen: InputStatistics) -> Tensor:
    splits = ocs.split_count(split.expand_ratio, weight.shape[1])
    if split.select == "max":
        return ocs.plan_by_counts(seen.outlier_counts, splits).copies
    power = weight.square().sum(0)
    return ocs.plan_by_error(seen.absmax, power, splits, range_limit(weights)).copies


def _transform(
    target: Target, low: Tensor, high: Tensor, weight: Tensor, copies: Tensor | None = None
) -> InputTransform:
    a, module = target.recipe.activations, target.source
    assert a is not None
    if isinstance(module, CONVOLUTIONS) and module.padding_mode == "zeros" and pads(module):
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # no pixel that calibration saw, but an input
    return input_transform(low, high, weight, a.bits, a.scale, a.smooth_alpha, a.shift, copies)


def _per_token(target: Target, why: str) -> None:
    a = target.recipe.activations
    assert a is not None
    alone = Activations(a.bits, a.max_outliers, a.outlier_threshold)
    target.recipe = dataclasses.replace(target.recipe, activations=alone)
    target.notes.append(f"inputs per token: {why}")


@torch.autocast("cpu", enabled=False)
def _errors(target: Target, matrix: Matrix, seen: InputStatistics) -> tuple[float, float]:
    """Relative squared output errors on real inputs, with the real quantizers: folded, and per token.

    Each half of the sample is judged by the ranges of the other: what new inputs clip counts. Relative to each token's
    own output: norms behind the layer make tokens of all sizes equal.
    """
    a, groups = target.recipe.activations, target.groups
    assert a is not None
    weight = matrix.by_channel(groups)

    def approximate(transform: InputTransform | None) -> Tensor:
        values = matrix.values if transform is None else transform.fold(matrix.values, groups)
        moments = by_output(target.source, second_moments(seen, transform))
        rounded = _approximate(dataclasses.replace(matrix, values=values, moments=moments), target.recipe.weights)
        return dataclasses.replace(matrix, values=rounded).by_channel(groups)

    plain = approximate(None)
    folded = token = 0.0
    for half in range(2):
        x, other = seen.sample[seen.half == half], 1 - half
        if x.shape[0] == 0 or not seen.low[other].isfinite().all():
            return math.inf, 0.0  # one token or none: nothing to judge a fixed scale by
        exact = x @ weight.T
        transform = _transform(target, seen.low[other], seen.high[other], weight)
        codes, step = transformed_codes(x, transform, a.bits, a.max_outliers, a.outlier_threshold)
        y = (codes * step[:, None]) @ approximate(transform).T
        if transform.shift is not None:
            y = y + weight @ transform.shift
        folded += _relative(y, exact)
        # A larger kernel has one step for all pixels of a sample.
        rows = x if matrix.positions == 1 else x.reshape(1, -1)
        outliers = a.max_outliers * (x.shape[0] // rows.shape[0])
        codes, step = quantize_tokens(rows, a.bits, outliers, a.outlier_threshold)
        token += _relative((codes * step[:, None]).reshape(x.shape) @ plain.T, exact)
    return folded, token


def _approximate(matrix: Matrix, weights: Weights) -> Tensor:
    return quantize_matrix(matrix, weights, plan_splits(matrix, weights)).dequantize()


def _relative(y: Tensor, exact: Tensor) -> float:
    power = exact.double().square().sum(1).clamp(min=1e-30)
    return float(((y - exact).double().square().sum(1) / power).sum())
