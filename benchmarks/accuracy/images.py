"""Outlier channel splitting on a convolutional network, as the paper's tables have it: bits, clips and ratios.

Darknet's "Tiny" ImageNet classifier on 500 images, its first layer float. Rows W quantize weights alone; beside OCS and
grids stand SQuant's rounding, and the equalization and bias correction of Data-Free Quantization. Rows A quantize
inputs alone, rows WxAy both with the integer kernels. Each row has top-1 accuracy, cross-entropy, and the standard
error of the difference in accuracy from float32 (paired over images).
Needs the evaluation data and Pillow; says so where they are absent.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

import ocsquant
from benchmarks import measure
from benchmarks.accuracy import baselines
from benchmarks.accuracy.subjects import Row, stored_bits
from benchmarks.darknet import FIRST, IMAGES, SHORT_IMAGES, darknet_tiny, image_sample, scores
from ocsquant import OCS, PerToken, Recipe, Weights

CALIBRATION = 64
BARS = ("W5 per tensor, clip mse", "W5 per tensor, OCS 0.02, clip mse")


def recipes() -> dict[str, Weights]:
    """As in the paper rounded to nearest, and with the package's own rounding of convolutions."""
    table: dict[str, Weights] = {}
    for bits in (6, 5):
        for clip in ("none", "mse", "aciq", "kl") if bits == 5 else ("none", "mse"):
            table[f"W{bits} per tensor, clip {clip}"] = Weights(bits, "tensor", clip=clip)
        for ratio in (0.02, 0.05):
            table[f"W{bits} per tensor, OCS {ratio}"] = Weights(bits, "tensor", split=OCS(ratio, shares="halving"))
            both = OCS(ratio, shares="halving")
            table[f"W{bits} per tensor, OCS {ratio}, clip mse"] = Weights(bits, "tensor", clip="mse", split=both)
        if bits == 5:
            naive = OCS(0.05, shares="halving", quantization_aware=False)
            table["W5 per tensor, naive OCS 0.05"] = Weights(5, "tensor", split=naive)
            gain = OCS(0.02, select="gain")
            table["W5 per tensor, OCS 0.02 by gain, clip mse"] = Weights(5, "tensor", clip="mse", split=gain)
        table[f"W{bits} per channel"] = Weights(bits)
        table[f"W{bits} per channel, clip mse"] = Weights(bits, clip="mse")
        table[f"W{bits} groups of 128"] = Weights(bits, "group", 128)
    made = {what: dataclasses.replace(weights, rounding="nearest") for what, weights in table.items()}
    for bits in (8, 6, 5, 4):
        made[f"W{bits} per channel"] = Weights(bits, rounding="nearest")
        made[f"W{bits} per channel, SQuant"] = Weights(bits)
        if bits < 8:
            made[f"W{bits} per channel, clip output, GPTQ"] = Weights(bits, clip="output", rounding="gptq")
    for what in ("W5 per tensor, clip mse", "W5 per tensor, OCS 0.02, clip mse", "W5 groups of 128"):
        made[f"{what}, SQuant"] = table[what]
    return made


def neighbours() -> dict[str, Weights]:
    """What Data-Free Quantization's equalization and bias correction are tried on."""
    ours = Weights(5, "tensor", clip="mse", rounding="nearest", split=OCS(0.02, shares="halving"))
    return {
        "W5 per tensor, clip mse": Weights(5, "tensor", clip="mse", rounding="nearest"),
        "W5 per tensor, OCS 0.02, clip mse": ours,
        "W5 per channel": Weights(5, rounding="nearest"),
        "W5 per channel, SQuant": Weights(5),
    }


def inputs() -> dict[str, Callable[[Tensor], Tensor]]:
    """One range for a batch of images, as in the paper; its channels to split and its clip are chosen on that batch."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {}
    for bits in (8, 6, 5, 4):
        ways[f"A{bits} per tensor"] = partial(baselines.in_range, bits=bits)
        ways[f"A{bits} per tensor, clip mse"] = partial(baselines.in_range, bits=bits, clip="mse")
        for ratio in (0.02, 0.05):
            ways[f"A{bits} per tensor, OCS {ratio}"] = baselines.oracle_ocs(bits, ratio, symmetric=False)
    return ways


def rows(short: bool) -> Iterator[Row]:
    model, loaded = darknet_tiny(), image_sample()
    if model is None or loaded is None:
        print("skipped darknet_tiny: its weights, the images or Pillow are absent")
        return
    images, classes = loaded
    seen, count = images[:CALIBRATION], SHORT_IMAGES if short else IMAGES
    images, classes = images[-count:], classes[-count:]
    batches = [part.float() / 255 for part in seen.split(16)]
    exact = scores(model, images)
    right = (exact.argmax(1) == classes).double()
    name = f"darknet_tiny, {count} images"
    yield Row(name, "float32", f"{100 * float(right.mean()):.1f} % ({float(F.cross_entropy(exact, classes)):.3f})")
    top: dict[str, float] = {}

    def score(what: str, made: nn.Module, bits: str = "") -> Row:
        got = scores(made, images)
        own = (got.argmax(1) == classes).double()
        top[what] = 100 * float(own.mean())
        error = 100 * float((own - right).std()) / count**0.5
        return Row(name, what, f"{top[what]:.1f} +- {error:.1f} % ({float(F.cross_entropy(got, classes)):.3f})", bits)

    for what, weights in recipes().items():
        if short and what not in BARS:
            continue
        made = ocsquant.quantize(
            copy.deepcopy(model), Recipe(weights, None), ignore=[FIRST], calibration=batches, simulate=True
        )
        yield score(what, made, f"{stored_bits(made):.2f}")
    for what, weights in neighbours().items() if not short else ():
        for way, changed in (("", model), (", equalized", baselines.equalized(copy.deepcopy(model), FIRST))):
            made = ocsquant.quantize(copy.deepcopy(changed), Recipe(weights, None), ignore=[FIRST], simulate=True)
            if way:
                yield score(f"{what}{way}", made)
            yield score(f"{what}{way}, bias corrected", baselines.bias_corrected(made, changed, batches))
    for what, way in inputs().items():
        if short and not what.startswith("A6"):
            continue
        yield score(what, baselines.with_inputs(copy.deepcopy(model), way, skip=FIRST))
    for bits in (8, 6, 5, 4):
        for outliers, what in ((0, "a step per image"), (16, "run-time OCS")):
            recipe = Recipe(Weights(8), PerToken(bits, outliers))
            made = ocsquant.quantize(copy.deepcopy(model), ignore=[FIRST], overrides={"*": recipe})
            yield score(f"W8A{bits}, {what}", made, f"{stored_bits(made):.2f}")
    gain = top[BARS[1]] - top[BARS[0]]
    yield Row(name, "W5 per tensor: OCS 0.02 with the clip over the clip alone", f"{gain:+.1f}", ">= +10", gain >= 10)


def main() -> None:
    args = measure.parser(__doc__).parse_args()
    _, head = measure.start(args)
    found = []
    for row in rows(args.short):
        found.append(row)
        print(" | ".join(row.cells()), flush=True)
    text = measure.table(
        ["network", "weights", "top-1 (cross-entropy)", "bits a weight, or bar", "met"], [row.cells() for row in found]
    )
    measure.finish("images", head, text, [vars(row) for row in found])


if __name__ == "__main__":
    main()
