"""`prepare`: linear layers become `QATLinear` in place, with clips from calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ocsquant.building import redirect
from ocsquant.config import Weights, check_number, check_type
from ocsquant.errors import ArgumentError, NotCalibratedError, first_few
from ocsquant.layers import matrices, range_limit
from ocsquant.methods import ocs
from ocsquant.methods.learned_clips import mse_clips, percentile_clips
from ocsquant.observers import InputStatistics, Statistics, statistics_of
from ocsquant.planning import check_used, covers, linear_places
from ocsquant.progress import bar_of
from ocsquant.qat.config import SKIP, Config
from ocsquant.qat.hooks import hook_root
from ocsquant.qat.linear import QATLinear
from ocsquant.qat.penalty import Penalty
from ocsquant.transaction import Change, applied, become, commit, inherit


def prepare(
    model: nn.Module, config: Config | None = None, *, calibration: Any = None, progress: bool | None = None
) -> nn.Module:
    """Make a model's nn.Linear layers train through quantization, in place, and return the model.

        model = ocsquant.qat.prepare(model, ocsquant.qat.Config(activation_bits=4), calibration=batches)
        optimizer = torch.optim.AdamW(ocsquant.qat.param_groups(model, lr, weight_decay))
        loss = ocsquant.qat.with_kurtosis(model, loss)   # in your loop, before loss.backward()

    A model whose output has a `loss` (those of transformers) needs no third line: a hook wraps it.

    Args:
        model: any module; may itself be the layer. If anything fails, it is left exactly as it was.
        config: an `ocsquant.qat.Config`.
        calibration: batches of training data, as `ocsquant.quantize` takes them, or statistics; for clip_init "mse",
            "percentile" and "max" and for fold.
        progress: as of `ocsquant.quantize`.

    Raises:
        ArgumentError, ArgumentTypeError: naming the argument.
        NonFiniteError: a weight or a calibrated input holds NaN or Inf; names it.
        NotCalibratedError: clip_init or fold needs data and there is none, or it did not reach a layer.
        NothingToQuantizeError: no linear layer is left; says why.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    config = Config() if config is None else config
    check_type("config", config, Config, "an ocsquant.qat.Config")
    check_type("progress", progress, (bool, type(None)), "True, False or None")
    if any(isinstance(m, QATLinear) for m in model.modules()):
        raise ArgumentError("model", "a model that is not prepared already", type(model).__name__)
    layers = linear_places(model, config.skip, check=config.skip != SKIP)
    check_used("config.kurtosis_on", config.kurtosis_on, [path for path, _ in model.named_modules()])
    if config.needs_calibration and calibration is None:
        raise NotCalibratedError(
            f"calibration must be batches or statistics for this config: {len(layers)} layers need to know their "
            f"inputs, the first is '{layers[0][0][0]}'"
        )
    aside: list[Change] = []
    redirect(model, {id(layer) for _, layer in layers}, aside)
    with applied(aside), torch.no_grad():  # attention must call its projection for calibration to see it
        seen = Statistics()
        if config.needs_calibration:
            seen = statistics_of(model, calibration, lambda batches: bar_of(batches, progress, "calibrate", "batch"))
        unseen = [paths[0] for paths, _ in layers if config.needs_calibration and paths[0] not in seen]
        if unseen:
            raise NotCalibratedError(f"calibration reached none of these layers: {first_few(unseen)}")
        penalty = Penalty(config.kurtosis_weight) if config.kurtosis_weight > 0 else None
        changes: list[Change] = []
        for paths, layer in layers:
            penalized = any(covers(pattern, paths) for pattern in config.kurtosis_on)
            new = QATLinear(layer, config, penalty if penalized else None)
            fixed = _fix(new, layer, config, paths[0], seen.get(paths[0]))
            changes += [become(layer, inherit(new, layer)), *fixed]
        if penalty is not None:
            changes.append(hook_root(model))
        commit(changes)
    return model


def _fix(new: QATLinear, layer: nn.Linear, config: Config, path: str, seen: InputStatistics | None) -> list[Change]:
    """Give the new layer its input scales, splits and clips; the change of the shared weight is for the commit."""
    (matrix,) = matrices(layer, path)
    changes: list[Change] = []
    if seen is not None and seen.total.numel() != layer.in_features:
        raise ArgumentError(
            "calibration", f"statistics in which '{path}' has {layer.in_features} channels", seen.total.numel()
        )
    if config.fold == "channel":
        assert seen is not None
        new.input_inverse = 1.0 / power_of_two_scales(seen.absmax)
        changes.append(_scale_weight(layer.weight, 1.0 / new.input_inverse))
    if config.split is not None:
        splits = ocs.split_count(config.split.expand_ratio, matrix.channels)
        scaled = matrix.magnitude() if new.input_inverse is None else matrix.magnitude() / new.input_inverse
        limit = range_limit(Weights(bits=config.weight_bits))
        new.splits = ocs.plan_largest(scaled.amax(0), splits, config.split.shares, limit).ranges()
    if new.clip_neg is not None and new.clip_pos is not None:
        low, high = _clips(config, seen, new.input_inverse)
        new.clip_neg.fill_(low)
        new.clip_pos.fill_(high)
    return changes


def power_of_two_scales(absmax: Tensor) -> Tensor:
    """float32 [k]: 1, or where a channel's largest input is above the median one, their ratio to a power of two."""
    typical = float(absmax.median())
    if typical <= 0.0:
        return torch.ones_like(absmax)
    return torch.exp2((absmax / typical).clamp(min=1.0).log2().round())


def _scale_weight(weight: Tensor, scale: Tensor) -> Change:
    def multiply(by: Tensor) -> Callable[[], Any]:
        return lambda: weight.data.mul_(by.to(weight.dtype))

    return multiply(scale), multiply(1.0 / scale)


def _clips(config: Config, seen: InputStatistics | None, inverse: Tensor | None) -> tuple[float, float]:
    if not isinstance(config.clip_init, str):
        return -float(config.clip_init), float(config.clip_init)
    assert seen is not None
    assert config.activation_bits is not None
    factor = torch.ones_like(seen.minimum) if inverse is None else inverse
    if config.clip_init == "max":
        return float((seen.minimum * factor).min()), float((seen.maximum * factor).max())
    values = seen.sample * factor
    if config.clip_init == "percentile":
        return percentile_clips(values)
    return mse_clips(values, config.activation_bits, config.align_zero)


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> list[dict[str, Any]]:
    """Parameter groups for Adam or AdamW: the learned clips in one of their own, with beta1 = 0 and no weight decay.

    Args:
        model: of `prepare`.
        lr: of all parameters. weight_decay: of all but the clips. betas: Adam's, (0, betas[1]) for the clips.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_number("lr", lr, 0.0, 1e6)
    check_number("weight_decay", weight_decay, 0.0, 1e6)
    check_type("betas", betas, tuple, "two numbers")
    if len(betas) != 2:
        raise ArgumentError("betas", "two numbers", betas)
    for beta in betas:
        check_number("betas", beta, 0.0, 1.0)
    layers = [m for m in model.modules() if isinstance(m, QATLinear)]
    if not layers:
        raise ArgumentError("model", "a model of ocsquant.qat.prepare", type(model).__name__)
    clips = [c for layer in layers for c in (layer.clip_neg, layer.clip_pos) if c is not None and c.requires_grad]
    own = {id(c) for c in clips}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr, "weight_decay": weight_decay, "betas": tuple(betas)}]
    if clips:
        groups.append({"params": clips, "lr": lr, "weight_decay": 0.0, "betas": (0.0, betas[1])})
    return groups
