"""Weights of four bits and fewer on four pretrained networks: grids, clips, GPTQ, codebooks, SplitQuant.

Each row stands with its stored bits per weight (codes, scales, zero points and levels) and with its distance from
float32 and the standard error of that distance (paired bootstrap over stories, sentences or streams of text).
Embeddings and tied heads stay float. What an absent network or text would show is skipped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import baselines
import measure
import networks
import torch
from accuracy import Row, load_minilm
from torch import Tensor, nn

import ocsquant
from ocsquant import PerToken, Recipe, SplitQuant, Weights
from ocsquant.methods.splitquant import cluster_bounds, part_of

SENTENCES, SHORT_SENTENCES, RESAMPLES = 600, 200, 1000
ROW = {"granularity": "channel"}
G128 = {"granularity": "group", "group_size": 128, "symmetric": False}
G64 = {"granularity": "group", "group_size": 64, "symmetric": False}
GRIDS = {"W4 row": (4, ROW), "W4 g128 asymmetric": (4, G128), "W3 g64 asymmetric": (3, G64)}
WAYS: dict[str, dict[str, str]] = {
    "nearest": {},
    "clip mse": {"clip": "mse"},
    "clip output": {"clip": "output"},
    "GPTQ": {"rounding": "gptq"},
    "GPTQ, clip output": {"clip": "output", "rounding": "gptq"},
}


@dataclass
class Subject:
    """A network, what calibrates it, and its score: `losses` gives a sum and a weight per item, `show` a figure."""

    name: str
    model: nn.Module
    calibration: Iterable[Any]
    losses: Callable[[nn.Module], tuple[Tensor, Tensor]]
    show: Callable[[Tensor], Tensor]  # of mean losses
    unit: str

    def __post_init__(self) -> None:
        self.exact = self.losses(self.model)

    def score(self, model: nn.Module) -> tuple[float, float, float]:
        """The figure, its distance from float32, and that distance's standard error."""
        losses, weights = self.losses(model)
        picks = torch.randint(len(losses), (RESAMPLES, len(losses)), generator=torch.Generator().manual_seed(0))

        def distance(index: Tensor) -> Tensor:
            mean, exact = (v[index].sum(-1) / weights[index].sum(-1) for v in (losses, self.exact[0]))
            return self.show(mean) - self.show(exact)

        whole = self.show(losses.sum() / weights.sum())
        return float(whole), float(distance(torch.arange(len(losses)))), float(distance(picks).std())


def stories(short: bool) -> Subject | None:
    loaded = networks.stories260k()
    if loaded is None:
        return None
    model, windows, seen = loaded
    windows = windows[:30] if short else windows
    return Subject(
        "stories260K",
        model,
        [ids[None] for ids in seen],
        lambda m: networks.window_losses(m, windows),
        torch.exp,
        "perplexity",
    )


