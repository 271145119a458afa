"""Linear layers that read the same input, which is then quantized once for all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ocsquant.nn.fused import applied
from ocsquant.ops.linear import QUANTIZED_LINEARS

WAITING = "_ocsquant_waiting"  # of an input: what layers have made of it that were not called yet, and its version then


def form(layer: Any) -> tuple[object, ...] | None:
    """What must be the same in quantized linear layers that share an input; None for one that cannot."""
    if layer.input_inverse is not None or layer.tail_index is not None:
        return None
    stored = (layer.weight_bits, layer.group_size, layer.zero is None, layer.levels is None)
    return (layer.in_features, layer.activations, *stored)


class SharedInput:
    """Its layers, in the order they are called in: the first computes for all, the others find their output.

    That waits at the input tensor itself, and is only ever what the layer would have computed: for whatever else a
    layer is called with, it computes alone.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def output(self, layer: nn.Module, input: Tensor) -> Tensor | None:
        """The output of one of the layers; None: it is to compute it."""
        waiting = getattr(input, WAITING, None)
        if waiting is not None and (y := waiting[1].pop(id(layer), None)) is not None and waiting[0] == _version(input):
            return y
        if layer is not self.layers[0]:
            return None
        outputs = self._compute(input)
        rest = zip(self.layers[1:], outputs[1:], strict=True)
        setattr(input, WAITING, (_version(input), {id(other): y for other, y in rest}))
        return outputs[0]

    def _compute(self, input: Tensor) -> list[Tensor]:
        buffers = [layer._buffers for layer in self.layers]
        columns = [[b[name] for b in buffers] for name in ("packed", "scale", "bias", "zero", "levels")]
        packed, scale, bias, zero, levels = columns
        kinds = [layer.nonlinearity for layer in self.layers]
        first = self.layers[0]
        a, stored = first.activations, (first.group_size, first.weight_bits, zero, levels)
        quantizer = (a.bits, a.max_outliers, a.outlier_threshold)
        outputs = QUANTIZED_LINEARS(input, packed, scale, bias, *quantizer, *stored, [k or "none" for k in kinds])
        return [y if kind is None else applied(y, kind) for y, kind in zip(outputs, kinds, strict=True)]


def _version(input: Tensor) -> int | None:
    """Counts what was written into it; tensors made in inference mode have no count."""
    return None if input.is_inference() else input._version
