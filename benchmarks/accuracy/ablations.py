"""The choices behind the defaults, one changed at a time: what each is worth.

Run-time OCS (its threshold, and how many values of a token it may split), the amount of calibration of OutlierTune, the
parts of SplitQuant (of weights, and of activations), which channels OCS on weights splits and how, and OCS on
activations beside an oracle that knows the batch. Weights are per output channel and min-max unless
the row says otherwise; embeddings and tied heads stay float.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

import ocsquant
from benchmarks import measure, networks
from benchmarks.accuracy import baselines
from benchmarks.accuracy.subjects import SUBJECTS, Row, Subject, shown
from ocsquant import OCS, Activations, PerChannelStatic, PerTensorStatic, PerToken, Recipe, SplitQuant, Weights
from ocsquant.methods.tokens import quantize_tokens

INPUTS_ALONE = ((4, 0, 4.0), (4, 16, 4.0), (4, 16, 2.0), (4, 32, 2.0), (4, 64, 2.0), (5, 16, 4.0), (5, 32, 2.0))
THRESHOLDS, OUTLIERS = (2.0, 3.0, 5.0, 6.0, 8.0), (0, 4, 8, 32, 64)


def scored(subject: Subject, what: str, recipe: Recipe, calibration: Iterable[Any] | None = None, **how: Any) -> Row:
    made = ocsquant.quantize(
        copy.deepcopy(subject.model), recipe, calibration=calibration, filter_fn=networks.no_embedding, **how
    )
    return score(subject, what, made)


def score(subject: Subject, what: str, model: nn.Module) -> Row:
    return Row(subject.name, what, shown(subject.score(model)))


def runtime_ocs(subject: Subject, short: bool) -> Iterator[Row]:
    """The defaults are 16 outliers and a threshold of 4 root mean squares."""
    for bits in (8, 6):

        def row(what: str, *choice: Any, bits: int = bits) -> Row:
            return scored(subject, f"W{bits}A{bits}, {what}", Recipe(Weights(bits), PerToken(bits, *choice)))

        yield row("16 outliers, threshold 4")
        for threshold in THRESHOLDS[:1] if short else THRESHOLDS:
            yield row(f"16 outliers, threshold {threshold:g}", 16, threshold)
        for outliers in OUTLIERS[:1] if short else OUTLIERS:
            yield row(f"{outliers} outliers, threshold 4", outliers)
    for bits, outliers, threshold in INPUTS_ALONE[:1] if short else INPUTS_ALONE:
        recipe = Recipe(activations=PerToken(bits, outliers, threshold))
        yield scored(subject, f"W8A{bits}, {outliers} outliers, threshold {threshold:g}", recipe)


def calibration_size(subject: Subject, short: bool) -> Iterator[Row]:
    """Batches of the subject: of 32 sentences, or windows of 512 tokens."""
    batches = list(subject.calibration)
    recipe = Recipe(Weights(6), PerChannelStatic(6, max_outliers=16))
    count = 1
    while count <= len(batches):
        yield scored(subject, f"W6A6, OutlierTune and run-time OCS, {count} batches", recipe, batches[:count])
        count *= 4 if short else 2


def split_parts(subject: Subject, short: bool) -> Iterator[Row]:
    """2, 3 and 4 parts are 8, 12 and 16 levels; all are stored in 4 bits."""
    for parts in (2, 3, 4):
        for clusters in ("layer",) if short else ("layer", "row"):
            split = SplitQuant(parts, clusters, ranges="row")
            what = f"SplitQuant INT2, {parts} parts, clusters and ranges of a {clusters}"
            if clusters == "layer":
                what = f"SplitQuant INT2, {parts} parts, clusters of a layer, ranges of a row"
            yield scored(subject, what, Recipe(Weights(2, split=split), None), simulate=True)
    yield scored(subject, "4 bits, k-means", Recipe(Weights(4, codebook="kmeans"), None), simulate=True)


def input_parts(subject: Subject, short: bool) -> Iterator[Row]:
    """SplitQuant's split of activations, on and off; weights stay float. Its neighbours have a step per token."""
    for bits in (8,) if short else (8, 6):
        for parts in (1, 3):
            made = baselines.with_inputs(copy.deepcopy(subject.model), baselines.channel_parts(bits, parts))
            yield score(subject, f"A{bits}, a range for each batch, {parts} parts of channels", made)
        for outliers in (0, 16):
            made = baselines.with_inputs(copy.deepcopy(subject.model), per_token(bits, outliers))
            yield score(subject, f"A{bits}, a step per token, {outliers} outliers split", made)


