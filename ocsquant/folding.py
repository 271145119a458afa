"""Fold BatchNorm into the convolution before it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ocsquant.layers import CONVOLUTIONS
from ocsquant.reporting import Layer
from ocsquant.transaction import FOLDED, Change, become, hooked, inherit

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldedBatchNorm(nn.Identity):
    """In the place of a BatchNorm that the convolution before it has taken over."""


def fold_batchnorms(model: nn.Module) -> tuple[list[Change], dict[int, nn.Module], list[Layer]]:
    """Changes that fold each conv -> BN pair of an nn.Sequential, the folded form of each convolution, report lines."""
    changes: list[Change] = []
    folded: dict[int, nn.Module] = {}
    layers: list[Layer] = []
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for path, sequence in model.named_modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        for (_, conv), (name, norm) in pairwise(sequence._modules.items()):
            if type(conv) not in CONVOLUTIONS or type(norm) not in BATCH_NORMS or norm.running_var is None:
                continue
            if (
                conv.training
                or norm.training
                or uses[id(conv)] > 1
                or uses[id(norm)] > 1
                or hooked(conv)
                or hooked(norm)
                or "forward" in conv.__dict__
                or "forward" in norm.__dict__
            ):
                continue
            new = inherit(fuse_conv_bn_eval(conv, norm), conv)  # type: ignore[type-var, arg-type]
            if conv.bias is None and new.bias is not None:
                new.bias.requires_grad_(conv.weight.requires_grad)
            new.__dict__[FOLDED] = True
            folded[id(conv)] = new
            changes += [become(conv, new), become(norm, inherit(FoldedBatchNorm(), norm))]
            layers.append(
                Layer(f"{path}.{name}".lstrip("."), type(norm).__name__, reason="folded into the convolution")
            )
    return changes, folded, layers
