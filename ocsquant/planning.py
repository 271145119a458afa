"""Plan what to quantize (reads only), build the new modules aside, list the changes for one commit."""

from __future__ import annotations

import dis
import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ocsquant.config import Recipe, as_recipe, check_patterns, check_type
from ocsquant.errors import ArgumentError, ArgumentTypeError, NothingToQuantizeError
from ocsquant.layers import KINDS, Matrix, kind_of, matrices, weight_names
from ocsquant.methods.learned_clips import ClippedInput
from ocsquant.methods.outliertune import InputTransform
from ocsquant.nn import Quantized, QuantizedMultiheadAttention
from ocsquant.nn.attention import unsupported
from ocsquant.suitability import kernel_problem, shares_rows, split_problem

EXCLUDED = "excluded by filter_fn"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TIED = {nn.Embedding, nn.Linear}  # types that may share one record of a weight


@dataclass
class Target:
    """A module to be replaced; its weights are read from `source`: itself, or its form with a BatchNorm folded in."""

    module: nn.Module
    source: nn.Module
    kind: str
    recipe: Recipe
    path: str
    transform: InputTransform | ClippedInput | None = None
    copies: Tensor | None = None  # int32 [channels]: how wide each input channel's codes are, where that is decided
    moments: dict[str, Tensor] = field(default_factory=dict)  # of the inputs of each weight, for clip "output"
    hessians: dict[str, Tensor] = field(default_factory=dict)  # the same for rounding "gptq", while it is built
    nonlinearity: str | None = None  # that the layer is to compute too
    adds: str | None = None  # and that of a sum with something, see `QuantizedConv`
    notes: list[str] = field(default_factory=list)

    @property
    def groups(self) -> int:
        """Of its input channels."""
        return getattr(self.source, "groups", 1)

    def matrices(self) -> Iterator[Matrix]:
        """The weights to quantize, with the scales of the inputs folded in and what is known of those inputs."""
        for matrix in self.own_matrices():
            yield matrix.in_kernel_order() if self.groups_columns(self.recipe) else matrix

    def own_matrices(self) -> Iterator[Matrix]:
        """The same with columns in the order of the weights."""
        for matrix in matrices(self.source, self.path):
            values = matrix.values
            if isinstance(self.transform, InputTransform):
                values = self.transform.fold(values, self.groups)
            moments, hessian = self.moments.get(matrix.name), self.hessians.get(matrix.name)
            yield replace(matrix, values=values, moments=moments, hessian=hessian)

    def groups_columns(self, recipe: Recipe) -> bool:
        """Whether the recipe gives this layer scales for groups of a convolution's columns, which the kernels order."""
        if self.kind != "conv" or recipe.activations is None or recipe.weights.bits is None:
            return False
        weight: Tensor = self.source.weight  # type: ignore[assignment]
        return recipe.weights.granularity == "group" and recipe.weights.group_size < weight[0].numel()


@dataclass
class Plan:
    """What is to be done and, for everything else that holds weights, why not."""

    targets: list[Target]
    skipped: list[tuple[str, str, str]]  # path, type, reason


@dataclass(frozen=True)
class Place:
    """A module with all its paths and the modules that hold it."""

    module: nn.Module
    paths: list[str]
    parents: list[tuple[nn.Module, str]]


