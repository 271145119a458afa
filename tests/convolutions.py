"""Convolutions of every kind, for the tests of their quantized forms."""

import copy

import torch
from torch import nn

import ocsquant
from ocsquant import OCS, Activations, ops

# Input channels that calibration shows are split.
SPLIT = Activations(max_outliers=0, scale="tensor", split=OCS(0.1, quantization_aware=False))


def pack(codes):
    """int8 [n, channels, kernel_h, kernel_w] as the operator wants them."""
    return ops.pack_weight(codes.permute(0, 2, 3, 1).reshape(codes.shape[0], -1).contiguous())


def quantized(module, recipe="W8A8"):
    """By name: also what is too small to gain."""
    return ocsquant.quantize(copy.deepcopy(module), overrides={"": recipe})


MODULES = {
    "3x3": (lambda: nn.Conv2d(6, 20, 3, padding=1), (2, 6, 9, 8)),
    "strided, dilated": (lambda: nn.Conv2d(6, 20, (3, 2), (2, 1), (1, 0), (1, 2), bias=False), (2, 6, 9, 8)),
    "pointwise": (lambda: nn.Conv2d(6, 20, 1, 2), (2, 6, 9, 8)),
    "same, even kernel": (lambda: nn.Conv2d(6, 20, (4, 3), padding="same"), (2, 6, 9, 8)),
    "valid": (lambda: nn.Conv2d(6, 20, 3, padding="valid"), (2, 6, 9, 8)),
    "reflect": (lambda: nn.Conv2d(6, 20, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 8)),
    "circular, same": (lambda: nn.Conv1d(6, 20, 5, padding="same", padding_mode="circular"), (2, 6, 19)),
    "1d": (lambda: nn.Conv1d(6, 20, 5, 2, 2), (2, 6, 19)),
    "groups": (lambda: nn.Conv2d(6, 20, 3, padding=1, groups=2), (2, 6, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 18, 3, 2, groups=6), (2, 6, 9, 8)),
    "pointwise, groups": (lambda: nn.Conv2d(6, 21, 1, groups=3, bias=False), (2, 6, 9, 8)),
    "1d, groups": (lambda: nn.Conv1d(6, 20, 4, padding="same", groups=2), (2, 6, 19)),
    "3d": (lambda: nn.Conv3d(6, 20, 3, padding=1), (2, 6, 5, 9, 8)),
    "3d, strided, dilated": (lambda: nn.Conv3d(6, 20, (2, 3, 1), (2, 1, 2), (1, 0, 2), (2, 1, 1)), (2, 6, 7, 6, 8)),
    "3d, groups, same": (lambda: nn.Conv3d(6, 20, (4, 3, 2), padding="same", groups=2), (2, 6, 5, 6, 7)),
    "3d, circular": (lambda: nn.Conv3d(6, 20, 3, padding=1, padding_mode="circular"), (2, 6, 5, 6, 7)),
    "3d, pointwise": (lambda: nn.Conv3d(6, 20, 1), (2, 6, 5, 6, 7)),
    "3d, pointwise, padded": (lambda: nn.Conv3d(6, 20, 1, padding=1, padding_mode="circular"), (2, 6, 5, 6, 7)),
    "3d, a plane of one": (lambda: nn.Conv3d(6, 20, (1, 4, 4)), (2, 6, 5, 4, 4)),
    "3d, pointwise, strided": (lambda: nn.Conv3d(6, 20, 1, (2, 1, 1)), (2, 6, 5, 6, 7)),
    "3d, one sample": (lambda: nn.Conv3d(6, 20, 2), (6, 5, 6, 7)),
    "one sample": (lambda: nn.Conv2d(6, 20, 3), (6, 9, 8)),
    "one sample, 1d": (lambda: nn.Conv1d(6, 20, 3), (6, 19)),
}


def channels_last(x):
    """A batch as it lies in memory behind a channels-last model; None for what has no such layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else None
