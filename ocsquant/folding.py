"""Fold BatchNorm into the convolution before it."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ocsquant.errors import ArgumentError
from ocsquant.inputs import change_of, output_of
from ocsquant.layers import CONVOLUTIONS
from ocsquant.reporting import Layer
from ocsquant.transaction import FOLDED, Change, become, hooked, inherit, temporarily

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TOLERANCE = 0.02  # of an output's norm: bfloat16 keeps 8 bits, a wrong fold is far beyond


class FoldedBatchNorm(nn.Identity):
    """In the place of a BatchNorm that the convolution before it has taken over."""


def fold_batchnorms(model: nn.Module, how: Any) -> tuple[list[Change], dict[int, nn.Module], list[Layer]]:
    """Changes that fold conv -> BN pairs, the folded form of each convolution, report lines.

    `how`: True for the neighbours in an nn.Sequential, a batch for what running the model on it shows. Raises
    ArgumentError where the folded model does not give on the batch what the model gives.
    """
    if how is False:
        return [], {}, []
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks

    def plain(module: nn.Module) -> bool:
        changed = hooked(module) or everywhere or "forward" in module.__dict__
        return not (module.training or uses[id(module)] > 1 or changed)

    run = None if how is True else _Run(model, how, plain)
    pairs = dict(_neighbours(model) if run is None else run.pairs())
    paths = {module: path for path, module in model.named_modules()}
    changes: list[Change] = []
    folded: dict[int, nn.Module] = {}
    layers: list[Layer] = []
    for conv, norm in pairs.items():
        if norm.running_var is None or norm.num_features != conv.out_channels or not (plain(conv) and plain(norm)):
            continue
        new = _fused(conv, norm)
        folded[id(conv)] = new
        changes += [become(conv, new), become(norm, inherit(FoldedBatchNorm(), norm))]
        layers.append(Layer(paths[norm], type(norm).__name__, reason="folded into the convolution"))
    if run is not None and changes:
        run.check(changes)
    return changes, folded, layers


def _fused(conv: Any, norm: Any) -> nn.Module:
    """The convolution with the BatchNorm's scale and shift, reckoned in float32 at least."""
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, mean, variance, scale, shift = (None if t is None else t.to(wide) for t in tensors)
    fused = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)  # type: ignore[arg-type]
    new = copy.copy(conv)
    new.__dict__ = {**conv.__dict__, "_parameters": dict(conv._parameters)}
    for name, values in zip(("weight", "bias"), fused, strict=True):
        new._parameters[name] = nn.Parameter(values.detach().to(conv.weight.dtype), conv.weight.requires_grad)
    new.__dict__[FOLDED] = True
    return inherit(new, conv)


def _neighbours(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    for sequence in model.modules():
        if isinstance(sequence, nn.Sequential) and type(sequence).forward is nn.Sequential.forward:
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
    """What has read some tensors: the watched module that was running, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.of: dict[int, set[nn.Module | None]] = {}  # by the address of a tensor's memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reader = self.running[-1] if self.running else None
        for value in tree_leaves((args, kwargs)):
            if (seen := self.of.get(_address(value))) is not None:
                seen.add(reader)
        return func(*args, **(kwargs or {}))


@dataclass
class _Watched:
    """A convolution or a BatchNorm: its calls, the last input and output, what read that, and its parameters."""

    calls: int = 0
    input: Any = None
    output: Any = None
    readers: set[nn.Module | None] = field(default_factory=set)
    readers_of_own: set[nn.Module | None] = field(default_factory=set)


class _Run:
    """One run of a model on a batch: who reads what the convolutions give, and what the model gives."""

    def __init__(self, model: nn.Module, batch: Any, plain: Callable[[nn.Module], bool]) -> None:
        self.model, self.batch = model, batch
        kinds = (*CONVOLUTIONS, *BATCH_NORMS)
        self.watched = {m: _Watched() for m in model.modules() if type(m) in kinds and plain(m)}
        self.readers = _Readers()
        for module, known in self.watched.items():
            for own in (*module.parameters(), *module.buffers()):
                # Of two modules that share it, neither is its only reader.
                self.readers.of[_address(own)] = known.readers_of_own
        with ExitStack() as stack:
            for module in self.watched:
                stack.callback(module.register_forward_pre_hook(self._before).remove)
                stack.callback(module.register_forward_hook(self._after, always_call=True).remove)
            stack.enter_context(self.readers)
            self.output = output_of(model, batch)

    def _before(self, module: nn.Module, args: Any) -> None:
        self.readers.running.append(module)
        self.watched[module].calls += 1
        if type(module) in BATCH_NORMS and args:
            self.watched[module].input = args[0]

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        del self.readers.running[-1:]  # there is none where _before() was interrupted
        known = self.watched[module]
        if type(module) in CONVOLUTIONS and (at := _address(output)):
            # Held until the end, so that no other tensor comes to lie at its address.
            known.output, known.readers = output, set()
            self.readers.of[at] = known.readers

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Where the BatchNorm, and nothing beside it, reads what the convolution gave; both were called once."""
        by_output = {id(known.output): conv for conv, known in self.watched.items() if known.output is not None}
        norms = {norm: known for norm, known in self.watched.items() if type(norm) in BATCH_NORMS}
        found = [(by_output[id(known.input)], norm) for norm, known in norms.items() if id(known.input) in by_output]
        for known in norms.values():
            known.input = None
        for conv, norm in found:
            a, b = self.watched[conv], self.watched[norm]
            # Held by the record and by the argument of getrefcount alone.
            kept = sys.getrefcount(a.output) > 2
            own = a.readers_of_own == {conv} and b.readers_of_own == {norm}
            batched = a.output.dim() == conv.weight.dim()  # type: ignore[operator]
            if a.calls == b.calls == 1 and a.readers == {norm} and own and batched and not kept:
                yield conv, norm

    def check(self, changes: list[Change]) -> None:
        """Run the model with the changes, which are taken back in any case."""
        try:
            output = temporarily(changes, lambda: output_of(self.model, self.batch))
        except (AttributeError, RuntimeError, TypeError) as error:
            expected = "a model that runs without its BatchNorms"
            raise ArgumentError("fold_batchnorm", expected, f"{error!r}") from error
        change = change_of(self.output, output)
        if not change <= TOLERANCE:
            expected = "a model whose BatchNorms alone read what their convolutions give"
            raise ArgumentError("fold_batchnorm", expected, f"one whose output changes by {change:.2g}")
