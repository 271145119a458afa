"""The nonlinearities that a linear layer can compute while it writes its output, alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ocsquant.ops.library import bind, check_there, compiled, wants_gradient

# As PyTorch computes them.
NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_nonlinear = compiled.nonlinear.default


def nonlinear(x: Tensor, nonlinearity: str) -> Tensor:
    """A nonlinearity of every value, with the bits that `quantized_linear` with this `nonlinearity` makes of its
    float32 sums.

    Args:
        x: float32 or bfloat16 of any shape.
        nonlinearity: "none", "relu", "gelu", "gelu_tanh" (its approximation by tanh), "silu", "sigmoid" or "tanh";
            within 3e-7 of |x| or of the result, whichever is larger.

    Returns:
        The shape and dtype of `x`, contiguous. Where a gradient is asked for, PyTorch's own function computes it.
    """
    check_there("nonlinear", "x", x)
    return followed("nonlinear", x, nonlinearity) if wants_gradient(x) else _nonlinear(x, nonlinearity)


def followed(op: str, x: Tensor, nonlinearity: str) -> Tensor:
    """PyTorch's form of it, for gradients."""
    if nonlinearity == "none":
        return x
    if nonlinearity not in NONLINEARITIES:
        raise RuntimeError(f"{op}: nonlinearity must be none, {', '.join(NONLINEARITIES)}, got {nonlinearity}")
    return NONLINEARITIES[nonlinearity](x)


@torch.library.register_fake("ocsquant::nonlinear")
def _(*args: Any) -> Tensor:
    return torch.empty_like(bind("nonlinear", args)["x"], memory_format=torch.contiguous_format)