def match(pattern: str, path: str) -> bool:
    """Glob over the whole path, or after "re:" a regular expression that must match all of it."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    return fnmatch.fnmatchcase(path, pattern)


def covers(pattern: str, paths: Iterable[str]) -> bool:
    """Whether the pattern matches one of the paths or a module that contains it."""
    return any(
        match(pattern, ".".join(parts[: i + 1])) for p in paths for parts in [p.split(".")] for i in range(len(parts))
    )


def check_used(arg: str, patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Raise ArgumentError for a pattern that matches none of the paths."""
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
    if filter_fn is not None and not callable(filter_fn):
        raise ArgumentTypeError("filter_fn", "a function of (module, path)", repr(filter_fn))
    places = _places(model)
    paths = [path for place in places for path in place.paths]
    check_used("ignore", ignore, paths)
    check_used("overrides", overrides, paths)
    holders = parameter_holders(model)
    mixed = len({w.requires_grad for w in _weights(places)}) > 1
    targets: list[Target] = []
    skipped: list[tuple[str, str, str]] = []
    for place in places:
        override = next((r for pattern, r in overrides.items() if covers(pattern, place.paths)), None)
        named = override is not None
        reason, kind = _judge(place, override or recipe, named, holders, simulate)
        if kind is None:
            continue
        if any(covers(pattern, place.paths) for pattern in ignore):
            reason = "ignored by pattern"
        elif filter_fn is not None and not all(_ask(filter_fn, place.module, path) for path in place.paths):
            reason = EXCLUDED
        elif reason is None and mixed and not named and any(w.requires_grad for w in _weights([place])):
            reason = "trainable, while other weights are frozen: quantizing it would end its training"
        if reason is None:
            targets.append(Target(place.module, place.module, kind, override or recipe, place.paths[0]))
        else:
            skipped.append((place.paths[0], type(place.module).__name__, reason))
    targets, apart = _whole_ties(targets, holders)
    skipped += apart
    if not targets:
        raise NothingToQuantizeError(_nothing(model, skipped))
    return Plan(targets, skipped)


def _whole_ties(
    targets: list[Target], holders: dict[int, list[nn.Module]]
) -> tuple[list[Target], list[tuple[str, str, str]]]:
    """Without a layer whose weight is tied to that of one of another type that is not quantized."""
    apart: list[tuple[str, str, str]] = []
    while True:
        chosen, kept = {id(target.module) for target in targets}, []
        for target in targets:
            tied = holders.get(id(target.module._parameters.get("weight")), [])
            float_types = {type(h).__name__ for h in tied if id(h) not in chosen}
            if float_types and tied_types(target.module, holders):
                reason = f"its weight is tied to that of {', '.join(sorted(float_types))}, which stays float"
                apart.append((target.path, type(target.module).__name__, reason))
            else:
                kept.append(target)
        if len(kept) == len(targets):
            return kept, apart
        targets = kept


def _places(model: nn.Module) -> list[Place]:
    modules = list(model.named_modules(remove_duplicate=False))
    by_path = dict(modules)
    places: dict[int, Place] = {}
    for path, module in modules:
        place = places.setdefault(id(module), Place(module, [], []))
        place.paths.append(path)
        if path:
            place.parents.append((by_path[path.rpartition(".")[0]], path.rpartition(".")[2]))
    return list(places.values())


def linear_places(
    model: nn.Module, skip: tuple[str, ...], check: bool
) -> tuple[list[tuple[list[str], nn.Linear]], list[tuple[str, str, str]]]:
    """Paths and module of every nn.Linear that may be replaced; path, type and reason of those that may not.

    check: raise ArgumentError for a pattern of `skip` that matches nothing. Raises NothingToQuantizeError where none is
    left.
    """
    places = _places(model)
    if check:
        check_used("config.skip", skip, [path for place in places for path in place.paths])
    holders = parameter_holders(model)
    found: list[tuple[list[str], nn.Linear]] = []
    skipped: list[tuple[str, str, str]] = []
    for place in places:
        if not isinstance(place.module, nn.Linear):
            continue
        reason = "it has a forward of its own" if kind_of(place.module) is None else None
        reason = reason or _module_problem(place) or _weight_problem(place.module, holders) or _parent_problem(place)
        if any(covers(pattern, place.paths) for pattern in skip):
            reason = "skipped by pattern"
        if reason is None:
            found.append((place.paths, place.module))
        else:
            skipped.append((place.paths[0], type(place.module).__name__, reason))
    if not found:
        raise NothingToQuantizeError(_nothing(model, skipped))
    return found, skipped


def _nothing(model: nn.Module, skipped: list[tuple[str, str, str]]) -> str:
    reasons = Counter(reason for _, _, reason in skipped)
    text = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    return f"nothing to quantize in {type(model).__name__}: {text or 'it has no layer with weights'}"


