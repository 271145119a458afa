"""A convolution's output that is added to another tensor before its nonlinearity: both in the convolution's kernel."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ocsquant.nn.fused import applied
from ocsquant.ops.nonlinear import NONLINEARITIES

# When the code adds to a convolution's output: at once, or after other code that might change what it has read.
NEXT, LATER = "next", "later"
# Of a tensor, looked up in the class.
UNARY = ("neg", "pos", "abs", "invert", "len", "iter", "bool", "float", "int", "index", "complex")
BINARY = ("sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
OTHERS = ("lt", "le", "eq", "ne", "gt", "ge", "getitem", "setitem", "contains")


class PendingSum:
    """Stands for a convolution's output until code adds a tensor to it with + or +=, which the convolution does itself.

    That sum has passed the nonlinearity and is marked so for the `FusedNonlinearity` behind it. It is computed in one
    with the convolution where it is one of float32 tensors of `sizes`. Whatever else is done to this object is done to
    the convolution's own output, from then on a tensor like any other.

    convolution: called with a residual it gives the nonlinearity of the sum, called with None its output alone.
    sizes: of the residuals that it takes; None if it takes none.
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

    def _sum(self, other: Any, add: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """By the convolution where it can add that, else by `add` to its output."""
        other = other.output() if isinstance(other, PendingSum) else other
        plain = isinstance(other, Tensor) and other.dtype == torch.float32 and tuple(other.shape) == self._sizes
        if plain and self._alone is None:
            return applied(self._convolution(other), self._nonlinearity)
        return applied(NONLINEARITIES[self._nonlinearity](add(self.output(), other)), self._nonlinearity)

    def __add__(self, other: Any) -> Tensor:
        return self._sum(other, operator.add)

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Tensor:
        return self._sum(other, operator.iadd)  # of the output's dtype and sizes, whatever the other's are

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.add and len(args) == 2 and isinstance(args[1], cls) and not kwargs:  # tensor + this
            return args[1] + args[0]

        def tensor(value: Any) -> Any:
            return value.output() if isinstance(value, cls) else value

        return func(*tree_map(tensor, args), **tree_map(tensor, kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in ("_convolution", "_sizes", "_nonlinearity", "_alone"):  # not there yet, as in a copy
            raise AttributeError(name)
        return getattr(self.output(), name)

    __hash__ = object.__hash__


def _of_output(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self.output(), name)(*args)


for _name in (*UNARY, *OTHERS, *(f"{kind}{name}" for name in BINARY for kind in ("", "r", "i"))):
    if hasattr(Tensor, f"__{_name}__"):
        setattr(PendingSum, f"__{_name}__", _of_output(f"__{_name}__"))
