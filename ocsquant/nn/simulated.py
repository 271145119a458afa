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

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        a = self.activations
        x = args[0] if args else kwargs["input"]
        return (fake_quantize_tokens(x, a.bits, a.max_outliers, a.outlier_threshold),), {}
