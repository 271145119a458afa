"""How the penalty reaches a training loop: `with_kurtosis` on the loss, or `kurtosis_loss` as a term of it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ocsquant.config import check_number, check_type
from ocsquant.errors import ArgumentError, PenaltyError, first_few
from ocsquant.qat.linear import QATLinear, prepared_layers
from ocsquant.qat.penalty import Anchor, Penalty


def penalties_of(model: nn.Module) -> list[Penalty]:
    """Of a prepared model, or of each one inside it."""
    found: dict[int, Penalty] = {}
    for module in model.modules():
        if isinstance(module, QATLinear) and module.penalty is not None:
            found[module.penalty.handle] = module.penalty
    return list(found.values())


def _penalties(model: nn.Module) -> list[Penalty]:
    check_type("model", model, nn.Module, "a torch.nn.Module")
    found = penalties_of(model)
    if not found:
        prepared_layers(model)  # none at all is an error, none that is penalized is not
    return found


def with_kurtosis(model: nn.Module, loss: Tensor, share: float | Tensor | None = None) -> Tensor:
    """The loss, unchanged; its backward adds the kurtosis penalty's gradient in the layers of a prepared model.

    Whatever factor the loss gets afterwards (accumulation, a GradScaler) the penalty gets too. Works in eager mode,
    inside and outside of compiled regions, with activation checkpointing of both kinds and under DDP. One backward pass
    has one anchor, outside of regions that a reentrant checkpoint runs again: put it on the sum of several losses. Not
    differentiable twice.

    Args:
        model: of `prepare`, or one that holds it (DDP, a compiled model).
        loss: a tensor of one entry that was computed from the model's output.
        share: how much of an accumulated batch this one is, 0..1 (a number, or a tensor of one entry), for a loop that
            sums losses already divided by the whole batch's tokens, as transformers' Trainer does. None: 1.

    Raises:
        PenaltyError: this forward's `kurtosis_loss` was taken already: the penalty would count twice.
    """
    check_type("loss", loss, Tensor, "a tensor")
    if loss.numel() != 1:
        raise ArgumentError("loss", "a tensor of one entry", list(loss.shape))
    if isinstance(share, Tensor):
        if share.numel() != 1:
            raise ArgumentError("share", "a number or a tensor of one entry", list(share.shape))
        share = share.detach().reshape(()).float()
    elif share is not None:
        check_number("share", share, 0.0, 1.0)
        share = torch.tensor(float(share))
    for penalty in _penalties(model):
        if not torch.compiler.is_compiling():
            if penalty.explicit:
                raise PenaltyError("kurtosis_loss and with_kurtosis in one step would count the penalty twice")
            penalty.anchored = True
        loss = Anchor.apply(loss, penalty.handle, share)
    return loss


def kurtosis_loss(model: nn.Module) -> Tensor:
    """The penalty of the last eager forward in training mode, as a term to add to the loss.

    Instead of `with_kurtosis`, where a loop wants to see it; under compilation and activation checkpointing there is
    nothing to see.

    Raises:
        PenaltyError: a penalized layer gave no output in such a forward, or `with_kurtosis` was applied to this one.
    """
    layers = {path: layer for path, layer in prepared_layers(model).items() if layer.penalty is not None}
    penalties = penalties_of(model)
    if any(penalty.anchored for penalty in penalties):
        raise PenaltyError(
            "kurtosis_loss and with_kurtosis in one step would count the penalty twice (an output's own `loss` has "
            "passed with_kurtosis already)"
        )
    absent = [path for path, layer in layers.items() if layer.penalty and id(layer) not in layer.penalty.outputs]
    if absent:
        raise PenaltyError(
            f"kurtosis_loss needs every penalized layer's output of an eager forward in training mode since the last "
            f"backward, and {len(absent)} are missing: {first_few(absent)}; under compilation and activation "
            f"checkpointing use with_kurtosis(model, loss)"
        )
    for penalty in penalties:
        penalty.explicit = penalty.acted = True
    terms = [layer.penalty.loss(layer, layer.config.kurtosis_target) for layer in layers.values() if layer.penalty]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def set_kurtosis_weight(model: nn.Module, weight: float) -> None:
    """Change the penalty's factor from the next backward on; no compiled graph depends on it.

    Raises ArgumentError for a model prepared without a penalty.
    """
    check_number("weight", weight, 0.0, 1e6)
    found = _penalties(model)
    if not found:
        raise ArgumentError("model", "a model prepared with a kurtosis_weight above 0", type(model).__name__)
    for penalty in found:
        penalty.weight = float(weight)


def kurtosis_report(model: nn.Module) -> dict[str, float]:
    """Layer path -> mean kurtosis of its outputs since the last call, of the penalized layers that backward reached.

    Warns where backward ran and the penalty never acted.
    """
    layers = {path: layer for path, layer in prepared_layers(model).items() if layer.penalty is not None}
    warn_if_idle(list(layers.values()))
    report = {}
    for path, layer in layers.items():
        total, rows = layer.log[:2].tolist()
        if rows:
            report[path] = total / rows
            layer.log[:2].zero_()
    return report


def warn_if_idle(layers: list[QATLinear]) -> None:
    """Warn where a penalty was asked for, backward ran and no anchor was passed."""
    asked = [layer for layer in layers if layer.penalty is not None and layer.penalty.weight > 0]
    if any(bool(layer.log[2] > 0) for layer in asked) and not any(p.penalty.acted for p in asked if p.penalty):
        warnings.warn(
            "the kurtosis penalty never acted: pass the loss through ocsquant.qat.with_kurtosis(model, loss)",
            stacklevel=3,
        )
