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
            if any(m.training or uses[id(m)] > 1 or hooked(m) or "forward" in m.__dict__ for m in (conv, norm)):
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
