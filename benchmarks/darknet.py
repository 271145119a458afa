"""Darknet's "Tiny" ImageNet classifier and the images it is scored on, from the evaluation data."""

from __future__ import annotations

import importlib.util
import io
import zipfile

import torch
from torch import Tensor, nn

from benchmarks import networks

IMAGES, SHORT_IMAGES = 500, 100
FIRST = "0"  # the layer that stays float


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
