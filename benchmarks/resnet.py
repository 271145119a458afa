"""A network of the shape of ResNet-50 (weights drawn at random) against float32 and FX graph mode int8.

FX needs calibration and keeps uint8 between its layers; ours needs no data and takes and gives float32. "folded" is
fold_batchnorm=the image; of the float network, torch.fx.experimental.optimization.fuse does the same. "fused" computes
the residuals and ReLUs that follow convolutions in them, "static" takes the range of inputs from calibration. Large
outputs in float32 make the time depend on the memory that other models have left behind: --alone shows it without.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import ocsquant
from benchmarks import measure
from benchmarks.measure import Call
from ocsquant.nn import QuantizedConv

WIDTHS, DEPTHS = (64, 128, 256, 512), (3, 4, 6, 3)
INPUT = (1, 3, 224, 224)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a residual."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + residual)


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for i, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        for j in range(depth):
            layers.append(Bottleneck(inputs, width, 2 if i and not j else 1))
            inputs = 4 * width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def fx_peer(model: nn.Module, engine: str, x: Tensor) -> nn.Module:
    """torch.ao's static quantization, calibrated on the very input that is measured."""
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.ao.quantization import get_default_qconfig_mapping
            from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

            prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(engine), (x,))
            prepared(x)
            return convert_fx(prepared)
    finally:
        torch.backends.quantized.engine = before


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument(
        "--alone", action="store_true", help="float32 and the last of ours, with no other in the process"
    )
    args = options.parse_args()
    repetitions, head = measure.start(args)
    model, x = resnet50(), torch.randn(INPUT)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    ours = ocsquant.quantize(copy.deepcopy(last), fold_batchnorm=x_last)
    fused = ocsquant.quantize(copy.deepcopy(last), fold_batchnorm=x_last, fuse=x_last)
    recipe = ocsquant.Recipe(activations=ocsquant.PerTensorStatic())
    static = ocsquant.quantize(
        copy.deepcopy(last), recipe, fold_batchnorm=x_last, fuse=x_last, calibration=[torch.randn(4, *INPUT[1:])]
    )
    models: dict[str, tuple[nn.Module, Tensor, str | None]] = {
        "float32": (model, x, None),
        "float32, channels last, fused": (fuse(copy.deepcopy(last)), x_last, None),
        "ocsquant": (ocsquant.quantize(copy.deepcopy(model)), x, None),
        "ocsquant, folded": (ocsquant.quantize(copy.deepcopy(model), fold_batchnorm=x), x, None),
        "ocsquant, channels last": (ocsquant.quantize(last), x_last, None),
        "ocsquant, channels last, folded": (ours, x_last, None),
        "ocsquant, channels last, folded, fused": (fused, x_last, None),
        "ocsquant, channels last, folded, fused, static": (static, x_last, None),
    }
    with torch.no_grad():
        expected = model(x)
        if args.alone:
            models = {name: models[name] for name in ("float32", list(models)[-1])}
        else:
            models |= {f"FX {engine}": (fx_peer(model, engine, x), x, engine) for engine in measure.engines()}

    def run(network: nn.Module, given: Tensor, engine: str | None) -> Call:
        return Call(lambda: network(given), engine)

    # Several calls a visit: the memory that one competitor gives back is new, and slow, at the first call of the next.
    calls = {name: run(*entry) for name, entry in models.items()}
    times = measure.interleave(calls, min(repetitions, 9), block=0.4)
    rows: list[list[Any]] = []
    for name, (network, given, engine) in models.items():
        measure.use_engine(engine)
        with torch.no_grad():
            error = float((network(given) - expected).norm() / expected.norm())
        shown = f"{sorted(times[name])[len(times[name]) // 2] * 1e3:.1f}"
        rows.append([name, shown, measure.ratio(times["float32"], times[name]), f"{error:.3f}"])
    count = sum(isinstance(module, QuantizedConv) for module in ours.modules())
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    text = measure.table(["ResNet-50 shape, one image", "ms", "float32 / this", "relative error"], rows)
    text += f"\n\n{count} of {convolutions} convolutions in integers"
    bars = {name: {"over float32": measure.ratio(times["float32"], t)} for name, t in times.items()}
    measure.finish("resnet", head, text, {"times": times}, bars)


if __name__ == "__main__":
    main()
