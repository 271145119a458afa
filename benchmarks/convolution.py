"""Convolutions: ours against float32, for contiguous and for channels-last inputs, and a real network.

Inputs are non-negative, as after a ReLU. Ratios in brackets are of layers that `ocsquant.quantize` leaves float because
they would not gain. The network is Darknet's "Tiny" ImageNet classifier with its accuracy: every convolution but the
first in integers, data-free.
"""

from __future__ import annotations

import copy
from typing import Any

import images
import measure
import torch
from measure import Call
from torch import Tensor, nn
from torch.nn import functional as F

import ocsquant
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
)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def call(module: nn.Module, x: Tensor) -> Call:
    return Call(lambda: module(x))


def layer_rows(shapes: tuple[tuple[int, ...], ...], repetitions: int) -> list[list[Any]]:
    rows = []
    for inputs, outputs, side, kernel, stride in shapes:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2).eval()
        ours = ocsquant.quantize(copy.deepcopy(layer), overrides={"": "W8A8"})
        cells = []
        for layout in LAYOUTS.values():
            x = torch.randn(1, inputs, side, side).relu().contiguous(memory_format=layout)
            floats = copy.deepcopy(layer).to(memory_format=layout)
            calls = {"fp32": call(floats, x), "ocsquant": call(ours, x)}
            times = measure.interleave(calls, repetitions, block=10e-3)
            won = str(measure.ratio(times["fp32"], times["ocsquant"]))
            shown = [measure.microseconds(times[name]) for name in calls]
            cells += [*shown, won if convolution_pays(floats) else f"({won})"]
        rows.append([f"{inputs} -> {outputs}, {side} x {side}, kernel {kernel}, stride {stride}", *cells])
    return rows


def network_rows(short: bool, repetitions: int) -> list[list[Any]]:
    model, loaded = images.darknet_tiny(), images.image_sample()
    if model is None or loaded is None:
        print("skipped darknet_tiny: its weights, the images or Pillow are absent")
        return []
    pictures, classes = (part[-(images.SHORT_IMAGES if short else images.IMAGES) :] for part in loaded)
    every = ocsquant.quantize(copy.deepcopy(model), ignore=[images.FIRST], overrides={"*": "W8A8"})
    networks = {"float32": model, "every convolution but the first": every}
    speed: dict[str, str] = dict.fromkeys(networks, "")
    for layout in LAYOUTS.values():
        x = (pictures[:1].float() / 255).contiguous(memory_format=layout)
        moved = {name: copy.deepcopy(network).to(memory_format=layout) for name, network in networks.items()}
        calls = {name: call(network, x) for name, network in moved.items()}
        times = measure.interleave(calls, repetitions, block=30e-3)
        for name in networks:
            speed[name] += f"{measure.ratio(times['float32'], times[name])} "
    rows = []
    for name, network in networks.items():
        got = images.scores(copy.deepcopy(network), pictures)
        right = 100 * float((got.argmax(1) == classes).double().mean())
        rows.append([name, f"{right:.1f} %", f"{float(F.cross_entropy(got, classes)):.4f}", speed[name].strip()])
    return rows


def main() -> None:
    args = measure.parser(__doc__).parse_args()
    repetitions, head = measure.start(args)
    layers = layer_rows(SHAPES[:3] if args.short else SHAPES, repetitions)
    titles = [title for layout in LAYOUTS for title in (f"fp32 us, {layout}", "ours us", "fp32 / ours")]
    text = measure.table(["one sample", *titles], layers)
    network = network_rows(args.short, repetitions)
    if network:
        columns = ["darknet_tiny", "top-1", "cross-entropy", "fp32 / this: contiguous, channels last"]
        text += "\n\n" + measure.table(columns, network)
    measure.finish("convolution", head, text, {"layers": layers, "network": network})


if __name__ == "__main__":
    main()
