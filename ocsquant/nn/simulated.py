"""Simulation: the codes of the integer kernels, the arithmetic of the float layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ocsquant.config import Activations
from ocsquant.methods.learned_clips import ClippedInput
from ocsquant.methods.outliertune import InputTransform, transformed_codes
from ocsquant.methods.tokens import fake_quantize_tokens


class FakeQuantizeInput:
    """A forward pre-hook that rounds a layer's input to the codes the integer kernels would use.

    With a transform the layer gets the input less its shift, which the layer's bias makes up for.
    """

    def __init__(self, activations: Activations, transform: InputTransform | ClippedInput | None = None) -> None:
        self.activations, self.transform = activations, transform

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        a = self.activations
        x = args[0] if args else kwargs["input"]
        if isinstance(self.transform, ClippedInput):
            return (self.transform.apply(x.float()).to(x.dtype),), {}
        if self.transform is None:
            return (fake_quantize_tokens(x, a.bits, a.max_outliers, a.outlier_threshold),), {}
        flat = x.reshape(-1, x.shape[-1]).float()
        codes, step = transformed_codes(flat, self.transform, a.bits, a.max_outliers, a.outlier_threshold)
        return ((codes * step[:, None] * self.transform.scale()).reshape(x.shape).to(x.dtype),), {}
