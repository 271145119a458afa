"""Fold BatchNorm into the convolution before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ocsquant.graph import trace
from ocsquant.layers import CONVOLUTIONS
from ocsquant.reporting import Layer
from ocsquant.transaction import Change, become, hooked, inherit

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FOLDED = "_ocsquant_folded"  # an attribute of a convolution that has taken one over, whatever form it has now


class FoldedBatchNorm(nn.Identity):
    """In the place of a BatchNorm that the convolution before it has taken over."""


def fold_batchnorms(model: nn.Module) -> tuple[list[Change], dict[int, nn.Module], list[Layer]]:
    """Changes that fold each conv -> BN pair, the folded form of each convolution, report lines."""
    changes: list[Change] = []
    folded: dict[int, nn.Module] = {}
    layers: list[Layer] = []
    graph, problem = trace(model)
    if graph is None:
        reason = f"torch.fx cannot trace its forward ({problem}): only BatchNorms inside an nn.Sequential were folded"
        layers.append(Layer("", type(model).__name__, reason=reason))
    for conv, path, norm in _sequential_pairs(model) if graph is None else graph.pairs():
        if type(conv) not in CONVOLUTIONS or type(norm) not in BATCH_NORMS or norm.running_var is None:
            continue
        if conv.training or norm.training or hooked(conv) or hooked(norm):
            continue
        new = inherit(fuse_conv_bn_eval(conv, norm), conv)  # type: ignore[type-var, arg-type]
        folded[id(conv)] = new
        changes += [become(conv, new), become(norm, inherit(FoldedBatchNorm(), norm))]
        layers.append(Layer(path, type(norm).__name__, reason="folded into the convolution"))
    return changes, folded, layers


def _sequential_pairs(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Neighbours in an nn.Sequential that are registered nowhere else."""
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for path, sequence in model.named_modules():
        if isinstance(sequence, nn.Sequential):
            for (_, module), (name, after) in pairwise(sequence._modules.items()):
                if module is not None and after is not None and uses[id(module)] == uses[id(after)] == 1:
                    yield module, f"{path}.{name}".lstrip("."), after
