"""Commit a prepared list of changes to a model, or none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip

FOLDED = "_ocsquant_folded"  # an attribute of a convolution that has taken over a BatchNorm, whatever form it has

T = TypeVar("T")
Change = tuple[Callable[[], Any], Callable[[], Any]]  # do, undo


def inherit(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give `new` the mode and hooks of `old`; the hooks' handles keep working, since the dictionaries are shared."""
    new.training = old.training
    if old.__dict__.get(FOLDED):
        new.__dict__[FOLDED] = True
    for name in HOOKS:
        new.__dict__[name] = old.__dict__[name]
    return new


def hooked(module: nn.Module) -> bool:
    return any(module.__dict__[name] for name in HOOKS if name != "_is_full_backward_hook")


def become(module: nn.Module, new: nn.Module) -> Change:
    """Turn `module` itself into `new`: every reference to it sees the change, be it a parent, a list or a wrapper."""
    old_class, old_state = module.__class__, dict(module.__dict__)

    def turn(cls: type, state: dict[str, Any]) -> None:
        module.__dict__.clear()
        module.__dict__.update(state)
        module.__class__ = cls

    return lambda: turn(new.__class__, new.__dict__), lambda: turn(old_class, old_state)


def set_class(module: nn.Module, cls: type) -> Change:
    old = module.__class__
    return lambda: object.__setattr__(module, "__class__", cls), lambda: object.__setattr__(module, "__class__", old)


_ABSENT = object()


def set_attribute(module: nn.Module, name: str, value: Any) -> Change:
    """A plain attribute, past nn.Module's bookkeeping."""
    old = module.__dict__.get(name, _ABSENT)

    def undo() -> None:
        if old is _ABSENT:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = old

    return lambda: module.__dict__.__setitem__(name, value), undo


def commit(changes: list[Change]) -> None:
    """Make every change; if anything interrupts, KeyboardInterrupt included, take back those already begun."""
    begun: list[Callable[[], Any]] = []
    try:
        for do, undo in changes:
            begun.append(undo)
            do()
    except BaseException:
        _take_back(begun)
        raise


def temporarily(changes: list[Change], action: Callable[[], T]) -> T:
    """What `action` returns with the changes made, which are taken back in any case, whatever interrupts."""
    undos = [undo for _, undo in changes]
    commit(changes)
    try:
        return action()
    finally:
        try:
            _take_back(undos)
        except BaseException:
            _take_back(undos)  # each may be done twice
            raise


def _take_back(undos: list[Callable[[], Any]]) -> None:
    """All of them, even if one fails."""
    failed: BaseException | None = None
    for undo in reversed(undos):
        try:
            undo()
        except BaseException as error:
            failed = error
    if failed is not None:
        raise failed
