"""What was quantized, what was not and why."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from ocsquant.config import check_type
from ocsquant.errors import ArgumentError
from ocsquant.nn import Quantized, quantized_modules

ATTRIBUTE = "_ocsquant_layers"


@dataclass
class Layer:
    """One line of a report. `bytes_*` count weights, scales and bias; `sqnr` is in dB; `reason` says why not."""

    path: str
    kind: str
    bits: int | None = None
    activation_bits: int | None = None
    split_channels: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    sqnr: float | None = None
    kernel: str | None = None
    simulated: bool = False
    reason: str = ""

    @property
    def scheme(self) -> str:
        if self.kernel is None:
            return "float"
        if self.bits is None:
            return "split"
        return f"W{self.bits}A{self.activation_bits or 16}"


def with_earlier(model: nn.Module, lines: list[Layer]) -> tuple[Layer, ...]:
    """And what an earlier call has said of modules that these lines do not name, as long as they are there."""
    named = {line.path for line in lines}
    left = {path for path, _ in model.named_modules()} - named
    return (*lines, *(line for line in model.__dict__.get(ATTRIBUTE) or () if line.path in left))


@dataclass(frozen=True)
class Report:
    """The layers of a model; prints as a table."""

    layers: tuple[Layer, ...]
    isa: str
    total_before: int
    total_after: int

    def to_json(self) -> str:
        """The same as JSON text, an infinite SQNR as null."""
        rows = [dict(dataclasses.asdict(layer), scheme=layer.scheme) for layer in self.layers]
        for row in rows:
            if row["sqnr"] is not None and math.isinf(row["sqnr"]):
                row["sqnr"] = None
        totals = {"isa": self.isa, "total_before": self.total_before, "total_after": self.total_after}
        return json.dumps({**totals, "layers": rows}, indent=2)

    def __str__(self) -> str:
        header = ("layer", "type", "scheme", "split", "KiB before", "KiB after", "SQNR dB", "kernel, or why not")
        rows = [header, *map(_row, self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(w) if i in (0, 1, 2, 7) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(r, widths, strict=True))
            ).rstrip()
            for r in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        done = [layer for layer in self.layers if layer.kernel is not None]
        ratio = self.total_before / max(self.total_after, 1)
        lines.append(
            f"{len(done)} layers quantized; the whole model {self.total_before / 2**20:.1f} -> "
            f"{self.total_after / 2**20:.1f} MiB ({ratio:.2f}x smaller); kernels run at {self.isa}"
        )
        return "\n".join(lines)


def _row(layer: Layer) -> tuple[str, ...]:
    done = layer.kernel is not None
    note = "; ".join(part for part in (layer.kernel, layer.reason) if part)
    return (
        layer.path or "(the model itself)",
        layer.kind,
        layer.scheme,
        str(layer.split_channels) if layer.split_channels else "",
        f"{layer.bytes_before / 1024:.1f}" if done else "",
        f"{layer.bytes_after / 1024:.1f}" if done else "",
        "" if layer.sqnr is None or math.isinf(layer.sqnr) else f"{layer.sqnr:.1f}",
        note,
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {(t.data_ptr() or id(t), t.shape, t.dtype): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def report(model: nn.Module) -> Report:
    """What `quantize` did to a model, layer by layer.

    Raises ArgumentError for a model that holds nothing of ocsquant's.
    """
    from ocsquant.ops import cpu_isa  # here, so that this module can be read without the library

    check_type("model", model, nn.Module, "a torch.nn.Module")
    layers: tuple[Layer, ...] | None = model.__dict__.get(ATTRIBUTE)
    if layers is None:
        first: dict[int, tuple[str, Quantized]] = {}
        for path, module in quantized_modules(model):
            first.setdefault(id(module), (path, module))
        layers = tuple(found(*entry) for entry in first.values())
    if not layers:
        raise ArgumentError("model", "a model that ocsquant.quantize or ocsquant.load made", type(model).__name__)
    after = model_bytes(model)
    for layer in layers:
        if layer.simulated:
            after += layer.bytes_after - layer.bytes_before
    before = after + sum(layer.bytes_before - layer.bytes_after for layer in layers if layer.kernel is not None)
    return Report(layers, cpu_isa()[0], before, after)


def found(path: str, module: Quantized) -> Layer:
    """A quantized layer met without the record of how it was made."""
    after = sum(b.numel() * b.element_size() for b in module.buffers())
    before, split = module.float_bytes, module.split_channels
    return Layer(path, module.origin, module.bits, module.activation_bits, split, before, after, kernel=module.kernel)


def layers_to_json(layers: tuple[Layer, ...]) -> list[dict[str, Any]]:
    """For a file's metadata."""
    return [
        {k: (None if isinstance(v, float) and math.isinf(v) else v) for k, v in dataclasses.asdict(r).items()}
        for r in layers
    ]
