"""The quantized replacement of nn.Conv1d, nn.Conv2d and nn.Conv3d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ocsquant.errors import ArgumentError
from ocsquant.nn.fused import applied, fuses, version
from ocsquant.nn.linear import FLOATS, QuantizedLinear
from ocsquant.nn.quantized import Quantized
from ocsquant.nn.sums import LATER, PendingSum
from ocsquant.ops.convolution import QUANTIZED_CONV2D

SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class QuantizedConv(Quantized):
    """A convolution (1d, 2d, 3d) in integers: `ocsquant.ops.quantized_conv2d`.

    One step for each group of channels of a sample, for kernels of one element for each pixel; in three dimensions the
    frames under a kernel are the channels of a sample. Built by `ocsquant.quantize`. `product` holds weight and bias,
    its inputs in the order [kernel height][width][depth][channels]. The output lies in memory as the input does,
    contiguous or channels last (which is faster). With calibrated inputs `input_inverse` and `input_shift`, float32
    [in_channels] or None, are what a channel is multiplied with after it was shifted; their part of the output is in
    the weight and bias of `product`. With a nonlinearity of `product` the output is what that makes of it, as of a
    `QuantizedLinear`; if it `adds` (`sums.NEXT`, `sums.LATER`), of its sum with a tensor that the code around it adds
    to the output, which is a `PendingSum` until then. Takes float32, bfloat16, float16 or float64; returns the same
    dtype.
    """

    kernel = "quantized_conv2d"

    tensors = ("input_inverse", "input_shift")  # beside those of `product`
    input_inverse: Tensor | None
    input_shift: Tensor | None

    def __init__(
        self,
        like: Any,
        product: QuantizedLinear,
        input_inverse: Tensor | None = None,
        input_shift: Tensor | None = None,
        adds: str | None = None,
    ) -> None:
        """like: a module (or anything else) with the attributes `SETTINGS`."""
        super().__init__()
        for name in SETTINGS:
            value = getattr(like, name)
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self.origin = f"Conv{len(self.kernel_size)}d"
        self._sides = _sides(self)
        before, after = self._sides[::2][::-1], self._sides[1::2][::-1]
        # What the padding of the operator cannot express is put around the input before: also zeros that are shifted.
        self._pads = self.padding_mode != "zeros" or before != after or (input_shift is not None and any(before))
        self._zeros = (0,) * len(before) if self._pads else tuple(before)
        sizes = ((self.kernel_size, 1), (self.stride, 1), (self._zeros, 0), (self.dilation, 1))
        self._window = [size for given, height in sizes for size in (height, *given)[-2:]]
        # A kernel of one element goes over planes that follow one another as over one.
        self._flat = len(before) == 3 and {*self.kernel_size, *self.stride} == {1} and {*self._zeros} == {0}
        self.product, self.adds = product, adds
        a, p = product.activations, product
        self._plain = (*self._window, a.bits, a.max_outliers, a.outlier_threshold, p.weight_bits)
        for name, value in zip(self.tensors, (input_inverse, input_shift), strict=True):
            self.register_buffer(name, value)

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    in_channels: int
    out_channels: int
    padding_mode: str
    groups: int

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
        depth, plane = self.kernel_size[:-2], self.kernel_size[-2:]
        columns = self.product.weight.unflatten(1, (*plane, *depth, self.in_channels // self.groups))
        if self.input_inverse is not None:
            inverse = self.input_inverse.reshape(self.groups, -1).repeat_interleave(columns.shape[0] // self.groups, 0)
            columns = columns * inverse.reshape(len(columns), *(1 for _ in self.kernel_size), -1)
        return columns.permute(0, -1, *range(1 + len(plane), columns.dim() - 1), *range(1, 1 + len(plane)))

    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    @property
    def float_bytes(self) -> int:
        return self.product.float_bytes

    def forward(self, input: Tensor) -> Tensor | PendingSum:
        dims = len(self.kernel_size)
        shape = input.shape if isinstance(input, Tensor) else ()
        if len(shape) not in (dims + 1, dims + 2):
            got = list(shape) if isinstance(input, Tensor) else type(input).__name__
            raise ArgumentError("input", f"{dims + 1} or {dims + 2} dimensions", got)
        if shape[-dims - 1] != self.in_channels or input.dtype not in FLOATS:
            expected = f"{self.in_channels} channels in dimension {-dims - 1}, float32, bfloat16, float16 or float64"
            raise ArgumentError("input", expected, f"{list(input.shape)} {input.dtype}")
        if torch.is_grad_enabled() and input.requires_grad:
            with torch.no_grad():
                value = self._integer(input)
            smooth = self._float(input)
            return value + (smooth - smooth.detach())
        kind: str | None = self._modules["product"].nonlinearity  # type: ignore[union-attr,assignment]
        if kind is None or self._forward_hooks or not fuses():
            return self._integer(input)
        return self._pending(input, kind) if self.adds is not None else applied(self._integer(input, kind), kind)

    def _pending(self, input: Tensor, kind: str) -> PendingSum:
        sizes = None
        if input.dtype == torch.float32 and input.dim() == 4 and not self._pads:
            windows = zip(input.shape[2:], *(self._window[i : i + 2] for i in (0, 2, 4, 6)), strict=True)
            inside = ((size + 2 * z - d * (k - 1) - 1) // s + 1 for size, k, s, z, d in windows)
            sizes = (input.shape[0], self.out_channels, *inside)

        before = version(input)

        def convolution(residual: Tensor | None) -> Tensor:
            if version(input) != before:
                got = "one that was changed before something was added to the output: quantize with fuse=False"
                raise ArgumentError("input", "the tensor that the convolution was called with", got)
            return self._integer(input, "none" if residual is None else kind, residual)

        pending = PendingSum(convolution, sizes, kind)
        if before is None and self.adds == LATER:
            pending.output()  # now: nobody counts what is written into tensors of inference mode
        return pending

    def _integer(self, input: Tensor, nonlinearity: str = "none", residual: Tensor | None = None) -> Tensor:
        own: dict[str, Any] = self._buffers
        product: Any = self._modules["product"]  # past nn.Module's look-up, as below: small layers feel it
        b: dict[str, Any] = product._buffers
        image = len(self.kernel_size) == 2 and input.dim() == 4 and input.dtype == torch.float32 and not self._pads
        x, form = (input, ()) if image else self._images(input)
        y = QUANTIZED_CONV2D(
            *(x, b["packed"], b["scale"], b["bias"], b["tail_index"]),
            *self._plain,
            *(b["zero"], b["levels"], self.groups),
            self._of_frames(own["input_inverse"]),
            self._of_frames(own["input_shift"]),
            nonlinearity,
            residual,
            product.group_size,
        )
        return y if image else self._like(input, y, *form)

    def _images(self, input: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """The input as samples of a 2d convolution; and what it was, for `_like`."""
        dims = len(self.kernel_size)
        x = input if input.dim() == dims + 2 else input.unsqueeze(0)
        x = self._padded(x if x.dtype == torch.float32 else x.float())
        samples, frames, last = x.shape[0], x.shape[2], dims == 3 and _is_last(x)
        if dims == 1:
            x = x.unsqueeze(2)
        elif self._flat:
            x = x.flatten(2, 3)
        elif dims == 3:
            x, frames = self._frames(x)
        return x, (samples, frames, last)

    def _like(self, input: Tensor, y: Tensor, samples: int, frames: int, last: bool) -> Tensor:
        """The output of the 2d convolution as that of this one."""
        dims = len(self.kernel_size)
        if dims == 1:
            y = y.squeeze(2).contiguous()
        elif self._flat:
            y = y.unflatten(2, (frames, y.shape[2] // frames))
        elif dims == 3:
            y = y.unflatten(0, (samples, frames)).transpose(1, 2)
            y = y if last else y.contiguous()
        y = y if input.dim() == dims + 2 else y.squeeze(0)
        return y if input.dtype == torch.float32 else y.to(input.dtype)

    def _of_frames(self, channels: Tensor | None) -> Tensor | None:
        """Of the input's channels, for those of the operator's, which may be several frames of them."""
        if channels is None or self._flat or len(self.kernel_size) < 3 or self.kernel_size[0] == 1:
            return channels
        return channels.reshape(self.groups, 1, -1).expand(-1, self.kernel_size[0], -1).flatten()

    def _frames(self, x: Tensor) -> tuple[Tensor, int]:
        """[samples, channels, depth, height, width] as samples of a 2d convolution, a number of frames for each.

        The frames under the kernel become channels: of each group together.
        """
        size, stride, zeros, dilation = self.kernel_size[0], self.stride[0], self._zeros[0], self.dilation[0]
        x = F.pad(x, (0, 0, 0, 0, zeros, zeros)) if zeros else x
        span = dilation * (size - 1) + 1
        if x.shape[2] < span:
            raise ArgumentError("input", f"a depth of at least {span}, padding included", x.shape[2])
        last, groups, channels = _is_last(x), self.groups, self.in_channels // self.groups
        windows = x.unfold(2, span, stride)[..., ::dilation].unflatten(1, (groups, channels))
        samples, _, _, frames, height, width, _ = windows.shape
        images = (samples * frames, groups * size * channels)
        if last:
            turned = windows.permute(0, 3, 4, 5, 1, 6, 2).reshape(images[0], height, width, images[1])
            return turned.permute(0, 3, 1, 2), frames
        return windows.permute(0, 3, 1, 6, 2, 4, 5).reshape(*images, height, width), frames

    def _float(self, input: Tensor) -> Tensor:
        x = self._padded(input)
        convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return convolution(x, self.weight.to(x.dtype), bias, self.stride, self._zeros, self.dilation, self.groups)

    def _padded(self, x: Tensor) -> Tensor:
        if not self._pads:
            return x
        return F.pad(x, self._sides, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in SETTINGS}
        parts = {"product": self.product.settings()}
        return {"kind": "QuantizedConv", "origin": self.origin, **own, "adds": self.adds, "parts": parts}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in SETTINGS)


def _sides(like: Any) -> list[int]:
    """Padding before and after each dimension, the last dimension first, as F.pad wants it."""
    if like.padding == "valid":
        return [0, 0] * len(like.kernel_size)
    if like.padding == "same":
        totals = [d * (k - 1) for d, k in zip(like.dilation, like.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return [side for size in reversed(like.padding) for side in (size, size)]


def pads(like: Any) -> bool:
    """Whether a convolution puts anything around its input."""
    return any(_sides(like))


def _is_last(x: Tensor) -> bool:
    """Whether it lies channels last, and cannot be read as contiguous too."""
    return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
