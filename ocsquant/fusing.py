"""Layers that do more than their own product: the nonlinearity that alone reads it, or their siblings' input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from ocsquant import source
from ocsquant.errors import ArgumentError
from ocsquant.folding import BATCH_NORMS, TOLERANCE, FoldedBatchNorm
from ocsquant.inputs import change_of, output_of
from ocsquant.nn import FusedNonlinearity, QuantizedLinear, SharedInput
from ocsquant.nn.fused import nonlinearity_of
from ocsquant.nn.shared import form
from ocsquant.nn.sums import LATER, NEXT
from ocsquant.planning import Target
from ocsquant.transaction import Change, hooked, set_attribute, temporarily
from ocsquant.tying import Built

IDEMPOTENT = ("relu",)  # done twice it is done once: it may be called on other tensors too


def fuse_nonlinearities(model: nn.Module, targets: list[Target], folded: Collection[int]) -> list[Change]:
    """Let integer layers compute the nonlinearity that follows them; changes for the nonlinearities' places.

    folded: ids of convolutions that have taken over the BatchNorm between. What reaches past the module that holds both
    (a parent that calls its layers, code that takes an nn.Sequential apart) is not seen: `check_fused` runs the model
    for that.
    """
    changes: list[Change] = []
    holders = _holders(model)
    made: dict[tuple[int, str], FusedNonlinearity] = {}
    for target in targets:
        recipe, place = target.recipe, holders.get(id(target.module))
        integer = target.kind in ("linear", "conv") and None not in (recipe.activations, recipe.weights.bits)
        if not integer or place is None or target.module._forward_hooks:
            continue
        holder, name = place
        after = follower(holder, name, id(target.module) in folded)
        if after is None:
            continue
        if after.adds is not None and type(target.module) is not nn.Conv2d:
            continue
        place_of_next = after.place
        found = placed(holder, place_of_next)
        nonlinearity = nonlinearity_of(found)
        if nonlinearity is None or (isinstance(found, nn.Module) and hooked(found)):
            continue
        if after.places > 1 and nonlinearity not in IDEMPOTENT:
            continue
        target.nonlinearity, target.adds = nonlinearity, after.adds
        summed = "sum and the " if after.adds is not None else ""
        target.notes.append(f"computes the {summed}{nonlinearity} that follows")
        key = (id(holder), place_of_next)
        if key not in made:
            earlier = found.layers if isinstance(found, FusedNonlinearity) else 0
            made[key] = FusedNonlinearity(nonlinearity, earlier, inplace=getattr(found, "inplace", False))
            changes.append(replace(holder, place_of_next, made[key]))
        made[key].layers += 1
        made[key].called_elsewhere = after.places > made[key].layers
    return changes


def share_inputs(model: nn.Module, built: list[Built]) -> None:
    """Let layers that are called with the same tensor quantize it once."""
    holders = _holders(model)
    mine = {
        id(target.module): entry
        for entry in built
        if isinstance(entry[1], QuantizedLinear)
        and id((target := entry[0]).module) in holders
        and not target.module._forward_pre_hooks
    }
    parents = Counter(id(holders[key][0]) for key in mine)
    for holder in model.modules():
        if parents[id(holder)] < 2:
            continue
        for names in source.siblings(holder):
            alike: dict[tuple[object, ...], list[Built]] = {}
            for name in names:
                entry = mine.get(id(holder._modules.get(name)))
                if entry is not None and (kind := form(entry[1])) is not None:
                    alike.setdefault(kind, []).append(entry)
            for group in alike.values():
                if len(group) > 1:
                    _share(group)


def _share(group: list[Built]) -> None:
    shared = SharedInput([target.module for target, _, _ in group])  # which become what was built
    for _, new, line in group:
        new.share(shared)  # type: ignore[operator]  # a QuantizedLinear
        others = ", ".join(other.path.rpartition(".")[2] for _, _, other in group if other is not line)
        line.reason = "; ".join(part for part in (line.reason, f"input quantized once with {others}") if part)


def _holders(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """The module that holds another, and under which name, where there is only one."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((module, name))
    return {key: places[0] for key, places in found.items() if len(places) == 1}


def placed(holder: nn.Module, name: str) -> object:
    """The submodule or plain attribute of that name."""
    return holder._modules[name] if name in holder._modules else holder.__dict__.get(name)


def replace(holder: nn.Module, name: str, new: FusedNonlinearity) -> Change:
    """Only in this place: the same module may serve in others."""
    if name not in holder._modules:
        return set_attribute(holder, name, new)
    modules, old = holder._modules, holder._modules[name]
    new.train(holder.training)
    return lambda: modules.__setitem__(name, new), lambda: modules.__setitem__(name, old)


class Follower(NamedTuple):
    """The name of what is called on a child's output, in how many places it is called, and when something is added to
    the output before that, if it is (`sums.NEXT`, `sums.LATER`).
    """

    place: str
    places: int
    adds: str | None


def follower(holder: nn.Module, name: str, folded: bool) -> Follower | None:
    """What `holder` calls on the output of its child `name`, and on nothing else, where its code proves that. folded: a
    BatchNorm that comes first does nothing any more.
    """
    found = _next(holder, name)
    if folded and found is not None and isinstance(placed(holder, found[0]), (*BATCH_NORMS, FoldedBatchNorm)):
        name = found[0]
        found = _next(holder, name)
    if found is not None:
        return Follower(*found, None)
    summed = None if type(holder) is nn.Sequential else source.sums(holder).get(name)
    return None if summed is None else Follower(*summed[:2], LATER if summed[2] else NEXT)


def _next(holder: nn.Module, name: str) -> tuple[str, int] | None:
    if type(holder) is not nn.Sequential:
        return source.calls(holder).get(name)
    after = dict(pairwise(holder._modules)).get(name) if "forward" not in holder.__dict__ else None
    return None if after is None else (after, 1)


def check_fused(model: nn.Module, changes: list[Change], batch: Any) -> None:
    """Raise ArgumentError where the changed model gives something else on the batch when its layers compute more.

    With gradients enabled they compute their own product alone, and every module what it stands for.
    """

    def output(recorded: bool) -> Any:
        with torch.set_grad_enabled(recorded):
            return output_of(model, batch)

    change = temporarily(changes, lambda: change_of(output(True), output(False)))
    if not change <= TOLERANCE:
        expected = "False: something reads a layer past the module that holds it, so that nothing may be fused"
        raise ArgumentError("fuse", expected, f"a batch on which the fused model's output changes by {change:.2g}")
