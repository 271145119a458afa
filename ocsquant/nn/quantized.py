"""What all quantized modules have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Self = TypeVar("Self", bound="Quantized")


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` is given, for tensors that follow a move to another device but no change of dtype."""

    def apply(t: Tensor) -> Tensor:
        whole = {torch.float32: torch.int32, torch.float64: torch.int64}.get(t.dtype)
        bits = t if whole is None else t.view(whole)
        moved = fn(bits)
        if moved.dtype != bits.dtype:  # Module.type() converts integers too
            moved = bits.to(moved.device)
        return moved.view(t.dtype)

    return apply


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Path and module of every quantized layer, under each of its names, without the parts it is made of."""
    inside = None
    for path, module in model.named_modules(remove_duplicate=False):
        if inside is not None and path.startswith(inside):
            continue
        inside = None
        if isinstance(module, Quantized):
            inside = f"{path}." if path else ""
            yield path, module


class Quantized(nn.Module):
    """A module whose weight is held as integers, in plain buffers that no change of dtype touches.

    `bits` of a stored code; `origin` names the torch.nn module it was; `kernel` what computes its output; `tensors` are
    the names of all buffers a file holds; `weight` gives the dequantized float32 weight, made anew at each reading.
    """

    bits: int
    origin: str
    kernel: str
    tensors: tuple[str, ...]

    @property
    def weight_shape(self) -> torch.Size:
        """Of `weight`, without making it."""
        raise NotImplementedError

    @property
    def activation_bits(self) -> int | None:
        """None: activations stay float."""
        return None

    @property
    def split_channels(self) -> int:
        """Input columns that have a tail column."""
        index = self._buffers["tail_index"]
        return 0 if index is None else index.numel()

    @property
    def float_bytes(self) -> int:
        """Of the weight and bias in float32."""
        bias = self._buffers.get("bias")
        return 4 * (self.weight_shape.numel() + (0 if bias is None else bias.numel()))

    def settings(self) -> dict[str, Any]:
        """What a file needs beside the buffers to rebuild this module."""
        raise NotImplementedError

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        keep = keeping_dtype(fn)
        # `output_like` of an embedding, without entries, is there to be converted.
        super()._apply(lambda t: fn(t) if t.numel() == 0 else keep(t), recurse)
        return self
