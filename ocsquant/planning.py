"""Plan what to quantize (reads only), build the new modules aside, list the changes for one commit."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ocsquant.config import Recipe, as_recipe, check_patterns, check_type
from ocsquant.errors import ArgumentError, ArgumentTypeError, NothingToQuantizeError
from ocsquant.layers import kind_of, weight_names
from ocsquant.nn import QuantizedLinear, QuantizedMultiheadAttention
from ocsquant.nn.attention import unsupported

SMALLEST_OUT, SMALLEST_IN, NARROW_IN, WIDE_OUT = 16, 64, 128, 96
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def pays(out_features: int, in_features: int) -> bool:
    """Whether the integer linear is at least as fast as the float one, for few tokens and for many.

    Measured (benchmarks/small_layers.py): quantizing a token costs time that short rows or few outputs do not win back.
    """
    wide_enough = SMALLEST_OUT if in_features >= NARROW_IN else WIDE_OUT
    return in_features >= SMALLEST_IN and out_features >= wide_enough


@dataclass
class Target:
    """A module to be replaced, wherever it stands."""

    module: nn.Module
    kind: str
    recipe: Recipe
    path: str
    places: list[tuple[nn.Module, str]] = field(default_factory=list)


@dataclass
class Plan:
    """What is to be done and, for everything else that holds weights, why not."""

    targets: list[Target]
    skipped: list[tuple[str, str, str]]  # path, type, reason


def match(pattern: str, path: str) -> bool:
    """Glob over the whole path, or after "re:" a regular expression that must match all of it."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    return fnmatch.fnmatchcase(path, pattern)


def _check_used(arg: str, patterns: Iterable[str], paths: Iterable[str]) -> None:
    paths = list(paths)
    for pattern in patterns:
        try:
            used = any(match(pattern, path) for path in paths)
        except re.error as error:
            raise ArgumentError(arg, "globs, or regular expressions after 're:'", f"{pattern!r}: {error}") from error
        if not used:
            raise ArgumentError(arg, "patterns that match a module", f"{pattern!r}, which matches none")


def merge_request(recipe: Any, ignore: Any, overrides: Any) -> tuple[Recipe, tuple[str, ...], dict[str, Recipe]]:
    """The recipe with what the call says beside it; the call wins over the recipe."""
    chosen = as_recipe(recipe, "recipe")
    patterns = chosen.ignore or () if ignore is None else check_patterns("ignore", ignore)
    if overrides is None:
        return chosen, patterns, dict(chosen.overrides or {})
    check_type("overrides", overrides, Mapping, "a mapping from patterns to recipes or scheme names")
    return chosen, patterns, dict(Recipe(overrides=overrides).overrides or {})


def make_plan(
    model: nn.Module,
    recipe: Recipe,
    ignore: tuple[str, ...],
    overrides: dict[str, Recipe],
    filter_fn: Callable[[nn.Module, str], bool] | None,
    simulate: bool,
) -> Plan:
    """Walk the model once; nothing is changed."""
    modules = list(model.named_modules(remove_duplicate=False))
    paths = [path for path, _ in modules]
    _check_used("ignore", ignore, paths)
    _check_used("overrides", overrides, paths)
    holders = _parameter_holders(model)
    targets: dict[int, Target] = {}
    skipped: list[tuple[str, str, str]] = []
    parents: dict[str, nn.Module] = dict(modules)
    for path, module in modules:
        parent = parents.get(path.rpartition(".")[0]) if path else None
        if id(module) in targets:
            if parent is not None:
                targets[id(module)].places.append((parent, path.rpartition(".")[2]))
            continue
        override = next((r for pattern, r in overrides.items() if match(pattern, path)), None)
        reason, kind = _judge(module, parent, path, override or recipe, override is not None, holders, simulate)
        if kind is None:
            continue
        if any(match(pattern, path) for pattern in ignore):
            reason = "ignored by pattern"
        elif filter_fn is not None and not _ask(filter_fn, module, path):
            reason = "excluded by filter_fn"
        if reason is not None:
            skipped.append((path, type(module).__name__, reason))
            continue
        places = [] if parent is None else [(parent, path.rpartition(".")[2])]
        targets[id(module)] = Target(module, kind, override or recipe, path, places)
    if not targets:
        reasons = Counter(reason for _, _, reason in skipped)
        text = (
            "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
            or "it has no layer with weights"
        )
        raise NothingToQuantizeError(f"nothing to quantize in {type(model).__name__}: {text}")
    return Plan(list(targets.values()), skipped)


