"""Where does a small layer gain nothing? Our linear against nn.Linear over small shapes, each with 1 and 128 tokens.

`ocsquant.quantize` leaves a layer float where ocsquant.suitability.pays(outputs, inputs) says no; this sweep is what
that rule is checked with.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

import ocsquant
from benchmarks import measure
from benchmarks.measure import Call
from ocsquant.methods.grid import quantize_weight
from ocsquant.nn import QuantizedLinear
from ocsquant.suitability import pays

SIZES, SHORT_SIZES, TOKENS = (8, 16, 32, 64, 96, 128, 192, 256), (16, 32, 64, 256), (1, 128)


def cell(outputs: int, inputs: int, tokens: int, repetitions: int) -> dict[str, Any]:
    layer = nn.Linear(inputs, outputs).eval()
    weight = quantize_weight(layer.weight.detach(), bits=8)
    ours = QuantizedLinear.from_weight(weight, layer.bias, ocsquant.PerToken()).eval()
    x = torch.randn(tokens, inputs)
    calls = {"fp32": Call(lambda: layer(x)), "ocsquant": Call(lambda: ours(x))}
    times = measure.interleave(calls, repetitions, block=1e-3)
    gain = measure.ratio(times["fp32"], times["ocsquant"])
    return {"outputs": outputs, "inputs": inputs, "tokens": tokens, "gain": gain, "times": times}


def grid(cells: list[dict[str, Any]], sizes: tuple[int, ...], tokens: int) -> str:
    """fp32 / ours, outputs down, inputs across; * where ours is slower beyond doubt, () where quantize leaves it."""
    found = {(c["outputs"], c["inputs"]): c["gain"] for c in cells if c["tokens"] == tokens}
    rows = []
    for outputs in sizes:
        row = [f"{outputs} outputs"]
        for inputs in sizes:
            gain = found[outputs, inputs]
            text = f"{gain.median:.2f}" + ("*" if gain.high < measure.NOT_SLOWER else "")
            row.append(text if taken(outputs, inputs) else f"({text})")
        rows.append(row)
    return measure.table([f"{tokens} tokens", *(f"{inputs} inputs" for inputs in sizes)], rows)


def taken(outputs: int, inputs: int) -> bool:
    return pays(outputs, inputs)


def verdict(cells: list[dict[str, Any]]) -> str:
    """The default rule judged by these cells."""
    lines = []
    for tokens in TOKENS:
        here = [c for c in cells if c["tokens"] == tokens]
        slower = [c for c in here if taken(c["outputs"], c["inputs"]) and c["gain"].high < measure.NOT_SLOWER]
        missed = [c for c in here if not taken(c["outputs"], c["inputs"]) and c["gain"].low > 1.02]
        lines.append(f"{tokens} tokens: quantized by default but slower: {names(slower)}")
        lines.append(f"{tokens} tokens: left float by default though faster: {names(missed)}")
    both: dict[tuple[int, int], list[float]] = {}
    for c in cells:
        both.setdefault((c["outputs"], c["inputs"]), []).append(c["gain"].median)
    typical = {shape: measure.geometric_mean(gains) for shape, gains in both.items()}
    inside = [gain for shape, gain in typical.items() if taken(*shape)]
    outside = [gain for shape, gain in typical.items() if not taken(*shape)]
    lines.append(
        f"fp32 / ours, median over shapes: "
        f"{statistics.median(inside):.2f} quantized, {statistics.median(outside):.2f} left"
    )
    return "\n".join(lines)


def names(cells: list[dict[str, Any]]) -> str:
    return ", ".join(f"{c['outputs']}x{c['inputs']} ({c['gain'].median:.2f})" for c in cells) or "none"


def main() -> None:
    args = measure.parser(__doc__).parse_args()
    repetitions, head = measure.start(args)
    sizes = SHORT_SIZES if args.short else SIZES
    cells = [cell(n, k, m, repetitions) for m in TOKENS for n in sizes for k in sizes]
    text = "fp32 / ours (layers in brackets stay float by default; * ours is slower beyond doubt)\n\n"
    text += "\n\n".join(grid(cells, sizes, m) for m in TOKENS) + "\n\n" + verdict(cells)
    measure.finish("small_layers", head, text, [{**c, "gain": vars(c["gain"])} for c in cells])


if __name__ == "__main__":
    main()
