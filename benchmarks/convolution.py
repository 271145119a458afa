"""Convolutions: ours against float32, for contiguous and for channels-last inputs, and a real network.

Inputs are non-negative, as after a ReLU. Ratios in brackets are of layers that `ocsquant.quantize` leaves float because
they would not gain. The network is Darknet's "Tiny" ImageNet classifier with its accuracy: every convolution but the
first in integers, data-free.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ocsquant
from benchmarks import darknet, measure
from benchmarks.measure import Call
from ocsquant.suitability import convolution_pays

# Channels in and out, pixels a side, kernel, stride: those of a ResNet-50 and of smaller networks.
SHAPES = (
    (64, 64, 56, 3, 1),
    (128, 128, 28, 3, 1),
    (256, 256, 14, 3, 1),
    (512, 512, 7, 3, 1),
    (64, 128, 56, 3, 2),
    (256, 64, 56, 1, 1),
    (64, 256, 56, 1, 1),
    (1024, 256, 14, 1, 1),
    (512, 2048, 7, 1, 1),
    (16, 32, 56, 3, 1),
    (32, 32, 28, 3, 1),
    (3, 64, 224, 7, 2),
)
# Convolutions in groups, in three dimensions, and of a speech encoder's positions; the input each is measured on.
OTHERS: tuple[tuple[str, nn.Module, tuple[int, ...]], ...] = (
    ("256 in 4 groups, 28 x 28, kernel 3", nn.Conv2d(256, 256, 3, padding=1, groups=4), (256, 28, 28)),
    ("512 in 16 groups, 14 x 14, kernel 3", nn.Conv2d(512, 512, 3, padding=1, groups=16), (512, 14, 14)),
    ("512 in 32 groups, 14 x 14, kernel 3", nn.Conv2d(512, 512, 3, padding=1, groups=32), (512, 14, 14)),
    ("144 channels alone, 56 x 56, kernel 3", nn.Conv2d(144, 144, 3, padding=1, groups=144), (144, 56, 56)),
    ("96 channels alone, 56 x 56, kernel 7", nn.Conv2d(96, 96, 7, padding=3, groups=96), (96, 56, 56)),
    ("768 in 16 groups, 500 steps, kernel 128", nn.Conv1d(768, 768, 128, padding=64, groups=16), (768, 500)),
    ("3 -> 768, 224 x 224, kernel 16, stride 16", nn.Conv2d(3, 768, 16, 16), (3, 224, 224)),
    ("64 -> 64, 8 x 28 x 28, kernel 3", nn.Conv3d(64, 64, 3, padding=1), (64, 8, 28, 28)),
    ("256 -> 256, 4 x 14 x 14, kernel 3", nn.Conv3d(256, 256, 3, padding=1), (256, 4, 14, 14)),
    ("256 -> 256, 8 x 14 x 14, kernel 3 x 1 x 1", nn.Conv3d(256, 256, (3, 1, 1), padding=(1, 0, 0)), (256, 8, 14, 14)),
    ("64 -> 256, 8 x 28 x 28, kernel 1", nn.Conv3d(64, 256, 1), (64, 8, 28, 28)),
)
LAYOUTS = ("contiguous", "channels last")
LAST = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions of the input


def call(module: nn.Module, x: Tensor) -> Call:
    return Call(lambda: module(x))


def layers(short: bool) -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    for inputs, outputs, side, kernel, stride in SHAPES[:3] if short else SHAPES:
        name = f"{inputs} -> {outputs}, {side} x {side}, kernel {kernel}, stride {stride}"
        yield name, nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), (inputs, side, side)
    yield from OTHERS[:1] if short else OTHERS


def layer_rows(short: bool, repetitions: int, scheme: str) -> Iterator[list[Any]]:
    for name, layer, shape in layers(short):
        try:
            ours = ocsquant.quantize(copy.deepcopy(layer), overrides={"": scheme})
        except ocsquant.NothingToQuantizeError as error:
            print(f"skipped {name}: {error}")
            continue
        cells = []
        for layout in LAYOUTS:
            x = torch.randn(1, *shape).relu()
            memory = LAST[x.dim()] if layout == "channels last" else torch.contiguous_format
            x, floats = x.contiguous(memory_format=memory), copy.deepcopy(layer).to(memory_format=memory)
            calls = {"fp32": call(floats, x), "ocsquant": call(ours, x)}
            times = measure.interleave(calls, repetitions, block=10e-3)
            won = str(measure.ratio(times["fp32"], times["ocsquant"]))
            shown = [measure.microseconds(times[name]) for name in calls]
            cells += [*shown, won if convolution_pays(floats) else f"({won})"]
        yield [name, *cells]


def network_rows(short: bool, repetitions: int, scheme: str) -> list[list[Any]]:
    model, loaded = darknet.darknet_tiny(), darknet.image_sample()
    if model is None or loaded is None:
        print("skipped darknet_tiny: its weights, the images or Pillow are absent")
        return []
    pictures, classes = (part[-(darknet.SHORT_IMAGES if short else darknet.IMAGES) :] for part in loaded)
    every = ocsquant.quantize(copy.deepcopy(model), ignore=[darknet.FIRST], overrides={"*": scheme})
    networks = {"float32": model, "every convolution but the first": every}
    speed: dict[str, str] = dict.fromkeys(networks, "")
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (pictures[:1].float() / 255).contiguous(memory_format=layout)
        moved = {name: copy.deepcopy(network).to(memory_format=layout) for name, network in networks.items()}
        calls = {name: call(network, x) for name, network in moved.items()}
        times = measure.interleave(calls, repetitions, block=30e-3)
        for name in networks:
            speed[name] += f"{measure.ratio(times['float32'], times[name])} "
    rows = []
    for name, network in networks.items():
        got = darknet.scores(copy.deepcopy(network), pictures)
        right = 100 * float((got.argmax(1) == classes).double().mean())
        rows.append([name, f"{right:.1f} %", f"{float(F.cross_entropy(got, classes)):.4f}", speed[name].strip()])
    return rows


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--scheme", choices=("W8A8", "W4A8"), default="W8A8", help="of the layers (default W8A8)")
    args = options.parse_args()
    repetitions, head = measure.start(args)
    rows = list(layer_rows(args.short, repetitions, args.scheme))
    titles = [title for layout in LAYOUTS for title in (f"fp32 us, {layout}", "ours us", "fp32 / ours")]
    text = measure.table([f"{args.scheme}, one sample", *titles], rows)
    network = network_rows(args.short, repetitions, args.scheme)
    if network:
        columns = ["darknet_tiny", "top-1", "cross-entropy", "fp32 / this: contiguous, channels last"]
        text += "\n\n" + measure.table(columns, network)
    measure.finish(measure.named("convolution", args.scheme), head, text, {"layers": rows, "network": network})


if __name__ == "__main__":
    main()
