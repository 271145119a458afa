"""Fold BatchNorm into the convolution before it."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ocsquant.errors import ArgumentTypeError
from ocsquant.inputs import run_batches
from ocsquant.layers import CONVOLUTIONS
from ocsquant.reporting import Layer
from ocsquant.transaction import FOLDED, Change, become, hooked, inherit

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BATCH = (Tensor, tuple, list, Mapping)


class FoldedBatchNorm(nn.Identity):
    """In the place of a BatchNorm that the convolution before it has taken over."""


def check_fold(value: Any) -> None:
    if not isinstance(value, (bool, *BATCH)):
        expected = "True, False or a batch to run the model on: a tensor, a tuple or list, or a mapping"
        raise ArgumentTypeError("fold_batchnorm", expected, repr(value))


def fold_batchnorms(model: nn.Module, how: Any) -> tuple[list[Change], dict[int, nn.Module], list[Layer]]:
    """Changes that fold conv -> BN pairs, the folded form of each convolution, report lines.

    `how`: True for the neighbours in an nn.Sequential, a batch for what running the model on it shows, too.
    """
    if how is False:
        return [], {}, []
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())

    def plain(module: nn.Module) -> bool:
        changed = hooked(module) or "forward" in module.__dict__
        return not (module.training or uses[id(module)] > 1 or changed)

    pairs = dict(_neighbours(model))
    if how is not True:
        pairs |= dict(_observed(model, how, plain))
    paths = {module: path for path, module in model.named_modules()}
    changes: list[Change] = []
    folded: dict[int, nn.Module] = {}
    layers: list[Layer] = []
    for conv, norm in pairs.items():
        if not (plain(conv) and plain(norm)) or norm.running_var is None:
            continue
        new = inherit(fuse_conv_bn_eval(conv, norm), conv)  # type: ignore[type-var, arg-type]
        if conv.bias is None and new.bias is not None:
            new.bias.requires_grad_(conv.weight.requires_grad)
        new.__dict__[FOLDED] = True
        folded[id(conv)] = new
        changes += [become(conv, new), become(norm, inherit(FoldedBatchNorm(), norm))]
        layers.append(Layer(paths[norm], type(norm).__name__, reason="folded into the convolution"))
    return changes, folded, layers


def _neighbours(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for sequence in model.modules():
        if isinstance(sequence, nn.Sequential):
            for conv, norm in pairwise(sequence):
                if type(conv) in CONVOLUTIONS and type(norm) in BATCH_NORMS:
                    yield conv, norm


def _address(value: Any) -> int:
    """Of a tensor's memory; 0 for what has none."""
    try:
        return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors
        return 0


class _Readers(TorchDispatchMode):
    """For the output of each convolution, while it lives, what read it: a BatchNorm, or None for anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[nn.Module] = []  # BatchNorms
        self.of: dict[int, set[nn.Module | None]] = {}  # by the address of its memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read((args, kwargs), self.running[-1] if self.running else None)
        return func(*args, **(kwargs or {}))

    def read(self, values: Any, reader: nn.Module | None) -> None:
        for value in tree_leaves(values):
            if (seen := self.of.get(_address(value))) is not None:
                seen.add(reader)


@dataclass
class _Given:
    """What a convolution gave: its calls, the last output, and what read that."""

    calls: int = 0
    output: Callable[[], Any] = lambda: None  # a weak reference
    readers: set[nn.Module | None] = field(default_factory=set)


def _observed(
    model: nn.Module, batch: Any, plain: Callable[[nn.Module], bool]
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Pairs where the BatchNorm, and nothing beside it, reads what the convolution gives; both are called once."""
    readers = _Readers()
    given: defaultdict[nn.Module, _Given] = defaultdict(_Given)
    calls: Counter[nn.Module] = Counter()
    takes: dict[nn.Module, nn.Module] = {}  # by BatchNorm: the convolution whose very output it was given
    opaque = False

    def after_conv(conv: nn.Module, args: Any, output: Any) -> None:
        known = given[conv]
        known.calls += 1
        if at := _address(output):
            known.output, known.readers = weakref.ref(output), set()
            readers.of[at] = known.readers
            weakref.finalize(output, readers.of.pop, at, None)

    def before_norm(norm: nn.Module, args: Any) -> None:
        calls[norm] += 1
        readers.running.append(norm)
        for conv, known in given.items():
            if args and known.output() is args[0]:
                takes[norm] = conv

    def after_norm(norm: nn.Module, args: Any, output: Any) -> None:
        del readers.running[-1:]  # there is none where before_norm() was interrupted

    def after_model(model: nn.Module, args: Any, output: Any) -> None:
        nonlocal opaque
        readers.read(output, None)
        opaque = not all(isinstance(v, (Tensor, int, float, str, type(None))) for v in tree_leaves(output))

    with ExitStack() as stack:
        for module in model.modules():
            if plain(module) and type(module) in CONVOLUTIONS:
                stack.callback(module.register_forward_hook(after_conv).remove)
            elif plain(module) and type(module) in BATCH_NORMS:
                stack.callback(module.register_forward_pre_hook(before_norm).remove)
                stack.callback(module.register_forward_hook(after_norm, always_call=True).remove)
        stack.callback(model.register_forward_hook(after_model).remove)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(readers)
        run_batches(model, [batch])
    for norm, conv in takes.items():
        known = given[conv]
        kept = known.output() is not None  # somewhere beyond the run
        if not opaque and not kept and known.calls == calls[norm] == 1 and known.readers == {norm}:
            yield conv, norm
