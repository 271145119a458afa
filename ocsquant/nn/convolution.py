"""The quantized replacement of nn.Conv1d and nn.Conv2d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ocsquant import ops
from ocsquant.errors import ArgumentError
from ocsquant.nn.linear import FLOATS, QuantizedLinear
from ocsquant.nn.quantized import Quantized

SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class QuantizedConv(Quantized):
    """A convolution without groups (1d, 2d) in integers: `ocsquant.ops.quantized_conv2d`.

    One step for each sample, for kernels of one element for each pixel. Built by `ocsquant.quantize`.
    `product` holds weight and bias, its inputs in the order [kernel][channels]. The output of a Conv2d lies in memory
    as its input does, contiguous or channels last (which is faster). Takes float32, bfloat16, float16 or float64;
    returns the same dtype.
    """

    kernel = "quantized_conv2d"

    def __init__(self, like: Any, product: QuantizedLinear) -> None:
        """like: a module (or anything else) with the attributes `SETTINGS`."""
        super().__init__()
        for name in SETTINGS:
            value = getattr(like, name)
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self.origin = f"Conv{len(self.kernel_size)}d"
        self._sides = _sides(self)
        before, after = self._sides[::2][::-1], self._sides[1::2][::-1]
        # What the padding of the operator cannot express is put around the input before.
        self._pads = self.padding_mode != "zeros" or before != after
        self._zeros = (0,) * len(before) if self._pads else tuple(before)
        sizes = ((self.kernel_size, 1), (self.stride, 1), (self._zeros, 0), (self.dilation, 1))
        two = len(self.kernel_size) == 2
        self._window = [size for given, height in sizes for size in (given if two else (height, *given))]
        self.product = product

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    in_channels: int
    out_channels: int
    padding_mode: str

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.product.bits

    @property
    def activation_bits(self) -> int:
        return self.product.activation_bits

    @property
    def split_channels(self) -> int:
        return self.product.split_channels

    @property
    def bias(self) -> Tensor | None:
        return self.product.bias

    @property
    def weight(self) -> Tensor:
        """float32 of the shape of the float weight, dequantized anew at each reading."""
        return self.product.weight.unflatten(1, (*self.kernel_size, self.in_channels)).movedim(-1, 1)

    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_channels, self.in_channels, *self.kernel_size))

    @property
    def float_bytes(self) -> int:
        return self.product.float_bytes

    def forward(self, input: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        if not isinstance(input, Tensor) or input.dim() not in (dims + 1, dims + 2):
            got = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise ArgumentError("input", f"{dims + 1} or {dims + 2} dimensions", got)
        if input.shape[-dims - 1] != self.in_channels or input.dtype not in FLOATS:
            expected = f"{self.in_channels} channels in dimension {-dims - 1}, float32, bfloat16, float16 or float64"
            raise ArgumentError("input", expected, f"{list(input.shape)} {input.dtype}")
        if torch.is_grad_enabled() and input.requires_grad:
            with torch.no_grad():
                value = self._integer(input)
            smooth = self._float(input)
            return value + (smooth - smooth.detach())
        return self._integer(input)

    def _integer(self, input: Tensor) -> Tensor:
        dims, p = len(self.kernel_size), self.product
        x = input if input.dim() == dims + 2 else input.unsqueeze(0)
        x = self._padded(x if x.dtype == torch.float32 else x.float())
        x = x if dims == 2 else x.unsqueeze(2)
        a = p.activations
        b: dict[str, Any] = p._buffers
        operands: tuple[Any, ...] = (
            *(x, b["packed"], b["scale"], b["bias"], b["tail_index"]),
            *self._window,
            *(a.bits, a.max_outliers, a.outlier_threshold, p.weight_bits, b["zero"], b["levels"]),
        )
        y = ops.quantized_conv2d(*operands)
        y = y if dims == 2 else y.squeeze(2).contiguous()
        y = y if input.dim() == dims + 2 else y.squeeze(0)
        return y if input.dtype == torch.float32 else y.to(input.dtype)

    def _float(self, input: Tensor) -> Tensor:
        x = self._padded(input)
        convolution: Any = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return convolution(x, self.weight.to(x.dtype), bias, self.stride, self._zeros, self.dilation)

    def _padded(self, x: Tensor) -> Tensor:
        if not self._pads:
            return x
        return F.pad(x, self._sides, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in SETTINGS}
        return {"kind": "QuantizedConv", "origin": self.origin, **own, "parts": {"product": self.product.settings()}}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in SETTINGS if name != "groups")


def _sides(like: Any) -> list[int]:
    """Padding before and after each dimension, the last dimension first, as F.pad wants it."""
    if like.padding == "valid":
        return [0, 0] * len(like.kernel_size)
    if like.padding == "same":
        totals = [d * (k - 1) for d, k in zip(like.dilation, like.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return [side for size in reversed(like.padding) for side in (size, size)]


def product_columns(weight: Tensor, shape: torch.Size) -> Tensor:
    """[outputs, channels * positions], the order of a weight of `shape`, as [outputs, positions * channels]."""
    return weight.reshape(shape[0], shape[1], -1).transpose(1, 2).reshape(shape[0], -1)
