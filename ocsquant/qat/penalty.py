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
from torch import Tensor

from ocsquant.ops import kurtosis
from ocsquant.ops.library import compiled

REFERENCE_WIDTH = (
    64  # outputs of a layer at which weights are quoted; the gradient of one output falls with their number
)
_inject = compiled.kurtosis_inject.default
_anchor = compiled.kurtosis_anchor.default
_handles = itertools.count(1)
_penalties: weakref.WeakValueDictionary[int, Penalty] = weakref.WeakValueDictionary()


class Penalty:
    """What the penalized layers of one prepared model share.

    `weight` may change from step to step; `scale` is the 0-dim tensor that backward reads; `outputs` holds what eager
    layers gave since the model's last forward began, with each layer's own factor and target.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.scale = torch.zeros((), dtype=torch.float32)
        self.outputs: dict[int, tuple[Tensor, float, float]] = {}
        self.anchored = self.explicit = False
        self._count = itertools.count()
        self.handle = next(_handles)
        _penalties[self.handle] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Penalty:
        return Penalty(self.weight)

    def __reduce__(self) -> tuple[type[Penalty], tuple[float]]:
        return Penalty, (self.weight,)

    def begin(self) -> None:
        """A new forward: what the one before it left is forgotten."""
        self.outputs.clear()
        self.anchored = self.explicit = False

    def apply(self, y: Tensor, target: float, log: Tensor) -> Tensor:
        """`y`, which gets its share of the penalty in backward."""
        factor = y.shape[-1] / REFERENCE_WIDTH
        done = None
        if not torch.compiler.is_compiling() and not _is_checkpointed():
            key = next(self._count)
            self.outputs[key] = (y, factor, target)
            done = _Forget(self.outputs, key)
        return _Inject.apply(y, self.scale, factor, target, log, done)

    def loss(self) -> Tensor:
        """The penalty as a term of the loss."""
        terms = [factor * (kurtosis(y) - target).clamp(min=0.0).mean() for y, factor, target in self.outputs.values()]
        return self.weight * torch.stack(terms).sum()


def _is_checkpointed() -> bool:
    """Whether outputs are to be recomputed or are just being: keeping them would undo that."""
    if torch._C._current_graph_task_id() != -1:
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _Forget:
    """Drops one output; a bound method would keep the whole penalty alive through the graph."""

    def __init__(self, outputs: dict[int, Any], key: int) -> None:
        self.outputs, self.key = outputs, key

    def __call__(self) -> None:
        self.outputs.pop(self.key, None)


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
        # Through .data: the scale is a saved tensor of the layers' backward.
        factor = grad.detach().reshape(()).float() * found.weight
        found.scale.data.copy_(factor if share is None else factor * share)
        torch.autograd.Variable._execution_engine.queue_callback(_Clear(found.scale))
    return grad.clone()


class _Clear:
    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self) -> None:
        self.scale.data.zero_()
