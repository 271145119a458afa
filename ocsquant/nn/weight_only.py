"""Layers that store their weight in few bits and compute in float: the weight is dequantized as it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ocsquant import ops
from ocsquant.errors import ArgumentError
from ocsquant.methods.grid import QuantizedWeight
from ocsquant.nn.quantized import Quantized

AT_A_TIME = 1 << 20  # weights of a linear in float at any moment: they stay in cache


@dataclass(frozen=True)
class StoredWeight:
    """A weight of `shape`, seen as [n, k], in the form of `ops.dequantize_weight`, with the tails of split columns.

    tail: int8 [n, e], codes to be added to the columns tail_index int32 [e], under the same scales.
    """

    shape: torch.Size
    bits: int
    group_size: int
    packed: Tensor
    scale: Tensor
    zero: Tensor | None = None
    levels: Tensor | None = None
    tail: Tensor | None = None
    tail_index: Tensor | None = None

    @classmethod
    def of(cls, weight: QuantizedWeight, shape: torch.Size) -> StoredWeight:
        codes, tail, index = weight.codes, None, None
        if weight.levels is None and weight.zero is None:
            base, rest, at = weight.base_and_tail()
            codes = base.to(torch.int16) + 2 ** (weight.bits - 1)
            if at.numel():
                tail, index = rest, at
        packed = ops.pack_codes(codes.to(torch.uint8), weight.bits)
        scale = weight.scale.contiguous()
        return cls(shape, weight.bits, weight.group_size, packed, scale, weight.zero, weight.levels, tail, index)


class WeightOnly(Quantized):
    """Base of the weight-only modules. Buffers: those of `StoredWeight`."""

    kernel = "dequantized as it is used"
    tensors: tuple[str, ...] = ("packed", "scale", "zero", "levels", "tail", "tail_index")
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    levels: Tensor | None
    tail: Tensor | None
    tail_index: Tensor | None

    def __init__(self, stored: StoredWeight) -> None:
        super().__init__()
        self.bits, self.group_size, self._shape = stored.bits, stored.group_size, stored.shape
        for name in WeightOnly.tensors:
            self.register_buffer(name, getattr(stored, name))

    @property
    def weight_shape(self) -> torch.Size:
        return self._shape

    @property
    def weight(self) -> Tensor:
        """float32, dequantized anew at each reading."""
        return self._rows(0, self._shape[0]).reshape(self._shape)

    def _rows(self, first: int, last: int) -> Tensor:
        """float32 [last - first, k]."""
        whole = first == 0 and last == self._shape[0]

        def part(t: Tensor | None) -> Tensor | None:
            return t if t is None or whole or t.shape[0] == 1 else t[first:last]

        packed, scale = self.packed if whole else self.packed[first:last], part(self.scale)
        k = self._shape[1:].numel()
        assert scale is not None
        w = ops.dequantize_weight(packed, scale, k, self.bits, self.group_size, part(self.zero), part(self.levels))
        if self.tail is not None and self.tail_index is not None:
            index = self.tail_index.long()
            w.index_add_(1, index, self.tail[first:last].float() * scale[:, index // self.group_size])
        return w

    def settings(self) -> dict[str, Any]:
        shape = list(self._shape)
        return {
            "kind": "WeightOnly",
            "origin": self.origin,
            "shape": shape,
            "bits": self.bits,
            "group_size": self.group_size,
        }

    def extra_repr(self) -> str:
        groups = "" if self.scale.shape[1] == 1 else f", group_size={self.group_size}"
        kind = "levels" if self.levels is not None else "asymmetric" if self.zero is not None else "symmetric"
        return f"weight={list(self._shape)}, bits={self.bits} ({kind}){groups}"


class _Biased(WeightOnly):
    tensors = (*WeightOnly.tensors, "bias")
    bias: Tensor | None

    def __init__(self, stored: StoredWeight, bias: Tensor | None) -> None:
        super().__init__(stored)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def _bias(self, first: int, last: int, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias[first:last].to(dtype)


def _check_float(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ArgumentError("input", "a floating-point tensor", x.dtype)


class WeightOnlyLinear(_Biased):
    """y = x W^T + b in the dtype of x, a part of W in float at a time."""

    origin = "Linear"

    def __init__(self, like: Any, stored: StoredWeight, bias: Tensor | None) -> None:
        super().__init__(stored, bias)
        self.out_features, self.in_features = stored.shape

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1:] != (self.in_features,):
            raise ArgumentError("input", f"[..., {self.in_features}]", list(input.shape))
        _check_float(input)
        step = max(1, AT_A_TIME // self.in_features)
        parts = []
        for first in range(0, self.out_features, step):
            last = min(first + step, self.out_features)
            w = self._rows(first, last).to(input.dtype)
            parts.append(F.linear(input, w, self._bias(first, last, input.dtype)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class WeightOnlyConv(_Biased):
    """A convolution (1d, 2d or 3d) in the dtype of its input; its padding is that of `like`, whatever made it."""

    def __init__(self, like: Any, stored: StoredWeight, bias: Tensor | None) -> None:
        super().__init__(stored, bias)
        self.in_channels, self.out_channels, self.groups = like.in_channels, like.out_channels, like.groups
        self.kernel_size, self.stride, self.dilation = like.kernel_size, like.stride, like.dilation
        self.padding, self.padding_mode = like.padding, like.padding_mode
        self._reversed_padding_repeated_twice = like._reversed_padding_repeated_twice
        self.origin = f"Conv{len(self.kernel_size)}d"

    def forward(self, input: Tensor) -> Tensor:
        _check_float(input)
        x, padding = input, self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        bias = self._bias(0, self.out_channels, x.dtype)
        return convolution(x, self.weight.to(x.dtype), bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.stride}, padding={self.padding}, groups={self.groups}"


class _Rows(WeightOnly):
    """An embedding: only the rows asked for are dequantized. They come in the dtype the float weight would have."""

    output_like: Tensor

    def __init__(self, like: Any, stored: StoredWeight) -> None:
        super().__init__(stored)
        self.num_embeddings, self.embedding_dim = stored.shape
        dtype = like.output_like.dtype if isinstance(like, _Rows) else like.weight.dtype
        # Holds nothing but the dtype, which follows the model's.
        self.register_buffer("output_like", torch.empty(0, dtype=dtype, device=stored.packed.device), persistent=False)

    def look_up(self, ids: Tensor) -> Tensor:
        """[m, embedding_dim] of int [m]."""
        if ids.dtype not in (torch.int32, torch.int64):
            raise ArgumentError("input", "int32 or int64", ids.dtype)
        packed, scale, ids = self.packed, self.scale, ids.long()
        k, bits, size = self.embedding_dim, self.bits, self.group_size
        return ops.dequantize_weight(packed, scale, k, bits, size, self.zero, self.levels, ids).to(
            self.output_like.dtype
        )


class WeightOnlyEmbedding(_Rows):
    """nn.Embedding over rows that are stored quantized."""

    origin = "Embedding"

    def __init__(self, like: Any, stored: StoredWeight, bias: Tensor | None = None) -> None:
        super().__init__(like, stored)
        self.padding_idx: int | None = like.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        return self.look_up(input.reshape(-1)).reshape(*input.shape, self.embedding_dim)


class WeightOnlyEmbeddingBag(_Rows):
    """nn.EmbeddingBag over rows that are stored quantized."""

    origin = "EmbeddingBag"

    def __init__(self, like: Any, stored: StoredWeight, bias: Tensor | None = None) -> None:
        super().__init__(like, stored)
        self.mode: str = like.mode
        self.include_last_offset: bool = like.include_last_offset
        self.padding_idx: int | None = like.padding_idx

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        ids = input.reshape(-1)
        rows, at, padding = self.look_up(ids), torch.arange(ids.numel(), device=ids.device), None
        if self.padding_idx is not None:  # one row more stands for what is to be left out
            rows, padding = torch.cat([rows, rows.new_zeros(1, self.embedding_dim)]), ids.numel()
            at = torch.where(ids == self.padding_idx, padding, at)
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.to(rows.dtype)
        return F.embedding_bag(
            at.reshape(input.shape),
            rows,
            None if offsets is None else offsets.long(),
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )


FORMS: dict[str, type[WeightOnlyLinear | WeightOnlyConv | WeightOnlyEmbedding | WeightOnlyEmbeddingBag]] = {
    "Linear": WeightOnlyLinear,
    "Conv1d": WeightOnlyConv,
    "Conv2d": WeightOnlyConv,
    "Conv3d": WeightOnlyConv,
    "Embedding": WeightOnlyEmbedding,
    "EmbeddingBag": WeightOnlyEmbeddingBag,
}


def form_of(module: nn.Module) -> str | None:
    """The key in `FORMS` of a torch module; None for one without a weight-only form."""
    return next((name for name in FORMS if isinstance(module, getattr(nn, name))), None)
