"""The kurtosis penalty of a model in training: carried by its gradient alone, so that there is nothing to collect.

Every penalized layer passes its output through a function whose backward adds scale * d(penalty)/dy. The scale, one
number for the whole model, is 0 but for the time between two moments of a backward pass: the anchor on the loss, which
writes the loss's own incoming gradient into it (1 / accumulation steps, a loss scale), and the end of that pass.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ocsquant.ops import kurtosis
from ocsquant.ops.library import check_once, compiled

REFERENCE_WIDTH = 64  # outputs for which weights are quoted; the gradient of one output falls with their number
_inject = compiled.kurtosis_inject.default
_anchor = compiled.kurtosis_anchor.default
_handles = itertools.count(1)
_penalties: weakref.WeakValueDictionary[int, Penalty] = weakref.WeakValueDictionary()


class Penalty:
    """What the penalized layers of one prepared model share.

    `weight` may change from step to step; `scale` is the 0-dim tensor that backward reads; `outputs` holds what eager
    layers, by their id, gave since the model's last forward began. `acted`: some step let it act.
    """

    def __init__(self, weight: float, acted: bool = False) -> None:
        self.weight, self.acted = weight, acted
        self.scale = torch.zeros((), dtype=torch.float32, device="cpu")
        self.outputs: dict[int, list[Tensor]] = {}
        self.anchored = self.explicit = False
        self.handle = next(_handles)
        _penalties[self.handle] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Penalty:
        return Penalty(self.weight, self.acted)

    def __reduce__(self) -> tuple[type[Penalty], tuple[float, bool]]:
        return Penalty, (self.weight, self.acted)

    def begin(self) -> None:
        """A new forward: what the one before it left is forgotten."""
        self.outputs.clear()
        self.rest()
        if torch._C._current_graph_task_id() == -1:  # after a backward that an exception ended
            self.scale.data.zero_()

    def rest(self) -> None:
        """The step is over."""
        self.anchored = self.explicit = False

    def apply(self, layer: nn.Module, y: Tensor, target: float, log: Tensor) -> Tensor:
        """The layer's output `y`, which gets its share of the penalty in backward."""
        done = None
        if not torch.compiler.is_compiling() and not _is_checkpointed():
            kept = self.outputs.setdefault(id(layer), [])
            kept.append(y)
            done = _Forget(self, id(layer))
        return _Inject.apply(y, self.scale, factor_of(y), target, log, done)

    def loss(self, layer: nn.Module, target: float) -> Tensor:
        """The penalty of one layer's outputs, as a term of the loss."""
        kept = [y for y in self.outputs[id(layer)] if y.numel()]
        terms = [factor_of(y) * (kurtosis(y) - target).clamp(min=0.0).mean() for y in kept]
        return self.weight * torch.stack(terms).sum() if terms else torch.zeros(())


def factor_of(y: Tensor) -> float:
    """By how much a layer's width exceeds the one that weights are quoted for."""
    return y.shape[-1] / REFERENCE_WIDTH


def _is_checkpointed() -> bool:
    """Whether outputs are to be recomputed or are just being: keeping them would undo that."""
    if torch._C._current_graph_task_id() != -1:
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _Forget:
    """Drops a layer's outputs. It hangs on the graph that those hold: weakly, or neither would ever be freed."""

    def __init__(self, penalty: Penalty, key: int) -> None:
        self.penalty, self.key = weakref.ref(penalty), key

    def __call__(self) -> None:
        if (penalty := self.penalty()) is not None:
            penalty.outputs.pop(self.key, None)
            penalty.rest()


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        scale: Tensor,
        factor: float,
        target: float,
        log: Tensor,
        done: Callable[[], None] | None,
    ) -> Tensor:
        ctx.save_for_backward(y, scale)
        ctx.factor, ctx.target, ctx.log, ctx.done = factor, target, log, done
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_once("the kurtosis penalty")
        y, scale = ctx.saved_tensors
        if ctx.done is not None:
            ctx.done()
        return _inject(grads[0], y, scale, ctx.factor, ctx.target, ctx.log), None, None, None, None, None


class Anchor(torch.autograd.Function):
    """The identity; backward tells the penalty what gradient the loss gets."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, handle: int, share: Tensor | None) -> Tensor:
        ctx.handle, ctx.share = handle, share
        return loss.clone()  # transformers' Trainer multiplies it in place, which a view made here would not bear

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _anchor(grads[0], ctx.handle, ctx.share), None, None


@torch.library.impl("ocsquant::kurtosis_anchor", "CPU")
def _(grad: Tensor, penalty: int, share: Tensor | None = None) -> Tensor:
    # The penalty is named by a number, not passed as a tensor to be mutated: a compiler would hand over a copy. That
    # the layers' backward comes later follows from the graph: their gradients are computed from this one.
    found = _penalties.get(penalty)
    if found is not None and torch._C._current_graph_task_id() != -1:
        found.acted = True
        factor = grad.detach().reshape(()).float() * found.weight
        # Through .data: the scale is a saved tensor of the layers' backward.
        found.scale.data.copy_(factor if share is None else factor * share)
        torch.autograd.Variable._execution_engine.queue_callback(_End(found))
    return grad.clone()


class _End:
    """Of a backward pass."""

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty

    def __call__(self) -> None:
        self.penalty.scale.data.zero_()
        self.penalty.rest()
