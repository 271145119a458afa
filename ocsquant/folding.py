"""Fold BatchNorm into the convolution before it."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ocsquant.layers import CONVOLUTIONS
from ocsquant.transaction import Change, inherit, replace_child

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batchnorms(model: nn.Module) -> tuple[list[Change], dict[int, nn.Module]]:
    """Changes that replace each conv -> BN pair of an nn.Sequential, and the folded convolution of each original."""
    changes: list[Change] = []
    folded: dict[int, nn.Module] = {}
    uses: dict[int, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            uses[id(child)] = uses.get(id(child), 0) + 1
    for sequence in model.modules():
        if not isinstance(sequence, nn.Sequential) or sequence.training:
            continue
        for (name, conv), (norm_name, norm) in pairwise(sequence._modules.items()):
            if type(conv) not in CONVOLUTIONS or type(norm) not in BATCH_NORMS or norm.running_var is None:
                continue
            if uses[id(conv)] > 1 or uses[id(norm)] > 1 or conv._forward_hooks or conv._forward_pre_hooks:
                continue
            new = inherit(fuse_conv_bn_eval(conv, norm), conv)  # type: ignore[type-var, arg-type]
            folded[id(conv)] = new
            changes += [replace_child(sequence, name, new), replace_child(sequence, norm_name, nn.Identity())]
    return changes, folded
