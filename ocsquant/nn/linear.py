"""The quantized replacement of nn.Linear."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ocsquant import ops
from ocsquant.config import Activations
from ocsquant.errors import ArgumentError
from ocsquant.methods.grid import QuantizedWeight
from ocsquant.methods.learned_clips import ClippedInput
from ocsquant.methods.outliertune import InputTransform
from ocsquant.nn.fused import APPLIED, applied, fuses
from ocsquant.nn.quantized import Quantized
from ocsquant.nn.shared import SharedInput
from ocsquant.ops.linear import (
    BYTE,
    QUANTIZED_LINEAR,
    QUANTIZED_LINEAR_BARE,
    QUANTIZED_LINEAR_NARROW,
    QUANTIZED_LINEAR_NONLINEAR,
    SCALE_FOLDED_LINEAR_BARE,
    SCALE_FOLDED_LINEAR_NONLINEAR,
)

FLOAT32, is_compiling = torch.float32, torch.compiler.is_compiling
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE = (torch.float32, torch.bfloat16)  # of the operators


class QuantizedLinear(Quantized):
    """y = x W^T + b in integers: `ocsquant.ops.quantized_linear`, or `scale_folded_linear` with calibrated inputs.

    Built by `ocsquant.quantize`. Buffers: `packed` (the weight codes, `weight_bits` each), `zero` and `levels` (what
    those stand for, see `ocsquant.ops.pack_weight`) or None, `scale` float32 [out_features], or with a `group_size`
    above 0 [groups of input channels, out_features], `bias` float32 [out_features] or None, `tail_index` int32 or None,
    `input_inverse` and `input_shift` float32 [in_features] or None (the shift's part of the output is in `bias`). No
    dtype conversion of a model (.half(), .bfloat16(), .to(dtype)) touches them. Takes float32, bfloat16, float16 or
    float64 [..., in_features]; returns the same dtype.
    `shared` is the `SharedInput` of layers that are called with the same tensor, where there are others.
    With a `nonlinearity` the output is what that makes of it, without gradients and outside torch.compile: otherwise
    the `FusedNonlinearity` that follows the layer computes it.
    `weight` is the dequantized float32 matrix and `codes` the integers, made anew at each reading: writing into them
    changes nothing.
    """

    origin = "Linear"
    tensors = ("packed", "scale", "bias", "tail_index", "input_inverse", "input_shift", "zero", "levels")
    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    tail_index: Tensor | None
    input_inverse: Tensor | None
    input_shift: Tensor | None
    zero: Tensor | None
    levels: Tensor | None
    shared: SharedInput | None
    # The operator's last arguments, where those are all that it needs.
    plain: tuple[int, int, float, int] | None
    folded: tuple[int, int, bool] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        activations: Activations,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        tail_index: Tensor | None,
        input_inverse: Tensor | None = None,
        input_shift: Tensor | None = None,
        group_size: int = 0,
        weight_bits: int = 8,
        zero: Tensor | None = None,
        levels: Tensor | None = None,
        nonlinearity: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size, self.weight_bits = group_size, weight_bits
        self.activations, self.nonlinearity = activations, nonlinearity
        a, self.shared = activations, None
        self.plain = self.folded = None
        if weight_bits == BYTE and nonlinearity is None:
            if input_inverse is None:
                self.plain = (a.bits, a.max_outliers, a.outlier_threshold, group_size)
            elif a.scale != "token":
                self.folded = (a.bits, a.max_outliers, a.symmetric)
        buffers = (packed, scale, bias, tail_index, input_inverse, input_shift, zero, levels)
        # torch.export counts past the buffers that are None: those come last.
        for name, buffer in sorted(zip(self.tensors, buffers, strict=True), key=lambda pair: pair[1] is None):
            self.register_buffer(name, buffer)

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activations: Activations,
        transform: InputTransform | ClippedInput | None = None,
        unfolded: Tensor | None = None,
        nonlinearity: str | None = None,
    ) -> QuantizedLinear:
        """From a `QuantizedWeight` of a layer's weight, folded with `transform` if it was (then `unfolded` is the float
        one), its bias, and the nonlinearity that a `FusedNonlinearity` leaves to it.
        """
        bias = None if bias is None else bias.detach()
        groups = weight.scale.shape[1]
        scale, inverse, shift = weight.scale.T if groups > 1 else weight.scale[:, 0], None, None
        if transform is not None:
            assert unfolded is not None
            scale, bias, inverse, shift = transform.operands(weight, unfolded.detach(), bias)
        base, tail, tail_index = weight.base_and_tail()
        split = tail_index.numel() > 0
        weight_bits, zero, levels = weight.storage()
        group_size = weight.group_size if groups > 1 else 0
        return cls(
            weight.codes.shape[1],
            weight.codes.shape[0],
            weight.bits,
            activations,
            ops.pack_weight(base, tail if split else None, weight_bits, zero, levels, group_size),
            scale.contiguous(),
            None if bias is None else bias.float().clone(),
            tail_index if split else None,
            inverse,
            shift,
            group_size,
            weight_bits,
            zero,
            levels,
            nonlinearity,
        )

    def share(self, shared: SharedInput) -> None:
        """Quantize the input together with its other layers."""
        self.shared, self.plain = shared, None

    def forward(self, input: Tensor) -> Tensor:
        # The price of a call is that of nn.Linear's: every attribute and check counts.
        plain = self.plain or self.folded
        if plain is not None and input.dtype is FLOAT32 and not (input.requires_grad or is_compiling()):
            shape = input.shape
            if shape and shape[-1] == self.in_features:
                b: dict[str, Any] = self._buffers
                if self.plain is not None:
                    return QUANTIZED_LINEAR_BARE(input, b["packed"], b["scale"], b["bias"], b["tail_index"], *plain)
                scaled = (b["scale"], b["input_inverse"], b["input_shift"], b["bias"], b["tail_index"])
                return SCALE_FOLDED_LINEAR_BARE(input, b["packed"], *scaled, *plain)
        return self._forward(input)

    def _forward(self, input: Tensor, cast: bool = False) -> Tensor:
        shape = input.shape
        if not shape or shape[-1] != self.in_features:
            raise ArgumentError("input", f"[..., {self.in_features}]", list(shape))
        if input.dtype not in NATIVE:
            if input.dtype not in FLOATS:
                raise ArgumentError("input", "float32, bfloat16, float16 or float64", input.dtype)
            y = self._forward(input.float(), cast=True)
            made, kind = y.to(input.dtype), getattr(y, APPLIED, None)
            return made if kind is None else applied(made, kind[0])
        b: dict[str, Any] = self._buffers
        more = (self.nonlinearity is not None or self.shared is not None) and fuses()
        a, nonlinearity = self.activations, self.nonlinearity if more and not self._forward_hooks else None
        if (inverse := b["input_inverse"]) is None:
            operands = (
                input,
                b["packed"],
                b["scale"],
                b["bias"],
                b["tail_index"],
                a.bits,
                a.max_outliers,
                a.outlier_threshold,
                self.group_size,
            )
            if input.requires_grad and torch.is_grad_enabled():
                return ops.quantized_linear(*operands, self.weight_bits, b["zero"], b["levels"])
            if more and self.shared is not None and not cast and (found := self.shared.output(self, input)) is not None:
                return found
            # Past the operator's Python face, which costs as much as a small product.
            if nonlinearity is not None:
                form = (self.weight_bits, b["zero"], b["levels"], nonlinearity)
                return applied(QUANTIZED_LINEAR_NONLINEAR(*operands, *form), nonlinearity)
            if self.weight_bits == BYTE:
                return QUANTIZED_LINEAR(*operands)
            return QUANTIZED_LINEAR_NARROW(*operands, self.weight_bits, b["zero"], b["levels"])
        folded = (
            input,
            b["packed"],
            b["scale"],
            inverse,
            b["input_shift"],
            b["bias"],
            b["tail_index"],
            a.bits,
            a.scale == "token",
            a.max_outliers,
            a.outlier_threshold,
            a.symmetric,
            self.weight_bits,
            b["zero"],
            b["levels"],
        )
        if input.requires_grad and torch.is_grad_enabled():
            return ops.scale_folded_linear(*folded)
        y = SCALE_FOLDED_LINEAR_NONLINEAR(*folded, nonlinearity or "none")
        return y if nonlinearity is None else applied(y, nonlinearity)

    @property
    def weight(self) -> Tensor:
        """float32 [out_features, in_features], dequantized anew at each reading."""
        form = (self.group_size, self.weight_bits, self.zero, self.levels)
        folded = ops.dequantize_packed(self.packed, self.scale, self.in_features, self.tail_index, *form)
        return folded if self.input_inverse is None else folded * self.input_inverse

    @property
    def codes(self) -> Tensor:
        """int16 [out_features, in_features]: base plus tail codes."""
        index = self.tail_index
        sizes = (self.out_features, self.in_features, self.split_channels)
        base, tail = ops.unpack_weight(self.packed, *sizes, self.weight_bits, self.zero, self.levels, self.group_size)
        total = base.to(torch.int16)
        return total if index is None else total.index_add_(1, index.long(), tail.to(torch.int16))

    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    @property
    def activation_bits(self) -> int:
        return self.activations.bits

    @property
    def kernel(self) -> str:  # type: ignore[override]
        return "quantized_linear" if self.input_inverse is None else "scale_folded_linear"

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if self.split_channels:
            text += f", split_channels={self.split_channels}"
        if self.group_size:
            text += f", group_size={self.group_size}"
        if self.nonlinearity is not None:
            text += f", nonlinearity={self.nonlinearity}"
        return f"{text}, bits={self.bits}, activations={self.activations.bits} bits per {self.activations.scale}"

    def settings(self) -> dict[str, Any]:
        """What a file needs beside the buffers to rebuild this module."""
        return {
            "kind": "QuantizedLinear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "activations": dataclasses.asdict(self.activations),
            "group_size": self.group_size,
            "weight_bits": self.weight_bits,
            "nonlinearity": self.nonlinearity,
        }