def _weights(places: Iterable[Place]) -> Iterator[nn.Parameter]:
    for place in places:
        if kind_of(place.module) is not None:
            names = weight_names(place.module)
            yield from (w for name in names if (w := place.module._parameters.get(name)) is not None)


def _ask(filter_fn: Callable[[nn.Module, str], bool], module: nn.Module, path: str) -> bool:
    answer = filter_fn(module, path)
    if not isinstance(answer, bool):
        raise ArgumentTypeError("filter_fn", "a function that returns True or False", repr(answer))
    return answer


def parameter_holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold a parameter, by its id."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(module)
    return holders


def _judge(
    place: Place, recipe: Recipe, named: bool, holders: dict[int, list[nn.Module]], simulate: bool
) -> tuple[str | None, str | None]:
    """(reason to leave it, kind); kind None: not a module this package speaks of."""
    module = place.module
    if any(isinstance(parent, Quantized) for parent, _ in place.parents):
        return None, None
    if isinstance(module, Quantized):
        return "already quantized", "linear"
    if hasattr(module, "quantized_as"):
        return "in quantization-aware training: use ocsquant.qat.convert", "linear"
    if isinstance(module, nn.MultiheadAttention):
        return "the projections of its input stay float: attention reads them as one matrix", "attention"
    kind = kind_of(module)
    if kind is None:
        if not any(p is not None and p.dim() > 1 for p in module._parameters.values()):
            return None, None
        own = any(isinstance(module, base) for bases in KINDS.values() for base in bases)
        return "it has a forward of its own" if own else "no quantized form for this type", "other"
    reason = (
        _module_problem(place, named, ": name it in overrides to quantize it")
        or _weight_problem(module, holders)
        or _parent_problem(place)
    )
    if reason is None and not simulate and recipe.weights.bits is not None:
        reason = kernel_problem(module, kind, recipe, named)
    if reason is None and recipe.weights.bits is None:
        reason = split_problem(module, kind)
    if reason is None and not named and tied_types(module, holders) and not shares_rows(recipe):
        reason = "its weight is tied to that of a layer of another type: name both in overrides to store it twice"
    return reason, kind


def _module_problem(place: Place, named: bool = False, hint: str = "") -> str | None:
    module = place.module
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance (accelerate and kin): remove that first"
    if type(module).__module__.partition(".")[0] != "torch" and not named:
        return f"{type(module).__name__} is a subclass, which may have more to it{hint}"
    return None


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
        others = tied_types(module, holders, name)
        if others and {type(module), *others} != TIED:
            return f"its {name} is tied to that of {', '.join(sorted(other.__name__ for other in others))}"
    return None


def tied_types(module: nn.Module, holders: dict[int, list[nn.Module]], name: str = "weight") -> set[type]:
    """Other types of modules that hold a weight of this one."""
    return {type(h) for h in holders.get(id(module._parameters.get(name)), ())} - {type(module)}


def _parent_problem(place: Place) -> str | None:
    """Whether a module that holds this one goes past its forward."""
    for parent, name in place.parents:
        if isinstance(parent, nn.MultiheadAttention):
            exact = type(parent) in (nn.MultiheadAttention, QuantizedMultiheadAttention)
            if not exact or "forward" in parent.__dict__:
                return f"{type(parent).__name__} may read its weight past the module's forward"
            if (reason := unsupported(parent)) is not None:
                return reason
        elif type(parent).forward is not nn.TransformerEncoderLayer.forward and _reads_weight(type(parent), name):
            return f"the forward of {type(parent).__name__} reads its weight"
    return None


def _reads_weight(parent: type[nn.Module], name: str) -> bool:
    """Whether a class's forward contains `....name.weight`."""
    try:
        loads = [i.argval for i in dis.get_instructions(parent.forward) if i.opname in ("LOAD_ATTR", "LOAD_METHOD")]
    except TypeError:  # not written in Python
        return False
    return any(first == name and second == "weight" for first, second in pairwise(loads))
