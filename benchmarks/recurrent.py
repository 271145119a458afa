"""LSTM and GRU language models: ours against float32 and every engine of torch's quantize_dynamic.

An embedding of 10,000 words, two layers of 650, a linear over the words, 35 steps; the layers alone at other sizes;
then the networks that were trained on the Penn Treebank and on Charlotte Bronte with their accuracy. W4 is our 4-bit
form, one scale for each output; the peers have 8 bits.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

import ocsquant
from benchmarks import measure, networks
from benchmarks.measure import Call
from ocsquant import Recipe, Weights

FOUR_BITS = Recipe(Weights(bits=4))
SIZES = ((64, 64), (8, 256), (256, 256), (650, 650))
BATCHES = ((1, 35), (20, 35), (1, 1))


class Words(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.emb, self.rnn, self.dec = nn.Embedding(10_000, 650), kind(650, 650, 2), nn.Linear(650, 10_000)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dec(self.rnn(self.emb(ids))[0])


class Layer(nn.Module):
    """Makes a layer a child, which is all that quantize_dynamic replaces."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def competitors(model: nn.Module) -> dict[str, tuple[nn.Module, str | None]]:
    made: dict[str, tuple[nn.Module, str | None]] = {
        "fp32": (model, None),
        "ocsquant": (ocsquant.quantize(copy.deepcopy(model)), None),
        "W4": (ocsquant.quantize(copy.deepcopy(model), FOUR_BITS), None),
    }
    return made | {engine: (measure.dynamic_peer(model, engine), engine) for engine in measure.engines()}


def timed(models: dict[str, tuple[nn.Module, str | None]], x: Tensor, repetitions: int) -> dict[str, list[float]]:
    def call(model: nn.Module, engine: str | None) -> Call:
        return Call(lambda: model(x), engine)

    return measure.interleave({name: call(*entry) for name, entry in models.items()}, repetitions, block=20e-3)


def row(name: str, times: dict[str, list[float]]) -> list[Any]:
    best = measure.fastest(times, measure.engines())
    shown = [f"{sorted(t)[len(t) // 2] * 1e3:.2f}" for t in times.values()]
    float32, engine, w4 = ratios(times).values()
    return [name, *shown, str(float32), f"{engine} {best}", str(w4)]


def ratios(times: dict[str, list[float]]) -> dict[str, measure.Ratio]:
    best = measure.fastest(times, measure.engines())
    pairs = {"fp32 / ours": ("fp32", "ocsquant"), "best / ours": (best, "ocsquant"), "best / W4": (best, "W4")}
    return {name: measure.ratio(times[a], times[b]) for name, (a, b) in pairs.items()}


def trained(repetitions: int) -> tuple[dict[str, dict[str, list[float]]], list[list[Any]]]:
    """Times and accuracy of the trained networks; nothing where they are absent."""
    speed, accuracy = {}, []
    networks_of = {"ptb, words": (networks.ptb, 10, math.exp), "charrnn, characters": (networks.charrnn, 20, None)}
    for name, (load, streams, shown) in networks_of.items():
        loaded = load()
        if loaded is None:
            print(f"skipped: {name}: no data (OCSQUANT_DATA)")
            continue
        model, scored, _ = loaded
        models = competitors(model)
        for batch in (1, 20):
            times = timed(models, scored[: 35 * batch].view(batch, 35), repetitions)
            speed[f"{name}, {batch} x 35"] = times
        values = {}
        for key, (network, engine) in models.items():
            measure.use_engine(engine)
            loss = float(networks.stream_losses(network, scored, streams).mean())
            values[key] = shown(loss) if shown is not None else loss / math.log(2)
        first = values["fp32"]
        accuracy.append([name, *(f"{v:.3f} ({(v / first - 1) * 100:+.2f} %)" for v in values.values())])
    return speed, accuracy


def main() -> None:
    args = measure.parser(__doc__).parse_args()
    repetitions, head = measure.start(args)
    measured: dict[str, dict[str, list[float]]] = {}
    for kind in (nn.LSTM, nn.GRU):
        models = competitors(Words(kind).eval())
        for batch in (1, 20):
            times = timed(models, torch.randint(10_000, (35, batch)), repetitions)
            measured[f"{kind.__name__} 2 x 650, 10,000 words, {batch} x 35"] = times
        for inputs, hidden in SIZES[:2] if args.short else SIZES:
            models = competitors(Layer(kind(inputs, hidden)).eval())
            for batch, steps in BATCHES[:1] if args.short else BATCHES:
                times = timed(models, torch.randn(steps, batch, inputs), repetitions)
                measured[f"{kind.__name__} {inputs} -> {hidden}, {batch} x {steps}"] = times
    speed, accuracy = trained(repetitions)
    measured |= speed
    rows = [row(name, times) for name, times in measured.items()]
    columns = ["network, batch x steps", *(f"{name} ms" for name in models)]
    text = measure.table([*columns, "fp32 / ours", "best engine / ours", "best engine / W4"], rows)
    if accuracy:
        text += "\n\nperplexity of words, bits per character\n\n" + measure.table(["network", *models], accuracy)
    measure.finish(
        "recurrent", head, text, {"speed": rows, "accuracy": accuracy}, {n: ratios(t) for n, t in measured.items()}
    )


if __name__ == "__main__":
    main()
