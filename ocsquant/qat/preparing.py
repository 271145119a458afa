"""`prepare`: linear layers become `QATLinear` in place, with clips from calibration data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ocsquant import reporting
from ocsquant.building import redirect
from ocsquant.config import Weights, check_number, check_type
from ocsquant.errors import ArgumentError, NotCalibratedError, first_few
from ocsquant.layers import matrices, range_limit
from ocsquant.methods import ocs
from ocsquant.methods.learned_clips import mse_clips, percentile_clips
from ocsquant.observers import InputStatistics, Statistics, check_finite, statistics_of
from ocsquant.planning import covers, linear_places, parameter_holders
from ocsquant.progress import bar_of
from ocsquant.qat.config import SKIP, Config
from ocsquant.qat.hooks import hook_root
from ocsquant.qat.linear import QATLinear, prepared_layers
from ocsquant.qat.penalty import Penalty
from ocsquant.reporting import Layer
from ocsquant.transaction import Change, become, commit, inherit, set_attribute, temporarily


def prepare(
    model: nn.Module, config: Config | None = None, *, calibration: Any = None, progress: bool | None = None
) -> nn.Module:
    """Make a model's nn.Linear layers train through quantization, in place, and return the model.

        model = ocsquant.qat.prepare(model, ocsquant.qat.Config(activation_bits=4), calibration=batches)
        optimizer = torch.optim.AdamW(ocsquant.qat.param_groups(model, lr, weight_decay))
        loss = ocsquant.qat.with_kurtosis(model, loss)   # in your loop, before loss.backward()

    A model whose output has a `loss` (those of transformers) needs no third line: a hook wraps it. What was prepared,
    and what was not and why, `ocsquant.report(model)` lists.

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
    layers, skipped = linear_places(model, config.skip, check=config.skip != SKIP)
    for pattern in config.kurtosis_on:
        if not any(covers(pattern, paths) for paths, _ in layers):
            expected = "patterns that match a layer to be prepared"
            raise ArgumentError("config.kurtosis_on", expected, f"{pattern!r}, which matches none")
    if config.needs_calibration and calibration is None:
        raise NotCalibratedError(
            f"calibration must be batches or statistics for this config: {len(layers)} layers need to know their "
            f"inputs, the first is '{layers[0][0][0]}'"
        )
    changes: list[Change] = []
    lines = redirect(model, {id(layer) for _, layer in layers}, changes)
    with torch.no_grad():
        seen = Statistics()
        if config.needs_calibration:
            # Attention must call its projection for calibration to see it.
            seen = temporarily(changes, lambda: _seen(model, calibration, progress))
            unseen = [paths[0] for paths, _ in layers if paths[0] not in seen]
            if unseen:
                raise NotCalibratedError(f"calibration reached none of these layers: {first_few(unseen)}")
        penalty = Penalty(config.kurtosis_weight) if config.kurtosis_weight > 0 else None
        holders = parameter_holders(model)
        for paths, layer in layers:
            penalized = any(covers(pattern, paths) for pattern in config.kurtosis_on)
            new = QATLinear(layer, config, penalty if penalized else None)
            fixed = _fix(new, layer, config, paths[0], seen.get(paths[0]), len(holders[id(layer.weight)]) > 1)
            changes += [become(layer, inherit(new, layer)), *fixed]
            lines.append(_line(paths[0], new))
        if penalty is not None:
            changes.append(hook_root(model))
        lines += [Layer(path, kind, reason=reason) for path, kind, reason in skipped]
        changes.append(set_attribute(model, reporting.ATTRIBUTE, tuple(lines)))
        commit(changes)
    return model


def _line(path: str, layer: QATLinear) -> Layer:
    c = layer.config
    split = 0 if layer.splits is None else int((layer.splits > 1).sum())
    reason = "" if layer.penalty is None else "its output's kurtosis is penalized"
    return Layer(
        path, "Linear", c.weight_bits, c.activation_bits, split, kernel="float, rounded in training", reason=reason
    )


def _seen(model: nn.Module, calibration: Any, progress: bool | None) -> Statistics:
    return statistics_of(model, calibration, lambda batches: bar_of(batches, progress, "calibrate", "batch"))


def _fix(
    new: QATLinear, layer: nn.Linear, config: Config, path: str, seen: InputStatistics | None, shared: bool
) -> list[Change]:
    """Give the new layer its input scales, splits and clips; the change of the weight is for the commit.

    shared: another layer holds the same weight, so that it can take over nobody's input scales.
    """
    (matrix,) = matrices(layer, path)
    changes: list[Change] = []
    if seen is not None and seen.total.numel() != layer.in_features:
        raise ArgumentError(
            "calibration", f"statistics in which '{path}' has {layer.in_features} channels", seen.total.numel()
        )
    if config.fold == "channel" and not shared:
        assert seen is not None
        scale = power_of_two_scales(seen.absmax)
        new.input_inverse = 1.0 / scale
        folded = layer.weight.detach() * scale.to(layer.weight.dtype)
        check_finite(folded, f"{path}.weight, folded,")
        changes.append(_set_weight(layer._parameters["weight"], folded))  # type: ignore[arg-type]
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


def _set_weight(weight: nn.Parameter, values: Tensor) -> Change:
    """The parameter stays the one that optimizers and other modules hold."""
    old = weight.data
    return lambda: setattr(weight, "data", values), lambda: setattr(weight, "data", old)


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
    layers = prepared_layers(model).values()
    check_number("lr", lr, 0.0, 1e6)
    check_number("weight_decay", weight_decay, 0.0, 1e6)
    check_type("betas", betas, (tuple, list), "two numbers")
    if len(betas) != 2:
        raise ArgumentError("betas", "two numbers", betas)
    for beta in betas:
        check_number("betas", beta, 0.0, 1.0)
    clips = [c for layer in layers for c in (layer.clip_neg, layer.clip_pos) if c is not None and c.requires_grad]
    own = {id(c) for c in clips}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr, "weight_decay": weight_decay, "betas": tuple(betas)}]
    if clips:
        groups.append({"params": clips, "lr": lr, "weight_decay": 0.0, "betas": (0.0, betas[1])})
    return groups
