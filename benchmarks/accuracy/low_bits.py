"""Weights of four bits and fewer on four pretrained networks: grids, clips, GPTQ, codebooks, SplitQuant.

Each row stands with its stored bits per weight (codes, scales, zero points and levels) and with its distance from
float32 and the standard error of that distance (paired bootstrap over stories, sentences or streams of text).
Embeddings and tied heads stay float. What an absent network or text would show is skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import ocsquant
from benchmarks import networks
from benchmarks.accuracy import baselines
from benchmarks.accuracy.subjects import FEW_BITS, SUBJECTS, Row, Subject, run, shown, stored_bits
from ocsquant import PerToken, Recipe, SplitQuant, Weights
from ocsquant.methods.splitquant import cluster_bounds, part_of

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
COMPARED = ("nearest", "GPTQ, clip output")
MOST = {  # perplexity of stories260K
    "W4A8 row, GPTQ, clip output": 4.62,
    "SplitQuant INT2, masked parts, row ranges": 7.9,
    "SplitQuant INT2, a codebook per row": 5.9,
}


def recipes(short: bool) -> dict[str, Recipe]:
    """All of weights alone, but for the row that says A8."""
    table = {
        f"{grid}, {way}": Weights(bits, **options, **how)  # type: ignore[arg-type]
        for grid, (bits, options) in GRIDS.items()
        for way, how in WAYS.items()
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
    if short:
        compared = [f"{grid}, {way}" for grid in GRIDS for way in COMPARED]
        table = {what: weights for what, weights in table.items() if what in (*compared, *MOST)}
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


def rows_of(subject: Subject, short: bool) -> Iterator[Row]:
    figures = {"float32": subject.score(subject.model)}
    yield Row(subject.name, "float32", f"{figures['float32'][0]:.4f} {subject.unit}", "32")

    def row(what: str, model: nn.Module, bits: str) -> Row:
        figures[what] = subject.score(model)
        return Row(subject.name, what, shown(figures[what]), bits)

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
        nearest, gptq = (value[f"{grid}, {way}"] for way in COMPARED)
        better = sign * (nearest - gptq)
        yield Row(subject.name, f"{grid}: GPTQ better than nearest", f"{better:+.4f}", "> 0", better > 0)
    if subject.name != "stories260K":
        return
    for what, most in MOST.items():
        yield Row(subject.name, what, f"{value[what]:.3f}", f"<= {most}", value[what] <= most)


if __name__ == "__main__":
    columns = ["network", "weights", "score", "bits, or bar", "met"]
    run(__doc__, "low_bits", columns, rows_of, {name: SUBJECTS[name] for name in FEW_BITS})
