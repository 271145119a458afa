"""The hooks of a prepared model's root: one forgets the outputs of the last forward, one finds the loss of this one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ocsquant.qat.losses import penalties_of, with_kurtosis
from ocsquant.transaction import Change


class BeginForward:
    """A forward pre-hook."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling() and module.training:
            for penalty in penalties_of(module):
                penalty.begin()


class AnchorLoss:
    """A forward hook that passes `output.loss`, where there is one, through `with_kurtosis`."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1 and module.training:
            output.loss = with_kurtosis(module, loss, _share(kwargs))


def _share(kwargs: dict[str, Any]) -> Tensor | None:
    """Of the accumulated batch, where transformers says how many tokens that has."""
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return None
    return (labels[..., 1:] != -100).sum() / items


def hook_root(model: nn.Module) -> Change:
    """A change that puts both hooks on the model."""
    return lambda: _add(model), lambda: _remove(model)


def unhook_root(model: nn.Module) -> Change:
    """A change that takes them off."""
    return lambda: _remove(model), lambda: _add(model)


def _add(model: nn.Module) -> None:
    model.register_forward_pre_hook(BeginForward())
    model.register_forward_hook(AnchorLoss(), with_kwargs=True)


def _remove(model: nn.Module) -> None:
    hooks: Any
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, (BeginForward, AnchorLoss))]:
            del hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)
