"""What calibration adds to activations of 8 and 6 bits: OutlierTune, SmoothQuant, static scales, beside no data at all.

MiniLM is calibrated on 128 sentences and scored on others; SmolLM2 on windows 0-15 of wikitext2, scored on 20-31.
Weights are per output channel, min-max; folded inputs where the plan chose them (the last column counts the layers).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import baselines
import measure
import networks
import torch
from accuracy import Row, load_minilm, load_smollm2, more
from torch import nn

import ocsquant
from ocsquant import OCS, Activations, PerChannelStatic, PerTensorStatic, PerToken, Recipe, Weights

SENTENCES, SHORT_SENTENCES, CALIBRATION = 2000, 400, 128
WINDOWS, SHORT_WINDOWS, CALIBRATION_WINDOWS = (20, 31), (20, 21), (0, 15)
SHORT = ("per token, plain", "OutlierTune")


def recipes(bits: int) -> dict[str, Recipe]:
    """Names and recipes, at `bits` for weights and activations."""
    weights, split = Weights(bits), Weights(bits, split=OCS(0.05))
    return {
        "per token, plain": Recipe(weights, PerToken(bits, max_outliers=0)),
        "per token, run-time OCS": Recipe(weights, PerToken(bits)),
        "per token, run-time OCS, 32 values from twice the root mean square": Recipe(weights, PerToken(bits, 32, 2.0)),
        "per tensor static": Recipe(weights, PerTensorStatic(bits)),
        "SmoothQuant .5, per token": Recipe(weights, Activations(bits, max_outliers=0, smooth_alpha=0.5)),
        "SmoothQuant .8, per token": Recipe(weights, Activations(bits, max_outliers=0, smooth_alpha=0.8)),
        "Outlier Suppression+ (shift, .5), per tensor": Recipe(
            weights, Activations(bits, max_outliers=0, scale="tensor", smooth_alpha=0.5, shift=True)
        ),
        "SmoothQuant .5, run-time OCS": Recipe(weights, Activations(bits, smooth_alpha=0.5)),
        "OutlierTune without symmetrization": Recipe(weights, PerChannelStatic(bits, shift=False)),
        "OutlierTune": Recipe(weights, PerChannelStatic(bits)),
        "OutlierTune, weight OCS .05": Recipe(split, PerChannelStatic(bits)),
        "OutlierTune, run-time OCS": Recipe(weights, PerChannelStatic(bits, max_outliers=16)),
        "OutlierTune, both": Recipe(split, PerChannelStatic(bits, max_outliers=16)),
    }


def rounded(bits: int) -> dict[str, Recipe]:
    """With weights that GPTQ rounds, after a clip by the outputs' error."""
    weights = Weights(bits, clip="output", rounding="gptq")
    return {
        "run-time OCS, GPTQ": Recipe(weights, PerToken(bits)),
        "SmoothQuant .5, run-time OCS of 32, GPTQ": Recipe(weights, Activations(bits, 32, 2.0, smooth_alpha=0.5)),
    }


def table(
    network: str,
    model: nn.Module,
    statistics: ocsquant.Statistics,
    score: Callable[[nn.Module], str],
    short: bool,
    batches: list[torch.Tensor],
) -> Iterator[Row]:
    for bits in (8, 6):
        for name, recipe in recipes(bits).items():
            if short and name not in SHORT:
                continue
            made = ocsquant.quantize(
                copy.deepcopy(model), recipe, calibration=statistics, filter_fn=networks.no_embedding
            )
            lines = ocsquant.report(made).layers
            folded = sum(line.kernel == "scale_folded_linear" for line in lines)
            yield Row(network, f"W{bits}A{bits} {name}", score(made), f"{folded} folded")
        if short:
            continue
        for name, recipe in rounded(bits).items() if bits < 8 and batches else ():
            made = ocsquant.quantize(copy.deepcopy(model), recipe, calibration=batches, filter_fn=networks.no_embedding)
            yield Row(network, f"W{bits}A{bits} {name}", score(made))
        for outliers, name in ((0, "per token"), (16, "run-time OCS")):
            recipe = Recipe(Weights(bits), PerToken(bits, max_outliers=outliers))
            turned = baselines.rotated(copy.deepcopy(model))
            made = ocsquant.quantize(turned, recipe, filter_fn=networks.no_embedding)
            yield Row(network, f"W{bits}A{bits} Hadamard, {name}", score(made))
        made = baselines.llm_int8(copy.deepcopy(model), bits)
        yield Row(network, f"W{bits}A{bits} LLM.int8(), threshold 6", score(made))


def minilm(short: bool) -> Iterator[Row]:
    loaded = load_minilm()
    if loaded is None:
        return
    model, tokenizer = loaded
    count = SHORT_SENTENCES if short else SENTENCES
    texts = networks.sentences(count + CALIBRATION)
    step = len(texts) // CALIBRATION
    seen = texts[::step][:CALIBRATION]
    others = [text for text in texts if text not in set(seen)]
    with ocsquant.calibrate(model) as statistics:
        networks.embed(model, tokenizer, seen)
    reference = networks.embed(model, tokenizer, others)

    def score(made: nn.Module) -> str:
        cosine, same = networks.agreement(networks.embed(made, tokenizer, others), reference)
        return f"cosine {cosine:.5f}, neighbour {100 * same:.1f} %"

    yield from table(f"MiniLM, {len(others)} sentences", model, statistics, score, short, [])


def smollm2(short: bool) -> Iterator[Row]:
    first, last = SHORT_WINDOWS if short else WINDOWS
    loaded = load_smollm2((first, last), CALIBRATION_WINDOWS)
    if loaded is None:
        return
    model, (windows, seen) = loaded
    with ocsquant.calibrate(model) as statistics, torch.inference_mode():
        for window in seen:
            model(window[None])
    name = f"SmolLM2-135M, wikitext2 {first}-{last}"
    fp32 = networks.perplexity(model, windows)
    yield Row(name, "fp32", f"perplexity {fp32:.3f}")

    def score(made: nn.Module) -> str:
        value = networks.perplexity(made, windows)
        return f"perplexity {value:.3f} ({more(fp32, value):+.1f} %)"

    yield from table(name, model, statistics, score, short, [window[None] for window in seen])


def main() -> None:
    options = measure.parser(__doc__)
    parts: dict[str, Callable[[bool], Iterator[Row]]] = {"minilm": minilm, "smollm2": smollm2}
    options.add_argument("--only", choices=parts, action="append", help="only this network; may be given again")
    args = options.parse_args()
    _, head = measure.start(args)
    rows = [row for name in args.only or parts for row in parts[name](args.short)]
    text = measure.table(["network", "recipe", "value", "layers"], [row.cells()[:4] for row in rows])
    measure.finish("calibrated", head, text, [vars(row) for row in rows])


if __name__ == "__main__":
    main()
