"""One nn.Linear: ours as a user calls it, against float32 and every engine of torch's quantize_dynamic.

Our side includes quantizing the activations with run-time outlier splitting, the epilogue and the module call; W8A8,
or another --scheme (the peers stay at 8 bits). The last column of the table is the fastest engine's time over ours, as
a median of paired ratios with its 95 % bounds.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

import ocsquant
from benchmarks import measure
from benchmarks.measure import Call
from ocsquant import Recipe, Weights
from ocsquant.methods.grid import quantize_weight
from ocsquant.nn import QuantizedLinear

# W4 and W2: one scale for each output, without zero points.
SCHEMES: dict[str, Recipe | str] = {"W8A8": "W8A8", "W4A8": "W4A8", "W2A8": "W2A8"} | {
    f"W{bits}": Recipe(Weights(bits=bits)) for bits in (6, 4, 2)
}
SIZES, TOKENS = (768, 2048, 4096), (1, 4, 16, 128, 1024)
SHORT_SIZES, SHORT_TOKENS = (768, 2048), (1, 16, 128)
COLD_BYTES, COLD_TOKENS = 256 * 2**20, 16  # beyond any cache; with more tokens a weight is used long enough to be hot


def competitors(size: int, copies: dict[str, int], scheme: str) -> dict[str, nn.Sequential]:
    """Each competitor's layers, `copies[name]` of them."""
    made = {}
    for name, count in copies.items():
        layers = nn.Sequential(*(nn.Linear(size, size) for _ in range(count))).eval()
        if name == "ocsquant":
            made[name] = ocsquant.quantize(layers, SCHEMES[scheme])
        else:
            made[name] = layers if name == "fp32" else measure.dynamic_peer(layers, name)
    return made


def packed_bytes(size: int, scheme: str) -> int:
    layer: Any = ocsquant.quantize(nn.Linear(size, size), SCHEMES[scheme])
    return int(layer.packed.numel())


def measure_size(size: int, tokens: tuple[int, ...], cold: bool, repetitions: int, scheme: str) -> list[dict[str, Any]]:
    names = {"fp32": None, "ocsquant": None} | {engine: engine for engine in measure.engines()}
    hot = dict.fromkeys(names, 1)
    stored = packed_bytes(size, scheme)
    bytes_of = {
        name: size * size * 4 if name == "fp32" else stored if name == "ocsquant" else size * size for name in names
    }
    many = {name: -(-COLD_BYTES // bytes_of[name]) for name in names}
    cells = []
    for is_cold in (True, False) if cold else (False,):
        served = [m for m in tokens if (m <= COLD_TOKENS and cold) == is_cold]
        if not served:
            continue
        layers = competitors(size, many if is_cold else hot, scheme)
        for m in served:
            x = torch.randn(m, size)
            calls = {name: Call(measure.rotate(layers[name], x), engine) for name, engine in names.items()}
            # A rotation has to come round once, or the layers measured are only the first ones.
            times = measure.interleave(calls, repetitions, block=40e-3 if is_cold else measure.BLOCK)
            cells.append({"size": size, "tokens": m, "cold": is_cold, "bytes": stored, "times": times})
            print(".", end="", flush=True)
    return sorted(cells, key=lambda cell: cell["tokens"])


def call_overhead(repetitions: int) -> dict[str, list[float]]:
    """One token through a 16 x 16 layer, where there is nothing to compute; `quantize` leaves such layers float."""
    layer = nn.Linear(16, 16).eval()
    weight = quantize_weight(layer.weight.detach(), bits=8)
    ours = QuantizedLinear.from_weight(weight, layer.bias, ocsquant.PerToken()).eval()
    x = torch.randn(1, 16)
    return measure.interleave({"fp32": Call(lambda: layer(x)), "ocsquant": Call(lambda: ours(x))}, repetitions)


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--cold", action="store_true", help="up to 16 tokens, rotate over 256 MB of weights")
    options.add_argument("--scheme", choices=SCHEMES, default="W8A8", help="ours (default W8A8)")
    args: argparse.Namespace = options.parse_args()
    repetitions, head = measure.start(args)
    sizes, tokens = (SHORT_SIZES, SHORT_TOKENS) if args.short else (SIZES, TOKENS)
    cells = [cell for size in sizes for cell in measure_size(size, tokens, args.cold, repetitions, args.scheme)]
    print()
    rows, wins, bars = [], {}, {}
    for cell in cells:
        times, size, m = cell["times"], cell["size"], cell["tokens"]
        best = measure.fastest(times, measure.engines())
        won = measure.ratio(times[best], times["ocsquant"])
        wins[f"{size}x{size}, {m} tokens"] = won.median
        bars[f"{size}, {m}"] = {n: measure.ratio(times[best], t) for n, t in times.items() if n != "fp32"}
        ours = sorted(times["ocsquant"])[len(times["ocsquant"]) // 2]
        rows.append(
            [
                f"{size}x{size}",
                m,
                "cold" if cell["cold"] else "hot",
                *(measure.microseconds(times[name]) for name in times),
                f"{2 * m * size * size / ours / 1e9:.0f}",
                f"{cell['bytes'] / ours / 1e9:.1f}",
                measure.ratio(times["fp32"], times["ocsquant"]),
                f"{won} {best}",
            ]
        )
    columns = ["layer", "tokens", "weights", *(f"{name} us" for name in cells[0]["times"])]
    text = measure.table([*columns, "our GOPS", "our GB/s", "fp32 / ours", "best engine / ours"], rows)
    worst = min(wins, key=wins.__getitem__)
    overhead = call_overhead(repetitions)
    extra = measure.ratio(overhead["ocsquant"], overhead["fp32"])
    text += (
        f"\n\nbest engine / ours: geometric mean {measure.geometric_mean(list(wins.values())):.2f}, "
        f"worst cell {wins[worst]:.2f} ({worst})"
        f"\ncall overhead, 1 token through 16x16: nn.Linear {measure.microseconds(overhead['fp32'])} us, ours "
        f"{measure.microseconds(overhead['ocsquant'])} us, ratio {extra}"
    )
    name = measure.named("linear" + ("_cold" if args.cold else ""), args.scheme)
    measure.finish(name, head, text, {"cells": cells, "call_overhead": overhead}, bars)


if __name__ == "__main__":
    main()
