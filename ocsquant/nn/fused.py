"""A nonlinearity that the linear layer before it computes while it writes its output."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ocsquant.errors import ArgumentError
from ocsquant.ops.nonlinear import NONLINEARITIES, nonlinear

APPLIED = "_ocsquant_applied"  # of a layer's output: the nonlinearity that it has passed

TYPES: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}
FUNCTIONS: dict[object, str] = {
    F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu", torch.sigmoid: "sigmoid", torch.tanh: "tanh",
}  # fmt: skip
# Of transformers.activations, which is not imported for it; those with an `act` compute that.
TRANSFORMERS = {"SiLUActivation": "silu", "NewGELUActivation": "gelu_tanh", "FastGELUActivation": "gelu_tanh"}
TRANSFORMERS_ACT = ("GELUActivation", "GELUTanh", "PytorchGELUTanh")


def fuses() -> bool:
    """Whether layers do more than their own product now: not with gradients, nor in code that is traced or compiled."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def applied(y: Tensor, nonlinearity: str) -> Tensor:
    """`y`, marked as what a layer with that nonlinearity gave."""
    setattr(y, APPLIED, (nonlinearity, version(y)))
    return y


def version(tensor: Tensor) -> int | None:
    """Counts what was written into it; tensors made in inference mode have no count."""
    return None if tensor.is_inference() else tensor._version


class FusedNonlinearity(nn.Module):
    """In the place of a nonlinearity: hands on what the quantized layer before it has computed.

    With gradients enabled and under torch.compile or torch.export that layer leaves it to this module. Takes and
    returns a tensor of any shape. Raises ArgumentError where the layer's output was replaced or (outside
    torch.inference_mode) written into on its way here; not if it is `called_elsewhere`, on other tensors than those of
    the `layers` that compute it: it computes what it cannot tell from those, `inplace` if what it stands for did.
    """

    def __init__(
        self, nonlinearity: str, layers: int = 1, called_elsewhere: bool = False, inplace: bool = False
    ) -> None:
        super().__init__()
        self.nonlinearity, self.layers, self.called_elsewhere = nonlinearity, layers, called_elsewhere
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._alone(input)
        mark = getattr(input, APPLIED, None)
        if mark is not None:
            delattr(input, APPLIED)  # a second call on this tensor has to give another one
        if mark is not None and mark == (self.nonlinearity, version(input)):
            return input
        if not fuses() or (self.called_elsewhere and mark is None):
            return self._alone(input)
        expected = f"the output of the quantized layer that computes this {self.nonlinearity}, as it left it"
        got = "another tensor: where something comes between (an adapter, a hook), quantize with fuse=False"
        raise ArgumentError("input", expected, got)

    def _alone(self, input: Tensor) -> Tensor:
        """Without gradients with the bits of the layer's own."""
        if self.called_elsewhere and self.inplace:
            return torch.relu_(input)  # the only one of them that may be
        if self.nonlinearity == "relu" or torch.is_grad_enabled() or torch.jit.is_tracing():
            return NONLINEARITIES[self.nonlinearity](input)  # of ReLU the bits are the same
        if input.dtype in (torch.float32, torch.bfloat16):
            return nonlinear(input, self.nonlinearity)
        return nonlinear(input.float(), self.nonlinearity).to(input.dtype)

    def extra_repr(self) -> str:
        before = "layer" if self.layers == 1 else f"{self.layers} layers"
        return f"{self.nonlinearity}, computed by the {before} before"


def nonlinearity_of(thing: object) -> str | None:
    """The name of an elementwise function or module among those that a layer can compute."""
    if isinstance(thing, FusedNonlinearity):
        return thing.nonlinearity
    if not isinstance(thing, nn.Module):
        return _function(thing)
    if "forward" in thing.__dict__:
        return None
    if type(thing) is nn.GELU:
        return "gelu_tanh" if thing.approximate == "tanh" else "gelu"
    if type(thing).__module__ == "transformers.activations":
        name = type(thing).__name__
        return _function(thing.__dict__.get("act")) if name in TRANSFORMERS_ACT else TRANSFORMERS.get(name)
    return TYPES.get(type(thing))


def _function(thing: object) -> str | None:
    if isinstance(thing, functools.partial):
        return "gelu_tanh" if thing.func is F.gelu and thing.keywords == {"approximate": "tanh"} else None
    return FUNCTIONS.get(thing) if isinstance(thing, Callable) else None  # type: ignore[arg-type]
