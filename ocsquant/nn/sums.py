"""A convolution's output that is added to another tensor before its nonlinearity: both in the convolution's kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ocsquant.nn.fused import applied
from ocsquant.ops.nonlinear import NONLINEARITIES

ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


class PendingSum:
    """Stands for what a convolution gives until something is added to it, which `convolution` then does itself.

    The sum is a tensor that has passed the nonlinearity, and tells the `FusedNonlinearity` it is for. Whatever else
    is done to this object is done to the convolution's own output, from then on a tensor like any other.

    convolution: called with a residual it gives the nonlinearity of the sum, called with None its output alone.
    sizes: of the float32 residuals that it takes; None if it takes none.
    """

    def __init__(
        self, convolution: Callable[[Tensor | None], Tensor], sizes: tuple[int, ...] | None, nonlinearity: str
    ) -> None:
        self._convolution, self._sizes, self._nonlinearity = convolution, sizes, nonlinearity
        self._alone: Tensor | None = None

    def output(self) -> Tensor:
        """Of the convolution, computed once."""
        if self._alone is None:
            self._alone = self._convolution(None)
        return self._alone

    def __add__(self, other: Any) -> Any:
        if isinstance(other, PendingSum):
            other = other.output()
        plain = isinstance(other, Tensor) and other.dtype == torch.float32 and tuple(other.shape) == self._sizes
        if plain and self._alone is None:
            return applied(self._convolution(other), self._nonlinearity)
        return applied(NONLINEARITIES[self._nonlinearity](self.output() + other), self._nonlinearity)

    __radd__ = __iadd__ = __add__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ADDITIONS and len(args) == 2 and not kwargs:
            first, second = args
            return first + second if isinstance(first, cls) else second + first

        def tensor(value: Any) -> Any:
            return value.output() if isinstance(value, cls) else value

        return func(*tree_map(tensor, args), **tree_map(tensor, kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in ("_convolution", "_sizes", "_nonlinearity", "_alone"):  # not there yet, as in a copy
            raise AttributeError(name)
        return getattr(self.output(), name)
