"""What calibration adds to quantized activations: OutlierTune, SmoothQuant, static scales, beside no data at all.

MiniLM is calibrated on 128 sentences and scored on others, SmolLM2 on windows 0-15 of wikitext2 and scored on 20-31,
stories260K on training stories and scored on others. Weights are per output channel and min-max unless the row says
otherwise; the columns are bits a weight and how many layers' inputs were folded. Each score stands with its distance
from float32 and the standard error of that distance. SmolLM2's weights come from a 4-bit grid (asymmetric groups of 32
hold it exactly): at 4 bits it says nothing of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

import ocsquant
from benchmarks import networks
from benchmarks.accuracy import baselines
from benchmarks.accuracy.subjects import SUBJECTS, Row, Subject, run, shown, stored_bits
from ocsquant import OCS, Activations, PerChannelStatic, PerTensorStatic, PerToken, Recipe, Weights
from ocsquant.inputs import run_batches

SCHEMES = ((8, 8), (6, 6), (4, 8))  # bits of weights and of inputs
SHORT = ("per token, plain", "OutlierTune")
NAMES = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M", "stories260k": "stories260K"}
BEST = "SmoothQuant .5, run-time OCS of 32, GPTQ"


def recipes(weight_bits: int, bits: int) -> dict[str, Recipe]:
    weights, split = Weights(weight_bits), Weights(weight_bits, split=OCS(0.05))
    rounded = Weights(weight_bits, clip="output", rounding="gptq")
    table = {
        "per token, plain": Recipe(weights, PerToken(bits, max_outliers=0)),
        "per token, run-time OCS": Recipe(weights, PerToken(bits)),
        "run-time OCS, 32 values from twice the root mean square": Recipe(weights, PerToken(bits, 32, 2.0)),
        "run-time OCS, weights per tensor": Recipe(Weights(weight_bits, "tensor"), PerToken(bits)),
        "run-time OCS, weights in groups of 128": Recipe(Weights(weight_bits, "group", 128), PerToken(bits)),
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
    if weight_bits < 8:
        more = min(bits + 1, 8)
        table["one bit more: per token, run-time OCS"] = Recipe(Weights(weight_bits + 1), PerToken(more))
        table["run-time OCS, GPTQ"] = Recipe(rounded, PerToken(bits))
        table[BEST] = Recipe(rounded, Activations(bits, 32, 2.0, smooth_alpha=0.5))
    return table


def rows_of(subject: Subject, short: bool) -> Iterator[Row]:
    exact = subject.score(subject.model)[0]
    yield Row(subject.name, "float32", f"{exact:.4f} {subject.unit}", "32")
    batches = list(subject.calibration)
    with ocsquant.calibrate(subject.model) as statistics:
        run_batches(subject.model, batches)
    value: dict[str, float] = {}

    def row(what: str, made: nn.Module, bits: str = "") -> Row:
        figures = subject.score(made)
        value[what] = figures[0]
        return Row(subject.name, what, shown(figures), bits)

    for weight_bits, bits in SCHEMES:
        scheme = f"W{weight_bits}A{bits}"
        for name, recipe in recipes(weight_bits, bits).items():
            if (short or (weight_bits, subject.name) == (4, NAMES["smollm2"])) and name not in SHORT:
                continue
            given = batches if recipe.weights.rounding == "gptq" else statistics
            made = ocsquant.quantize(
                copy.deepcopy(subject.model), recipe, calibration=given, filter_fn=networks.no_embedding
            )
            folded = sum(line.kernel == "scale_folded_linear" for line in ocsquant.report(made).layers)
            yield row(f"{scheme} {name}", made, f"{stored_bits(made):.2f}, {folded} folded")
        if short or weight_bits == 4:
            continue
        for outliers, name in ((0, "per token"), (16, "run-time OCS")):
            recipe = Recipe(Weights(weight_bits), PerToken(bits, max_outliers=outliers))
            turned = baselines.rotated(copy.deepcopy(subject.model))
            made = ocsquant.quantize(turned, recipe, filter_fn=networks.no_embedding)
            yield row(f"{scheme} Hadamard, {name}", made, f"{stored_bits(made):.2f}")
        made = baselines.llm_int8(copy.deepcopy(subject.model), bits)
        yield row(f"{scheme} LLM.int8(), threshold 6", made)
    if not short:
        yield from bars_of(subject.name, value)


def bars_of(network: str, value: dict[str, float]) -> Iterator[Row]:
    if network == NAMES["minilm"]:
        got = value["W8A8 OutlierTune"]
        yield Row(network, "W8A8 OutlierTune", f"{got:.5f}", ">= 0.9985", got >= 0.9985)
        loss = value["W6A6 per token, plain"] - value["W6A6 OutlierTune"]
        yield Row(network, "W6A6: plain per token over OutlierTune", f"{loss:+.4f}", "<= 0.005", loss <= 0.005)
    if network == NAMES["smollm2"]:
        gain = 100 * (1 - value["W6A6 OutlierTune, weight OCS .05"] / value["W6A6 OutlierTune"])
        yield Row(network, "W6A6: what weight OCS .05 takes off OutlierTune", f"{gain:.1f} %", ">= 2 %", gain >= 2)
        for what, most in (("per token, run-time OCS", 21.7), (BEST, 20.8)):
            got = value[f"W6A6 {what}"]
            yield Row(network, f"W6A6 {what}", f"{got:.3f}", f"<= {most}", got <= most)


if __name__ == "__main__":
    columns = ["network", "recipe", "score", "bits a weight, or bar", "met"]
    run(__doc__, "calibrated", columns, rows_of, {name: SUBJECTS[name] for name in NAMES})
