"""`ocsquant.quantize`: plan, build, commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ocsquant import reporting
from ocsquant.building import build
from ocsquant.config import Recipe, check_type
from ocsquant.folding import fold_batchnorms
from ocsquant.fusing import check_fused, fuse_nonlinearities, share_inputs
from ocsquant.hessians import attach_moments, repeatable, with_hessians
from ocsquant.input_scales import fix_input_scales
from ocsquant.inputs import check_batch_or_bool
from ocsquant.observers import statistics_of
from ocsquant.planning import Target, make_plan, merge_request
from ocsquant.progress import bar_of, layer_bar
from ocsquant.transaction import commit, set_attribute
from ocsquant.tying import Built


def quantize(
    model: nn.Module,
    recipe: Recipe | str | None = None,
    *,
    calibration: Any = None,
    ignore: Iterable[str] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    overrides: Mapping[str, Recipe | str] | None = None,
    simulate: bool = False,
    fold_batchnorm: Any = False,
    fuse: Any = False,
    progress: bool | None = None,
) -> nn.Module:
    """Quantize a model's layers in place and return the model.

    Without arguments: int8 weights per output channel and int8 activations per token with run-time outlier splitting,
    for every Linear, LSTM, GRU and convolution that gains from it, and embeddings stored in int8; no data needed.
    `ocsquant.report(model)` lists what was done and, for every other layer with weights, why not.

    Args:
        model: any module; may itself be the layer. If anything fails, it is left exactly as it was.
        recipe: an `ocsquant.Recipe`, or a scheme: "W8A8" (default), "W8A16", "W4A8", "W4A16", "W3A16", "W2A8", "W2A16".
        calibration: for recipes that ask for it (`Activations` other than per token, clip "output", rounding "gptq",
            which needs batches): an iterable of batches (a mapping
            calls model(**batch), a tuple or list model(*batch), anything else model(batch); in evaluation mode, without
            gradients), or the statistics of `ocsquant.calibrate`.
        ignore: patterns of module paths to leave alone (globs, or regular expressions after "re:"); instead of the
            recipe's. A pattern that matches a module covers what is inside it.
        filter_fn: called with (module, path); False leaves the module alone.
        overrides: pattern -> Recipe or scheme for the layers it matches, the first match counts; instead of the
            recipe's.
        simulate: compute the same codes but run float layers on the dequantized weights: for accuracy tables, and for
            layers and schemes without an integer kernel.
        fold_batchnorm: True folds each BatchNorm that directly follows a convolution in the same nn.Sequential into it
            first (evaluation mode only). A batch (as of `calibration`; one sample is enough) folds it wherever running
            the model on it, as it is called then and without gradients, shows that the BatchNorm alone reads what the
            convolution gives; the folded model has to give the same output on it.
        fuse: True lets an integer linear layer or convolution (with the BatchNorm that is folded into it) compute the
            ReLU, GELU, SiLU, sigmoid or tanh that follows it, a Conv2d also the sum with a residual before that, where
            the code of the class that holds both shows that nothing else there reads its output (nn.Sequential, MLPs of
            transformers and torch.nn, residual blocks, classes written like them), and linear layers that the code
            calls with the same tensor one after the other (query, key and value; gate and up) quantize it once. A batch
            (as of `calibration`) also runs the quantized model on it, fused and not: both have to give the same.
            Without gradients and outside torch.compile only; the report names the layers. Not for models that get
            adapters or forward hooks on them, or whose layers are called one by one from outside.
        progress: show a progress bar (needs tqdm); None shows it on a terminal for long work and for calibration.

    Raises:
        ArgumentError, ArgumentTypeError: naming the argument.
        NonFiniteError: a weight or an input of a calibrated layer holds NaN or Inf; names it.
        NotCalibratedError: the recipe needs calibration and there is none, or it did not reach a layer.
        NothingToQuantizeError: no layer is left to quantize; says why.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_type("simulate", simulate, bool, "True or False")
    check_batch_or_bool("fold_batchnorm", fold_batchnorm)
    check_batch_or_bool("fuse", fuse)
    check_type("progress", progress, (bool, type(None)), "True, False or None")
    request = merge_request(recipe, ignore, overrides)

    def bar(batches: Iterable[Any]) -> Iterable[Any]:
        return bar_of(batches, progress, "calibrate", "batch")

    with torch.no_grad():
        plan = make_plan(model, *request, filter_fn, simulate)
        changes, folded, lines = fold_batchnorms(model, fold_batchnorm)
        for target in plan.targets:
            target.source = folded.get(id(target.module), target.module)
        if any(target.recipe.weights.rounding == "gptq" for target in plan.targets):
            calibration = repeatable(calibration)
        seen = None if calibration is None else statistics_of(model, calibration, bar)
        fix_input_scales(model, plan.targets, seen)
        attach_moments(model, plan.targets, seen)
        del seen  # all that building needs of it stands in the targets now
        fused = fuse is not False and not simulate
        if fused:
            changes = changes + fuse_nonlinearities(model, plan.targets, folded)

        def in_turn(targets: list[Target]) -> Iterable[Target]:
            return with_hessians(model, layer_bar(targets, progress), calibration, bar)

        def finish(built: list[Built]) -> None:
            if fused:
                share_inputs(model, built)

        more, layers = build(model, plan, simulate, in_turn, finish)
        changes = changes + more
        if fused and fuse is not True:
            check_fused(model, changes, fuse)
        changes.append(set_attribute(model, reporting.ATTRIBUTE, reporting.with_earlier(model, [*layers, *lines])))
        commit(changes)
    return model
