"""Simulation: a float layer that rounds its input and computes what the integer kernels would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ocsquant.config import Activations
from ocsquant.methods.grid import QuantizedWeight, blocked
from ocsquant.methods.learned_clips import ClippedInput
from ocsquant.methods.outliertune import InputTransform, transformed_codes
from ocsquant.methods.products import quantized_product
from ocsquant.methods.tokens import quantize_tokens
from ocsquant.nn.quantized import keeping_dtype

Self = TypeVar("Self", bound="SimulatedLinear")


class SimulatedLinear(nn.Linear):
    """nn.Linear whose weight lies on the grid of a `QuantizedWeight` and whose input is rounded as `activations` say.

    Made by `ocsquant.quantize(..., simulate=True)`; runs on any device. Where no gradient is asked for, sums are those
    of the whole numbers, so that the output is bit for bit that of the integer layer, whatever the order of the sums;
    with gradients, under torch.compile, and once `weight` is no longer what was quantized, the rounded input and
    `weight` are multiplied as floats.
    """

    integers: Tensor
    scale: Tensor
    offset: Tensor | None

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        quantized: QuantizedWeight,
        activations: Activations,
        transform: InputTransform | ClippedInput | None,
    ) -> SimulatedLinear:
        """`layer` itself, which has the dequantized weight already and is nobody else's, turned into this."""
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer._buffers, layer._non_persistent_buffers_set = {}, set()
        layer.activations, layer.transform, layer.group_size = activations, transform, quantized.group_size
        layer.register_buffer("integers", quantized.integers(), persistent=False)
        layer.register_buffer("scale", quantized.scale, persistent=False)
        offset = transform.offset(quantized) if isinstance(transform, ClippedInput) else None
        layer.register_buffer("offset", offset, persistent=False)
        return layer

    activations: Activations
    transform: InputTransform | ClippedInput | None
    group_size: int

    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, input.shape[-1]).float()
        wanted = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if wanted or torch.compiler.is_compiling() or input.is_meta or not torch.equal(self.weight, self._on_grid()):
            return F.linear(self._rounded(flat).reshape(input.shape).to(input.dtype), self.weight, self.bias)
        return self._product(flat).reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def _product(self, x: Tensor) -> Tensor:
        bias, form = None if self.bias is None else self.bias.float(), (self.integers, self.scale, self.group_size)
        if isinstance(self.transform, ClippedInput):
            assert self.offset is not None
            return self.transform.product(x, *form, self.offset, bias)
        codes, step = self._codes(x)
        return quantized_product(codes, step, *form, bias)

    def _rounded(self, x: Tensor) -> Tensor:
        """What the codes stand for; with a transform less its shift, which the layer's bias makes up for."""
        if isinstance(self.transform, ClippedInput):
            return self.transform.apply(x)
        codes, step = self._codes(x)
        values = codes * step[:, None]
        return values if self.transform is None else values * self.transform.scale()

    def _codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whole float32 codes [m, k] and the step [m] of float32 tokens [m, k], where those have one."""
        a, transform = self.activations, self.transform
        if transform is None:
            return quantize_tokens(x, a.bits, a.max_outliers, a.outlier_threshold)
        assert isinstance(transform, InputTransform)
        return transformed_codes(x, transform, a.bits, a.max_outliers, a.outlier_threshold)

    def _on_grid(self) -> Tensor:
        """The weight as it was quantized."""
        blocks = blocked(self.integers, self.group_size) * self.scale[:, :, None]
        values = blocks.reshape(blocks.shape[0], -1)[:, : self.in_features]
        return (values if self.transform is None else self.transform.unfold(values)).to(self.weight.dtype)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {id(t) for t in self._buffers.values() if t is not None}
        keep = keeping_dtype(fn)
        if self.transform is not None:
            moved: dict[str, Any] = {
                f.name: keep(t)
                for f in dataclasses.fields(self.transform)
                if isinstance(t := getattr(self.transform, f.name), Tensor)
            }
            self.transform = dataclasses.replace(self.transform, **moved)
        return super()._apply(lambda t: keep(t) if id(t) in kept else fn(t), recurse)
