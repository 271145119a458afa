"""Simulation: the codes of the integer kernels, the arithmetic of the float layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ocsquant.config import Activations
from ocsquant.methods.tokens import fake_quantize_tokens


class FakeQuantizeInput:
    """A forward pre-hook that rounds a layer's input to the codes `quantized_linear` would use."""

    def __init__(self, activations: Activations) -> None:
        self.activations = activations

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        a = self.activations
        return (fake_quantize_tokens(args[0], a.bits, a.max_outliers, a.outlier_threshold), *args[1:])
