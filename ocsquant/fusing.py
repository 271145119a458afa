"""Linear layers that do more than their own product: the nonlinearity that alone reads it, or their siblings' input."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from torch import nn

from ocsquant import source
from ocsquant.nn import FusedNonlinearity, QuantizedLinear, SharedInput
from ocsquant.nn.fused import nonlinearity_of
from ocsquant.nn.shared import form
from ocsquant.planning import Target
from ocsquant.transaction import Change, hooked, set_attribute
from ocsquant.tying import Built


def fuse_nonlinearities(model: nn.Module, targets: list[Target]) -> list[Change]:
    """Let integer linear layers compute the nonlinearity that follows them; changes for the nonlinearities' places."""
    changes: list[Change] = []
    holders = _holders(model)
    for target in targets:
        recipe, place = target.recipe, holders.get(id(target.module))
        integer = target.kind == "linear" and recipe.activations is not None and recipe.weights.bits is not None
        if not integer or place is None or target.module._forward_hooks:
            continue
        holder, name = place
        follower = _follower(holder, name)
        if follower is None:
            continue
        found = placed(holder, follower)
        nonlinearity = nonlinearity_of(found)
        if nonlinearity is None or (isinstance(found, nn.Module) and hooked(found)):
            continue
        target.nonlinearity = nonlinearity
        target.notes.append(f"computes the {nonlinearity} that follows")
        changes.append(replace(holder, follower, FusedNonlinearity(nonlinearity)))
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
        if parents[id(holder)] < 2 or "forward" in holder.__dict__:
            continue
        for names in source.siblings(type(holder)):  # type: ignore[arg-type]  # as in _follower
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


def _follower(holder: nn.Module, name: str) -> str | None:
    """What `holder` calls on the output of its child `name`, and on nothing else, where its code proves that."""
    if "forward" in holder.__dict__:
        return None
    if type(holder).forward is nn.Sequential.forward:
        names = list(holder._modules)
        return dict(pairwise(names)).get(name)
    return source.calls(type(holder)).get(name)  # type: ignore[arg-type]  # mypy asks whether its instances have a hash
