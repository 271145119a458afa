"""`convert`: trained `QATLinear` layers become integer ones, with their learned clips as static activation scales."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ocsquant import reporting
from ocsquant.building import build
from ocsquant.config import Activations, PerTensorStatic, Recipe, Weights, check_type
from ocsquant.errors import ArgumentError, NonFiniteError, UnsupportedModuleError
from ocsquant.hessians import attach_moments, repeatable, with_hessians
from ocsquant.methods.learned_clips import ClippedInput
from ocsquant.observers import statistics_of
from ocsquant.planning import Plan, Target
from ocsquant.progress import bar_of, layer_bar
from ocsquant.qat.hooks import unhook
from ocsquant.qat.linear import QATLinear, prepared_layers
from ocsquant.qat.losses import warn_if_idle
from ocsquant.suitability import kernel_problem
from ocsquant.transaction import commit, inherit, set_attribute


def convert(
    model: nn.Module,
    weights: Weights | None = None,
    *,
    calibration: Any = None,
    simulate: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Turn a trained model's `QATLinear` layers into quantized ones, in place, and return the model.

    An input is quantized to the very codes that training rounded it to; the output differs from that of training with
    the same rounded weights by float32 rounding alone (in bfloat16 by its own). Where inputs were not trained to be
    rounded, weights alone are: stored in their bits, dequantized as they are used.

    Args:
        model: of `prepare`, trained. If anything fails, it is left exactly as it was.
        weights: an `ocsquant.Weights`. None: as they were trained (`Config.weight_bits`), else 8 bits per output.
        calibration: batches (statistics, for clip "output"), where `weights` asks for them, as `ocsquant.quantize`
            takes them. The layers see their inputs as rounded in training.
        simulate: run float layers on the rounded inputs and weights: for what has no integer kernel.
        progress: as of `ocsquant.quantize`.

    Raises:
        ArgumentError, ArgumentTypeError: naming the argument.
        NonFiniteError: a weight or a clip holds NaN or Inf; names it.
        NotCalibratedError: `weights` needs calibration and there is none, or it did not reach a layer.
        UnsupportedModuleError: a layer has no integer kernel for these weights; says why.
    """
    layers = prepared_layers(model)
    check_type("weights", weights, (Weights, type(None)), "an ocsquant.Weights or None")
    check_type("simulate", simulate, bool, "True or False")
    check_type("progress", progress, (bool, type(None)), "True, False or None")
    if weights is not None and weights.bits is None:
        raise ArgumentError("weights", "a Weights with bits", weights)
    warn_if_idle(list(layers.values()))

    def bar(batches: Iterable[Any]) -> Iterable[Any]:
        return bar_of(batches, progress, "calibrate", "batch")

    with torch.no_grad():
        targets = [_target(path, layer, weights, simulate) for path, layer in layers.items()]
        if any(t.recipe.weights.rounding == "gptq" for t in targets):
            calibration = repeatable(calibration)
        by_output = any(t.recipe.weights.clip == "output" for t in targets)
        seen = statistics_of(model, calibration, bar) if by_output and calibration is not None else None
        attach_moments(model, targets, seen)

        def in_turn(targets: list[Target]) -> Iterable[Target]:
            return with_hessians(model, layer_bar(targets, progress), calibration, bar)

        changes, lines = build(model, Plan(targets, []), simulate, in_turn)
        lines += [line for line in model.__dict__.get(reporting.ATTRIBUTE) or () if line.kernel is None]
        commit([*changes, *unhook(model), set_attribute(model, reporting.ATTRIBUTE, tuple(lines))])
    return model


def _target(path: str, layer: QATLinear, weights: Weights | None, simulate: bool) -> Target:
    source = nn.Linear(layer.in_features, layer.out_features, device="meta")
    source.weight, source.bias = layer.weight, layer.bias
    inherit(source, layer)
    chosen = weights or layer.trained_weights or Weights()
    transform, activations = _inputs(path, layer)
    recipe = Recipe(chosen, activations)
    problem = None if simulate else kernel_problem(source, "linear", recipe, True)
    if problem is not None:
        raise UnsupportedModuleError(path, problem)
    copies = layer.splits if weights is None else None
    return Target(layer, source, "linear", recipe, path, transform, copies)


def _inputs(path: str, layer: QATLinear) -> tuple[ClippedInput | None, Activations | None]:
    for name in ("clip_neg", "clip_pos"):
        clip = getattr(layer, name)
        if clip is not None and not bool(clip.isfinite().all()):
            raise NonFiniteError(f"{path}.{name}".lstrip("."), 1, 0)
    clipped = layer.clipped_input()
    return clipped, None if clipped is None else PerTensorStatic(clipped.bits, symmetric=False)