def minilm(short: bool) -> Subject | None:
    loaded = load_minilm()
    if loaded is None:
        return None
    model, tokenizer = loaded
    texts = networks.sentences((SHORT_SENTENCES if short else SENTENCES) + 128)
    seen = texts[:: len(texts) // 128][:128]
    others = [text for text in texts if text not in set(seen)]
    batches = [
        dict(tokenizer(list(seen[i : i + 32]), padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, 128, 32)
    ]
    reference = networks.embed(model, tokenizer, others)

    def losses(made: nn.Module) -> tuple[Tensor, Tensor]:
        cosine = (networks.embed(made, tokenizer, others) * reference).sum(1).double()
        return 1 - cosine, torch.ones_like(cosine)

    return Subject("MiniLM", model, batches, losses, lambda mean: 1 - mean, "cosine")


def _lstm(
    name: str, loaded: tuple[Any, Tensor, Tensor] | None, streams: int, show: Callable[[Tensor], Tensor], unit: str
) -> Subject | None:
    if loaded is None:
        return None
    model, ids, seen = loaded

    def losses(made: Any) -> tuple[Tensor, Tensor]:
        return networks.stream_losses(made, ids, streams), torch.ones(streams, dtype=torch.float64)

    return Subject(name, model, list(seen.view(20, -1).split(250, dim=1)), losses, show, unit)


def ptb(short: bool) -> Subject | None:
    loaded = networks.ptb()
    if loaded is not None and short:
        loaded = loaded[0], loaded[1][:20_000], loaded[2]
    return _lstm("ptb", loaded, 10, torch.exp, "perplexity")


def charrnn(short: bool) -> Subject | None:
    def bits(mean: Tensor) -> Tensor:
        return mean / math.log(2)

    return _lstm("charrnn", networks.charrnn(12_000 if short else 120_000), 20, bits, "bits/character")


SUBJECTS: dict[str, Callable[[bool], Subject | None]] = {
    "stories260k": stories,
    "minilm": minilm,
    "ptb": ptb,
    "charrnn": charrnn,
}


def recipes(short: bool) -> dict[str, Recipe]:
    """All of weights alone, but for the row that says A8."""
    table = {
        f"{grid}, {way}": Weights(bits, **options, **how)  # type: ignore[arg-type]
        for grid, (bits, options) in GRIDS.items()
        for way, how in WAYS.items()
        if not short or way in ("nearest", "GPTQ, clip output")
    }
    rows = SplitQuant(clusters="row", ranges="row")
    table |= {
        "W4 k-means 16 under row scales": Weights(4, codebook="kmeans"),
        "W4 k-means 16, fitted to outputs, GPTQ": Weights(4, codebook="kmeans", clip="output", rounding="gptq"),
        "W4 NF4 under row scales": Weights(4, codebook="nf4"),
        "W4 NF4 g64": Weights(4, "group", 64, codebook="nf4"),
        "INT2 row": Weights(2, symmetric=False),
        "INT2 g128, clip mse": Weights(2, "group", 128, symmetric=False, clip="mse"),
        "SplitQuant INT2, one codebook, tensor scale": Weights(2, "tensor", split=SplitQuant()),
        "SplitQuant INT2, one codebook, row scales": Weights(2, split=SplitQuant()),
        "SplitQuant INT2, masked parts, row ranges": Weights(2, "tensor", split=SplitQuant(ranges="row")),
        "SplitQuant INT2, a codebook per row": Weights(2, split=rows),
        "SplitQuant INT2, a codebook per row, GPTQ": Weights(2, split=rows, rounding="gptq"),
        "SplitQuant INT4, one codebook, row scales": Weights(4, split=SplitQuant()),
        "INT6 row (3 x 2 bits)": Weights(6),
    }
    found = {name: Recipe(weights, None) for name, weights in table.items()}
    found["W4A8 row, GPTQ, clip output"] = Recipe(Weights(4, clip="output", rounding="gptq"), PerToken())
    return found


@torch.no_grad()
def authors_splitquant(model: nn.Module, bits: int = 2) -> nn.Module:
    """The paper's own pipeline: zeros where the other parts have values, row ranges over them, shifts in float; biases
    the same way.
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module.weight is getattr(
            getattr(model, "embedding", None), "weight", 0
        ):
            continue
        for values in (module.weight, module.bias[None] if module.bias is not None else module.weight[:0]):
            if values.numel():
                values.copy_(_in_three(values, bits))
    return model


def _in_three(values: Tensor, bits: int) -> Tensor:
    part = part_of(values, cluster_bounds(values.reshape(1, -1), 3))
    total = torch.zeros_like(values)
    for p in range(3):
        own = torch.where(part == p, values, 0.0)
        low, high = own.amin(1, keepdim=True), own.amax(1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
        total += ((own - low) / step).round() * step + low
    return total


def stored_bits(made: nn.Module) -> float:
    """Of a weight, over all layers that were quantized."""
    done = [line for line in ocsquant.report(made).layers if line.kernel]
    return 32 * sum(line.bytes_after for line in done) / sum(line.bytes_before for line in done)


def rows_of(subject: Subject, short: bool) -> Iterator[Row]:
    figures = {"float32": subject.score(subject.model)}
    yield Row(subject.name, "float32", f"{figures['float32'][0]:.4f} {subject.unit}", "32")

    def row(what: str, model: nn.Module, bits: str) -> Row:
        figures[what] = value, distance, error = subject.score(model)
        return Row(subject.name, what, f"{value:.4f} ({distance:+.4f} +- {error:.4f})", bits)

    for what, recipe in recipes(short).items():
        made = ocsquant.quantize(
            copy.deepcopy(subject.model),
            recipe,
            calibration=subject.calibration,
            simulate=True,
            filter_fn=networks.no_embedding,
        )
        yield row(what, made, f"{stored_bits(made):.2f}")
    attention = not any(isinstance(module, nn.RNNBase) for module in subject.model.modules())
    for grid, (bits, options) in GRIDS.items() if not short else ():
        if attention:  # its scales are of linears
            yield row(
                f"{grid}, AWQ", baselines.awq(copy.deepcopy(subject.model), bits, options, subject.calibration), ""
            )
        yield row(f"{grid}, HQQ", baselines.hqq(copy.deepcopy(subject.model), bits, options), "")
    if subject.name == "stories260K":
        yield row("SplitQuant INT2, the authors' pipeline", authors_splitquant(copy.deepcopy(subject.model)), "")
    yield from bars_of(subject, {what: figure[0] for what, figure in figures.items()})


def bars_of(subject: Subject, value: dict[str, float]) -> Iterator[Row]:
    sign = -1 if subject.unit == "cosine" else 1
    for grid in GRIDS:
        better = sign * (value[f"{grid}, nearest"] - value[f"{grid}, GPTQ, clip output"])
        yield Row(subject.name, f"{grid}: GPTQ better than nearest", f"{better:+.4f}", "> 0", better > 0)
    if subject.name != "stories260K":
        return
    for what, most in (
        ("W4A8 row, GPTQ, clip output", 4.62),
        ("SplitQuant INT2, masked parts, row ranges", 7.9),
        ("SplitQuant INT2, a codebook per row", 5.9),
    ):
        yield Row(subject.name, what, f"{value[what]:.3f}", f"<= {most}", value[what] <= most)


def run(
    description: str | None,
    name: str,
    columns: list[str],
    rows: Callable[[Subject, bool], Iterable[Row]],
    subjects: dict[str, Callable[[bool], Subject | None]] = SUBJECTS,
) -> None:
    """A table over several subjects as a command."""
    options = measure.parser(description or "")
    options.add_argument("--only", choices=subjects, action="append", help="only this one; may be given again")
    args = options.parse_args()
    _, head = measure.start(args)
    found: list[Row] = []
    for key in args.only or subjects:
        subject = subjects[key](args.short)
        if subject is None:
            print(f"skipped {key}: its network or text is absent")
            continue
        for row in rows(subject, args.short):
            found.append(row)
            print(" | ".join(row.cells()), flush=True)
    failed = sum(row.met is False for row in found)
    text = measure.table(columns, [row.cells() for row in found])
    bars = sum(row.met is not None for row in found)
    text += f"\n\n{bars} bars, {failed} missed" if bars else ""
    measure.finish(name, head, text, [vars(row) for row in found])


if __name__ == "__main__":
    run(__doc__, "low_bits", ["network", "weights", "score", "bits, or bar", "met"], rows_of)
