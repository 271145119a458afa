"""The hooks of a prepared model's root: one forgets the outputs of the last forward, one finds the loss of this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
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
    """A forward hook that passes an output's `loss`, where there is one, through `with_kurtosis`."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or not loss.requires_grad or loss.numel() != 1 or not module.training:
            return None
        if not penalties_of(module):
            return None
        return _replaced(output, with_kurtosis(module, loss, _share(module, kwargs)))


def _replaced(output: Any, loss: Tensor) -> Any:
    """The output with another loss: itself, or a copy where it cannot be changed."""
    if isinstance(output, MutableMapping):
        output["loss"] = loss
        return output
    if isinstance(output, tuple):
        return output._replace(loss=loss)  # type: ignore[attr-defined]
    try:
        output.loss = loss
    except dataclasses.FrozenInstanceError:
        return dataclasses.replace(output, loss=loss)
    return output


def _share(module: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """Of the accumulated batch, where transformers' Trainer says how many tokens that has: counted as it counts."""
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return None
    if isinstance(shifted := kwargs.get("shift_labels"), Tensor):
        labels = shifted
    elif getattr(module, "loss_type", None) == "ForCausalLM" and labels.dim() > 1:
        if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            labels = labels[..., 1:]
    return (labels != -100).sum() / items


def hook_root(model: nn.Module) -> Change:
    """A change that puts both hooks on the model."""

    def add() -> None:
        model.register_forward_pre_hook(BeginForward())
        model.register_forward_hook(AnchorLoss(), with_kwargs=True)

    return add, _restore(model)


def unhook(model: nn.Module) -> list[Change]:
    """Changes that take them off, from whatever part of the model was prepared."""
    hooked = [m for m in model.modules() if any(map(_is_ours, m._forward_pre_hooks.values()))]
    return [(partial(_remove, module), _restore(module)) for module in hooked]


def _is_ours(hook: object) -> bool:
    return isinstance(hook, (BeginForward, AnchorLoss))


def _remove(module: nn.Module) -> None:
    for hooks in _tables(module)[:2]:
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


def _tables(model: nn.Module) -> list[dict[int, Any]]:
    tables: Any = [model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_with_kwargs]
    return tables


def _restore(model: nn.Module) -> Callable[[], None]:
    """What the model's hooks are now, again; in the same tables, which handles refer to."""
    before = [(table, list(table.items())) for table in _tables(model)]

    def restore() -> None:
        for table, items in before:
            table.clear()
            table.update(items)

    return restore