def per_token(bits: int, outliers: int) -> Callable[[Tensor], Tensor]:
    def quantize(x: Tensor) -> Tensor:
        codes, step = quantize_tokens(x, bits, outliers, 4.0)
        return codes * step[:, None]

    return quantize


def oracle(subject: Subject, short: bool) -> Iterator[Row]:
    """OCS on activations with one step per tensor: channels known from calibration, and from the batch itself."""
    batches = list(subject.calibration)
    for bits in (8,) if short else (8, 6):
        for ratio in (0.0, 0.05) if short else (0.0, 0.02, 0.05, 0.1):
            made = baselines.with_inputs(copy.deepcopy(subject.model), baselines.oracle_ocs(bits, ratio))
            yield score(subject, f"A{bits}, the batch's own largest channels, r = {ratio:g}", made)
        for ratio in (0.05,) if short else (0.02, 0.05, 0.1):
            for select in ("max", "gain"):
                inputs = Activations(
                    bits, max_outliers=0, scale="tensor", split=OCS(ratio, quantization_aware=False, select=select)
                )
                what = f"W8A{bits}, static, channels of calibration by {select}, r = {ratio:g}"
                yield scored(subject, what, Recipe(activations=inputs), batches)
        static = Recipe(activations=PerTensorStatic(bits))
        yield scored(subject, f"W8A{bits}, static, not split", static, batches)


def split_choice(subject: Subject, short: bool) -> Iterator[Row]:
    """5 bits per tensor, clip mse, 5 % of the channels: as in the paper, and as it is here."""
    ways: dict[str, dict[str, Any]] = {
        "naive halving of the largest (the paper's first)": {"shares": "halving", "quantization_aware": False},
        "quantization-aware halving of the largest (the paper's)": {"shares": "halving"},
        "equal shares of the largest": {},
        "equal shares of the largest gain": {"select": "gain"},
    }
    for what, choice in ways.items():
        for ratio in (0.05,) if short else (0.02, 0.05, 0.1):
            weights = Weights(5, "tensor", clip="mse", split=OCS(ratio, **choice))
            yield scored(subject, f"W5 per tensor, r = {ratio:g}, {what}", Recipe(weights, None), simulate=True)
    for select in ("max", "gain"):
        for ratio in (0.05,) if short else (0.02, 0.05, 0.1):
            weights = Weights(5, "tensor", clip="output", split=OCS(ratio, select=select))
            what = f"W5 per tensor, r = {ratio:g}, equal shares by {select}, clip output"
            yield scored(subject, what, Recipe(weights, None), list(subject.calibration), simulate=True)
    yield scored(subject, "W5 per channel", Recipe(Weights(5), None), simulate=True)
    yield scored(subject, "W6 per tensor, clip mse", Recipe(Weights(6, "tensor", clip="mse"), None), simulate=True)


Part = Callable[[Subject, bool], Iterator[Row]]
PARTS: dict[str, tuple[tuple[str, ...], Part]] = {
    "runtime_ocs": (("minilm", "smollm2"), runtime_ocs),
    "calibration_size": (("minilm", "smollm2"), calibration_size),
    "split_parts": (("stories260k", "minilm"), split_parts),
    "split_choice": (("charrnn",), split_choice),
    "input_parts": (("minilm", "stories260k"), input_parts),
    "oracle": (("minilm", "stories260k"), oracle),
}


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--only", choices=PARTS, action="append", help="only this part; may be given again")
    args = options.parse_args()
    _, head = measure.start(args)
    rows: list[Row] = []
    made: dict[str, Subject | None] = {}
    for part in args.only or PARTS:
        keys, rows_of = PARTS[part]
        for key in keys[:1] if args.short else keys:
            subject = made[key] if key in made else made.setdefault(key, SUBJECTS[key](args.short))
            if subject is None:
                print(f"skipped {part} of {key}: its network or text is absent")
                continue
            exact = subject.score(subject.model)[0]
            rows.append(Row(subject.name, "float32", f"{exact:.4f} {subject.unit}"))
            for row in rows_of(subject, args.short):
                rows.append(row)
                print(" | ".join(row.cells()[:3]), flush=True)
    text = measure.table(["network", "choice", "score"], [row.cells()[:3] for row in rows])
    measure.finish("ablations", head, text, [vars(row) for row in rows])


if __name__ == "__main__":
    main()
