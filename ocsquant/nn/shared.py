"""Linear layers that read the same input, which is then quantized once for all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ocsquant.nn.fused import applied, version
from ocsquant.ops.linear import QUANTIZED_LINEARS

WAITING = "_ocsquant_waiting"  # of an input: by layer, its output and what it was made of


def form(layer: Any) -> tuple[object, ...] | None:
    """What must be the same in quantized linear layers that share an input; None for one that cannot."""
    if layer.input_inverse is not None or layer.tail_index is not None:
        return None
    stored = (layer.weight_bits, layer.group_size, layer.zero is None, layer.levels is None)
    return (layer.in_features, layer.activations, *stored)


class SharedInput:
    """Its layers, in the order they are called in: the first computes for all, the others find their output.

    That waits at the input tensor itself, with what tells that neither this nor the layer was written into since; a
    tensor made in inference mode cannot tell, which leaves it to the code that calls the layers. For whatever else a
    layer is called with, it computes alone.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def output(self, layer: Any, input: Tensor) -> Tensor | None:
        """The output of one of the layers; None: it is to compute it."""
        waiting = getattr(input, WAITING, None)
        if waiting is not None and (found := waiting.pop(id(layer), None)) is not None:
            y, state = found
            return y if state == _state(layer, input) else None
        if layer is not self.layers[0]:
            return None
        first, *rest = self._compute(input)
        others = zip(self.layers[1:], rest, strict=True)
        setattr(input, WAITING, {id(other): (y, _state(other, input)) for other, y in others})
        return first

    def _compute(self, input: Tensor) -> list[Tensor]:
        buffers = [layer._buffers for layer in self.layers]
        columns = [[b[name] for b in buffers] for name in ("packed", "scale", "bias", "zero", "levels")]
        packed, scale, bias, zero, levels = columns
        kinds = [None if layer._forward_hooks else layer.nonlinearity for layer in self.layers]
        first = self.layers[0]
        a, stored = first.activations, (first.group_size, first.weight_bits, zero, levels)
        quantizer = (a.bits, a.max_outliers, a.outlier_threshold)
        outputs = QUANTIZED_LINEARS(input, packed, scale, bias, *quantizer, *stored, [k or "none" for k in kinds])
        return [y if kind is None else applied(y, kind) for y, kind in zip(outputs, kinds, strict=True)]


def _state(layer: Any, input: Tensor) -> tuple[Any, ...]:
    packed, scale, bias = (layer._buffers[name] for name in ("packed", "scale", "bias"))
    parts = (input, packed, scale, *(() if bias is None else (bias,)))
    return tuple((t.data_ptr(), version(t)) for t in parts)
