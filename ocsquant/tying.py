"""Layers that share a weight go on sharing it, where they are quantized alike."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ocsquant.layers import RECURRENT
from ocsquant.nn import Quantized, QuantizedConv, QuantizedLinear, TiedEmbedding, WeightOnly
from ocsquant.planning import Target
from ocsquant.reporting import Layer

Built = tuple[Target, nn.Module, Layer]
STORED_TWICE = "its weight is also another layer's, but quantized for this one alone: stored twice"


def tie(built: list[Built]) -> Iterator[Built]:
    """The same layers, those of one float weight over one record; the report's bytes are those of the first."""
    groups: dict[int, list[Built]] = {}
    for entry in built:
        target, new, _ = entry
        if isinstance(new, Quantized) and not isinstance(target.source, RECURRENT):
            groups.setdefault(id(target.source.weight), []).append(entry)
    changed: dict[int, nn.Module] = {}
    for group in groups.values():
        # An embedding can read a linear layer's form of the weight, not the other way round.
        (owner, first, line), *others = sorted(group, key=lambda entry: not isinstance(entry[1], QuantizedLinear))
        for target, new, layer in others:
            alike = target.recipe.weights == owner.recipe.weights
            shared = _over(first, target, new) if alike else None
            if shared is None:
                layer.reason = "; ".join(part for part in (layer.reason, STORED_TWICE) if part)
                continue
            changed[id(target)] = shared
            layer.kernel, layer.bits, layer.sqnr = shared.kernel, shared.bits, line.sqnr
            layer.bytes_before = layer.bytes_after = 0
    for target, new, layer in built:
        yield target, changed.get(id(target), new), layer


def _over(first: nn.Module, target: Target, new: nn.Module) -> Quantized | None:
    """`new` over the tensors of `first`, None where they are not the same weight."""
    assert isinstance(first, Quantized)
    assert isinstance(new, Quantized)
    if isinstance(first, QuantizedLinear) and isinstance(target.source, nn.Embedding):
        return TiedEmbedding(target.source, first) if TiedEmbedding.fits(first) else None
    alike = type(first) is type(new) or (isinstance(first, WeightOnly) and isinstance(new, WeightOnly))
    own = {"origin": None, "nonlinearity": None}  # of each, whatever the weight is
    if not alike or {**first.settings(), **own} != {**new.settings(), **own}:
        return None
    ours, theirs = _record(new), _record(first)
    names = [name for name in ours.tensors if name != "bias" and ours._buffers[name] is not None]
    for name in names:
        a, b = ours._buffers[name], theirs._buffers[name]
        if a is None or b is None or not torch.equal(a, b):
            return None
    ours._buffers.update({name: theirs._buffers[name] for name in names})
    return new


def _record(module: Quantized) -> Quantized:
    return module.product if isinstance(module, QuantizedConv) else module