def _ask(filter_fn: Callable[[nn.Module, str], bool], module: nn.Module, path: str) -> bool:
    answer = filter_fn(module, path)
    if not isinstance(answer, bool):
        raise ArgumentTypeError("filter_fn", "a function that returns True or False", repr(answer))
    return answer


def _parameter_holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(module)
    return holders


def _judge(
    module: nn.Module,
    parent: nn.Module | None,
    path: str,
    recipe: Recipe,
    named: bool,
    holders: dict[int, list[nn.Module]],
    simulate: bool,
) -> tuple[str | None, str | None]:
    """(reason to leave it, kind); kind None: not a module this package speaks of."""
    if isinstance(module, QuantizedLinear):
        return "already quantized", "linear"
    if isinstance(module, nn.MultiheadAttention):
        return "the projections of its input stay float: attention reads them as one matrix", "attention"
    kind = kind_of(module)
    if kind is None:
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.modules.conv._ConvTransposeNd)):
            return f"{type(module).__name__} has a forward of its own", "other"
        return None, None
    reason = _weight_problem(module, holders) or _attention_problem(module, parent)
    if reason is None and not simulate and recipe.weights.bits is not None:
        reason = _kernel_problem(module, kind, recipe, named)
    if reason is None and recipe.weights.bits is None:
        reason = _split_problem(module, kind)
    return reason, kind


def _weight_problem(module: nn.Module, holders: dict[int, list[nn.Module]]) -> str | None:
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    for name in weight_names(module):
        weight = module._parameters.get(name)
        if weight is None:
            return f"its {name} is computed by a hook (weight_norm and kin): remove that first"
        if is_lazy(weight):
            return f"its {name} is not initialized yet: run the model once"
        if weight.is_meta:
            return f"its {name} is on the meta device: load the weights first"
        if weight.device.type != "cpu":
            return f"its {name} is on {weight.device}: only the CPU has kernels"
        if weight.dtype not in FLOATS:
            return f"its {name} is {weight.dtype}: expected float32, bfloat16 or float16"
        if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
            return f"its {name} is a tensor subclass ({type(weight.data).__name__})"
        if weight.numel() == 0:
            return f"its {name} is empty"
        others = {type(holder).__name__ for holder in holders[id(weight)] if type(holder) is not type(module)}
        if others:
            return f"its {name} is tied to that of {', '.join(sorted(others))}"
    return None


def _attention_problem(module: nn.Module, parent: nn.Module | None) -> str | None:
    if not isinstance(parent, nn.MultiheadAttention):
        return None
    if type(parent) not in (nn.MultiheadAttention, QuantizedMultiheadAttention):
        return f"{type(parent).__name__} may read its weight past the module's forward"
    return unsupported(parent)


def _kernel_problem(module: nn.Module, kind: str, recipe: Recipe, named: bool) -> str | None:
    """Why there is no integer kernel for this layer, or why it would not pay."""
    if kind != "linear":
        return f"no integer kernel for {type(module).__name__} yet: use simulate=True for its accuracy"
    weights = recipe.weights
    if recipe.activations is None:
        return "no integer kernel for float activations yet: use simulate=True for its accuracy"
    if weights.granularity == "group" or not weights.symmetric:
        return "no integer kernel for groups or zero points yet: use simulate=True for its accuracy"
    assert isinstance(module, nn.Linear)
    if not named and not pays(module.out_features, module.in_features):
        return f"too small to gain: {module.out_features} outputs of {module.in_features} inputs"
    return None


def _split_problem(module: nn.Module, kind: str) -> str | None:
    """Why a layer's channels cannot be copied for real."""
    if kind == "linear":
        return None
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return None if module.groups == 1 else "a grouped convolution has no structural copies, only a wider code range"
    return f"{type(module).__name__} has no structural copies, only a wider code range"
