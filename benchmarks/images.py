"""Outlier channel splitting on a convolutional network, as the paper's tables have it: bits, clips and ratios.

Darknet's "Tiny" ImageNet classifier on 500 images, weights quantized, activations and first layer float; beside OCS and
grids stand SQuant's rounding, and the equalization and bias correction of Data-Free Quantization. Each row has
top-1 accuracy, cross-entropy, and the standard error of the difference in accuracy from float32 (paired over images).
Needs the evaluation data and Pillow; says so where they are absent.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import io
import zipfile
from collections.abc import Iterator

import baselines
import measure
import networks
import torch
from accuracy import Row
from torch import Tensor, nn
from torch.nn import functional as F

import ocsquant
from ocsquant import OCS, Recipe, Weights

IMAGES, SHORT_IMAGES, CALIBRATION = 500, 100, 64
FIRST = "0"


def darknet_tiny() -> nn.Sequential | None:
    """16 convolutions, 15 BatchNorms; gives [batch, 1000] scores of images [batch, 3, 224, 224] in 0..1."""
    path = networks.data_file("darknet_tiny/darknet_tiny_torch.npz")
    if path is None:
        return None
    import numpy

    arrays = numpy.load(path)
    convolutions = sorted(int(name.split(".")[0]) for name in arrays if arrays[name].ndim == 4)
    layers: list[nn.Module] = []
    for at, after in zip(convolutions, [*convolutions[1:], None], strict=True):
        outputs, inputs, size, _ = arrays[f"{at}.weight"].shape
        layers.append(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=after is None))
        if after is not None:
            layers += [nn.BatchNorm2d(outputs, eps=1e-3), nn.LeakyReLU(0.1)]
            layers += [nn.MaxPool2d(2)] * (after - at - 3)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers)
    model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})
    return model.eval()


def image_sample() -> tuple[Tensor, Tensor] | None:
    """1,000 images [3, 224, 224], one of each class, in the order of their names, and their classes."""
    archive = networks.data_file("imagenet_sample/imagenet_sample1000_s256.zip")
    order = networks.data_file("darknet_tiny/wnids_output_order.txt")
    if archive is None or order is None or importlib.util.find_spec("PIL") is None:
        return None
    from PIL import Image
    from torch import frombuffer

    place = {line.strip(): i for i, line in enumerate(order.read_text().splitlines())}
    images, classes = [], []
    with zipfile.ZipFile(archive) as file:
        for name in sorted(file.namelist()):
            image = Image.open(io.BytesIO(file.read(name))).convert("RGB")
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            image = image.crop((left, top, left + 224, top + 224))
            pixels = frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(224, 224, 3)
            images.append(pixels.permute(2, 0, 1))
            classes.append(place[name.split("_")[0]])
    return torch.stack(images), torch.tensor(classes)


@torch.inference_mode()
def scores(model: nn.Module, images: Tensor) -> Tensor:
    model.to(memory_format=torch.channels_last)
    shaped = (part.float().div(255).contiguous(memory_format=torch.channels_last) for part in images.split(25))
    return torch.cat([model(part) for part in shaped])


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

    def score(what: str, made: nn.Module) -> Row:
        got = scores(made, images)
        own = (got.argmax(1) == classes).double()
        top[what] = 100 * float(own.mean())
        error = 100 * float((own - right).std()) / count**0.5
        return Row(name, what, f"{top[what]:.1f} +- {error:.1f} % ({float(F.cross_entropy(got, classes)):.3f})")

    for what, weights in recipes().items():
        made = ocsquant.quantize(
            copy.deepcopy(model), Recipe(weights, None), ignore=[FIRST], calibration=batches, simulate=True
        )
        yield score(what, made)
    for what, weights in neighbours().items():
        for way, changed in (("", model), (", equalized", baselines.equalized(copy.deepcopy(model), FIRST))):
            made = ocsquant.quantize(copy.deepcopy(changed), Recipe(weights, None), ignore=[FIRST], simulate=True)
            if way:
                yield score(f"{what}{way}", made)
            yield score(f"{what}{way}, bias corrected", baselines.bias_corrected(made, changed, batches))
    gain = top["W5 per tensor, OCS 0.02, clip mse"] - top["W5 per tensor, clip mse"]
    yield Row(name, "W5 per tensor: OCS 0.02 with the clip over the clip alone", f"{gain:+.1f}", ">= +10", gain >= 10)


def main() -> None:
    args = measure.parser(__doc__).parse_args()
    _, head = measure.start(args)
    found = []
    for row in rows(args.short):
        found.append(row)
        print(" | ".join(row.cells()), flush=True)
    text = measure.table(["network", "weights", "top-1 (cross-entropy)", "bar", "met"], [row.cells() for row in found])
    measure.finish("images", head, text, [vars(row) for row in found])


if __name__ == "__main__":
    main()
