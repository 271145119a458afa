"""What our own variants of one layer cost beside each other: OCS tails, static and dynamic inputs, tables of levels,
and SplitQuant's three layers against the one they are here. New tokens at every call, a few of their values outliers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ocsquant
from benchmarks import measure
from benchmarks.measure import Call
from ocsquant import OCS, Activations, PerChannelStatic, PerToken, Recipe, SplitQuant, Weights
from ocsquant.methods.grid import quantize_weight
from ocsquant.methods.outliertune import input_transform
from ocsquant.nn import QuantizedLinear

SIZE, TOKENS, SHORT_TOKENS = 2048, (1, 4, 16, 64, 128, 1024), (1, 16, 128)
RATIOS = (0.02, 0.05)


def tokens(count: int) -> Tensor:
    """Channels of different sizes around different middles; four are outliers."""
    size = torch.linspace(0.3, 1.0, SIZE)
    size[::512] = 12.0
    return torch.randn(count, SIZE) * size + size * torch.linspace(-1, 1, SIZE)


def layers() -> dict[str, Any]:
    """Each variant by its name."""
    linear = nn.Linear(SIZE, SIZE)
    linear.weight.data.normal_(0, SIZE**-0.5)
    wide = {ratio: nn.Linear(SIZE, SIZE) for ratio in RATIOS}
    for ratio, layer in wide.items():  # outlier columns, so that what is split needs its tail
        layer.weight.data.copy_(linear.weight)
        layer.weight.data[:, torch.randperm(SIZE)[: round(ratio * SIZE)]] *= 4

    def made(recipe: Recipe | str | None, source: nn.Linear = linear) -> Any:
        held = nn.Sequential(nn.Linear(SIZE, SIZE))
        held.load_state_dict({"0.weight": source.weight, "0.bias": source.bias})
        return ocsquant.quantize(held, recipe)[0]

    found = {
        "W8A8": made(None),
        "W8A8, nothing split": made(Recipe(activations=PerToken(max_outliers=0))),
        "static, folded": folded(linear, PerChannelStatic()),
        "static, folded, split": folded(linear, PerChannelStatic(max_outliers=16)),
        "W4": made(Recipe(Weights(4))),
        "W2, SplitQuant's table": made(Recipe(Weights(2, split=SplitQuant()))),
    }
    for ratio, layer in wide.items():
        found[f"tail {ratio:.0%}"] = made(Recipe(Weights(split=OCS(ratio))), layer)
    parts = [made(Recipe(Weights(2))) for _ in range(3)]
    found["three layers of 2 bits"] = lambda x: parts[0](x) + parts[1](x) + parts[2](x)
    return found


def folded(linear: nn.Linear, inputs: Activations) -> QuantizedLinear:
    """Whether the plan would choose it for these inputs or not."""
    x, w = tokens(4096), linear.weight.detach()
    transform = input_transform(x.amin(0), x.amax(0), w, inputs.bits, inputs.scale, inputs.smooth_alpha, inputs.shift)
    weight = quantize_weight(transform.fold(w), 8)
    return QuantizedLinear.from_weight(weight, linear.bias, inputs, transform, w)


# Time of the first over the second, and what it must be by the number of tokens.
PAIRS: dict[tuple[str, str], Callable[[int, float], tuple[str, float]]] = {
    ("tail 2%", "W8A8"): lambda m, bytes_ratio: ("<=", 1.04 if m >= 16 else bytes_ratio + 0.03),
    ("tail 5%", "W8A8"): lambda m, bytes_ratio: ("<=", 1.07 if m >= 16 else bytes_ratio + 0.03),
    ("static, folded", "W8A8"): lambda m, _: ("<=", 1.02),
    ("static, folded", "W8A8, nothing split"): lambda m, _: ("<=", 1.02),
    ("static, folded, split", "W8A8"): lambda m, _: ("<=", 1.02),
    ("W2, SplitQuant's table", "W4"): lambda m, _: ("<=", 1.3 if m <= 4 else 1.03 if m >= 64 else 1.15),
    ("three layers of 2 bits", "W2, SplitQuant's table"): lambda m, _: (">=", 2.0 if m >= 16 else 1.0),
}


def timed(made: dict[str, Callable[[Tensor], Any]], m: int, repetitions: int) -> dict[str, list[float]]:
    batches = [batch.contiguous() for batch in tokens(max(1024, 4 * m)).split(m)[:64]]

    def in_turn(run: Callable[[Tensor], Any]) -> Callable[[], None]:
        return lambda: [run(batch) for batch in batches] and None

    return measure.interleave({name: Call(in_turn(run)) for name, run in made.items()}, repetitions)


def main() -> None:
    args = measure.parser(__doc__).parse_args()
    repetitions, head = measure.start(args)
    made = layers()
    stored: dict[str, int] = {
        name: layer.packed.numel() for name, layer in made.items() if isinstance(layer, nn.Module)
    }
    times = {m: timed(made, m, min(repetitions, 15)) for m in (SHORT_TOKENS if args.short else TOKENS)}
    rows, missed = [], 0
    for (name, other), bar in PAIRS.items():
        row = [f"{name} / {other}"]
        for m, here in times.items():
            ratio = measure.ratio(here[name], here[other])
            sign, limit = bar(m, stored[name] / stored[other] if name in stored else 1.0)
            met = ratio.median <= limit if sign == "<=" else ratio.median >= limit
            missed += not met
            row.append(f"{ratio.median:.2f} ({sign} {limit:.2f}{'' if met else ', missed'})")
        rows.append(row)
    text = f"{SIZE} x {SIZE}, time over time by tokens (in brackets what it should be)\n\n"
    text += measure.table(["", *map(str, times)], rows) + f"\n\n{len(PAIRS) * len(times)} bars, {missed} missed"
    bars = {
        f"{m} tokens": {f"{a} / {b}": measure.ratio(here[a], here[b]) for a, b in PAIRS} for m, here in times.items()
    }
    measure.finish("variants", head, text, {"times": {str(m): here for m, here in times.items()}}, bars)


if __name__ == "__main__":
    main()
