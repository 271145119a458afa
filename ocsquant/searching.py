"""Which recipe for which layer: what each would cost in bytes and in error, and the best choice under a budget."""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ocsquant.config import Recipe, Weights, as_recipe, check_number, check_type
from ocsquant.errors import ArgumentError, ArgumentTypeError, NonFiniteError, NotCalibratedError
from ocsquant.hessians import attach_moments, repeatable, with_hessians
from ocsquant.inputs import arguments, evaluating, watch
from ocsquant.layers import Matrix, kind_of, plan_splits, quantize_matrix, stored_bytes, weight_names
from ocsquant.methods.grid import QuantizedWeight
from ocsquant.observers import statistics_of
from ocsquant.planning import EXCLUDED, Target, make_plan, merge_request, parameter_holders, tied_types

GPTQ: dict[str, Any] = {"clip": "output", "rounding": "gptq"}
GROUPS: dict[str, Any] = {"granularity": "group", "symmetric": False}
CERTAIN = 0.95  # of one recipe's harm everywhere: a mixture that promises less than that may well be worse
CANDIDATES: dict[str, Recipe] = {
    "W3 g64": Recipe(Weights(3, group_size=64, **GROUPS, **GPTQ), None),
    "W4 k-means": Recipe(Weights(4, codebook="kmeans", **GPTQ), None),
    "W4 g64": Recipe(Weights(4, group_size=64, **GROUPS, **GPTQ), None),
    "W5": Recipe(Weights(5, **GPTQ), None),
    "W6": Recipe(Weights(6, **GPTQ), None),
    "W8": Recipe(Weights(8, **GPTQ), None),
}


@dataclass(frozen=True)
class Option:
    """What a recipe does to a layer: stored `bytes`, and `error`, the squared error of its output over the output."""

    bytes: int
    error: float


@dataclass(frozen=True)
class Sensitivity:
    """Every layer with every candidate; prints as a table.

    options: path -> candidate -> `Option`; weights: path -> number of weights; importance: path -> squared error of the
    network's output (over the output) for one unit of the layer's own; candidates: name -> recipe; ignored: patterns
    of what was left out.
    """

    options: dict[str, dict[str, Option]]
    weights: dict[str, int]
    importance: dict[str, float]
    candidates: dict[str, Recipe]
    ignored: tuple[str, ...] = ()

    def harm(self, path: str, name: str) -> float:
        """What a layer with a candidate adds to the error of the network's output."""
        return self.importance[path] * self.options[path][name].error

    def to_json(self) -> str:
        """JSON text: options, weights and importance of every layer."""
        options = {p: {n: dataclasses.asdict(o) for n, o in row.items()} for p, row in self.options.items()}
        return json.dumps({"options": options, "weights": self.weights, "importance": self.importance}, indent=2)

    def __str__(self) -> str:
        names = list(self.candidates)
        width = max([5, *map(len, self.options)])
        lines = [f"{'layer':{width}}  {'weights':>9}  {'importance':>10}  " + "  ".join(f"{n:>10}" for n in names)]
        lines.append("-" * len(lines[0]))
        for path, row in self.options.items():
            errors = "  ".join(f"{row[n].error:10.2e}" for n in names)
            lines.append(f"{path:{width}}  {self.weights[path]:9}  {self.importance[path]:10.2e}  {errors}")
        lines.append("squared output error of each layer, over its output, with each candidate")
        return "\n".join(lines)


def sensitivity(
    model: nn.Module,
    calibration: Any,
    candidates: Mapping[str, Recipe | str] | None = None,
    *,
    ignore: Iterable[str] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    simulate: bool = False,
) -> Sensitivity:
    """Measure what each candidate does to the output of each layer, and how much the network minds.

    A layer's error is that of its real quantizer on all of its calibrated inputs; activations of a candidate do not
    count. How much the network minds is measured on the first batch that reaches the layer, one run for each layer.

    Args:
        model: a float model; it is only read.
        calibration: batches, as of `quantize`.
        candidates: name -> Recipe or scheme, at least one. Default: 3 to 8 bits, rounded by GPTQ.
        ignore, filter_fn: layers to leave out, as of `quantize`.
        simulate: count the layers that only `quantize(simulate=True)` has a form for, too (LSTM, GRU, tiny ones).

    Raises what `quantize` raises.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_type("simulate", simulate, bool, "True or False")
    chosen = _candidates(candidates)
    base = Recipe(Weights(8, **GPTQ), None)
    with torch.no_grad():
        batches = repeatable(calibration)
        plan = make_plan(model, *merge_request(base, ignore, None), filter_fn, simulate)
        # One record for a head and its embedding needs 8 bits: `quantize` would leave them float with fewer.
        holders = parameter_holders(model)
        plan.targets = [target for target in plan.targets if not tied_types(target.module, holders)]
        probe = _Probe(model, batches, [target.path for target in plan.targets])
        attach_moments(model, plan.targets, probe.statistics)
        options: dict[str, dict[str, Option]] = {}
        importance: dict[str, float] = {}
        for target in with_hessians(model, plan.targets, batches, lambda items: items):
            options[target.path], middle, own = _options(target, chosen)
            error = probe.harm(target.path, middle)
            importance[target.path] = error / own if own > 0 else 0.0
    weights = {t.path: sum(getattr(t.source, n).numel() for n in weight_names(t.source)) for t in plan.targets}
    modules = dict(model.named_modules())
    excluded = [path for path, _, why in plan.skipped if why == EXCLUDED and kind_of(modules[path]) is not None]
    return Sensitivity(options, weights, importance, chosen, (*(ignore or ()), *excluded))


class _Probe:
    """The network's outputs on, for each layer, the first batch that reaches it."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], paths: list[str]) -> None:
        self.model = model
        self.batch: dict[str, Any] = {}
        self.exact: dict[int, list[Tensor]] = {}
        current: list[Any] = [None]

        def look(path: str, module: nn.Module, given: Any, state: Any) -> None:
            self.batch.setdefault(path, current[0])

        def counted() -> Iterator[Any]:
            for batch in batches:
                current[0] = batch
                yield batch

        with watch(model, look, set(paths)):
            self.statistics = statistics_of(model, counted(), lambda items: items)
        first = next(iter(self.batch.values()))
        for path in paths:  # those that no hook sees are taken to be part of every run
            batch = self.batch.setdefault(path, first)
            if id(batch) not in self.exact:
                self.exact[id(batch)] = _outputs(model, {}, batch)

    def harm(self, path: str, changed: dict[str, Tensor]) -> float:
        """Squared error of the output over the output, with other weights in one layer."""
        batch = self.batch[path]
        lost = power = 0.0
        for got, exact in zip(_outputs(self.model, changed, batch), self.exact[id(batch)], strict=True):
            known = exact.isfinite()  # masked scores are -inf
            lost += float((got[known] - exact[known]).square().sum())
            power += float(exact[known].square().sum())
        if not math.isfinite(lost):
            raise NonFiniteError(f"the network's output with a quantized '{path}'", 1, 0)
        return lost / max(power, 1e-300)


def search(
    model: nn.Module,
    calibration: Any,
    budget: float,
    candidates: Mapping[str, Recipe | str] | None = None,
    *,
    ignore: Iterable[str] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    simulate: bool = False,
) -> Recipe:
    """The recipe with the smallest predicted error of the network's output under a budget of bytes.

    The predicted error is the sum of `Sensitivity.harm` over the layers. Starting from the smallest candidate
    everywhere, and from each one everywhere, the change that lowers it most for its bytes is made, again and again;
    one candidate everywhere is kept where that promises less than 5 %.

    Args:
        budget: stored bits for each weight, on average over the layers: codes, scales, zero points, levels.
        model, candidates, ignore, filter_fn, simulate: as of `sensitivity`.
        calibration: batches, or the `Sensitivity` of this model.

    Returns:
        A Recipe whose overrides name the layers that differ from the most frequent choice; read it, edit it, save it
        with `to_json`.

    Raises ArgumentError where not even the smallest candidates fit.
    """
    check_number("budget", budget, 0.0, 64.0)
    if isinstance(calibration, Sensitivity):
        given = {"candidates": candidates, "ignore": ignore, "filter_fn": filter_fn}
        for name, value in given.items():
            if value is not None:
                raise ArgumentError(name, "None with a Sensitivity, which was made with its own", value)
        table = calibration
    else:
        table = sensitivity(model, calibration, candidates, ignore=ignore, filter_fn=filter_fn, simulate=simulate)
    modules = {path for path, _ in model.named_modules()}
    if not set(table.options) <= modules:
        raise ArgumentError("calibration", "the sensitivity of this model's layers", "that of another model")
    choice = _choose(table, budget * sum(table.weights.values()) / 8)
    (common, _), *_ = Counter(choice.values()).most_common()
    differing = {path: table.candidates[name] for path, name in choice.items() if name != common}
    return dataclasses.replace(table.candidates[common], overrides=differing or None, ignore=table.ignored or None)


def _candidates(candidates: Mapping[str, Recipe | str] | None) -> dict[str, Recipe]:
    if candidates is None:
        return dict(CANDIDATES)
    check_type("candidates", candidates, Mapping, "a mapping from names to recipes or scheme names")
    chosen = {name: as_recipe(value, f"candidates[{name!r}]") for name, value in candidates.items()}
    if not chosen:
        raise ArgumentError("candidates", "at least one recipe", {})
    for name, recipe in chosen.items():
        if not isinstance(name, str):
            raise ArgumentTypeError("candidates", "a mapping whose keys are names", repr(name))
        if recipe.weights.bits is None or recipe.overrides or recipe.ignore:
            raise ArgumentError(f"candidates[{name!r}]", "a recipe that rounds, without overrides or ignore", recipe)
        if recipe.weights.ocs is not None and recipe.weights.ocs.max_overhead is not None:
            raise ArgumentError(f"candidates[{name!r}]", "an expand_ratio: max_overhead is for whole models", recipe)
    return chosen


def _options(target: Target, candidates: dict[str, Recipe]) -> tuple[dict[str, Option], dict[str, Tensor], float]:
    """Every candidate on one layer; the float weights that the one of middle error makes, and that error."""
    found: dict[str, Option] = {}
    made: dict[str, list[QuantizedWeight]] = {}
    own = list(target.own_matrices())
    ordered = [m.in_kernel_order() for m in own] if any(map(target.groups_columns, candidates.values())) else own
    power = sum(_power(matrix.values, matrix) for matrix in own)
    for name, recipe in candidates.items():
        stored, lost = 0, 0.0
        made[name] = []
        for matrix in ordered if target.groups_columns(recipe) else own:
            split = plan_splits(matrix, recipe.weights) if target.kind != "embedding" else None
            quantized = quantize_matrix(matrix, recipe.weights, split)
            stored += stored_bytes(quantized, split, matrix.positions)
            lost += _power(quantized.dequantize() - matrix.values, matrix)
            made[name].append(quantized)
        found[name] = Option(stored, lost / power if power > 0 else 0.0)
    middle = sorted(found, key=lambda name: found[name].error)[len(found) // 2]
    of_middle = ordered if target.groups_columns(candidates[middle]) else own
    changed = {
        f"{target.path}.{matrix.name}".lstrip("."): matrix.in_own_order(quantized.dequantize())
        .reshape(matrix.shape)
        .to(target.source._parameters[matrix.name].dtype)  # type: ignore[union-attr]
        for matrix, quantized in zip(of_middle, made[middle], strict=True)
    }
    return found, changed, found[middle].error


@torch.autocast("cpu", enabled=False)
def _power(w: Tensor, matrix: Matrix) -> float:
    """sum |w x|^2 over the inputs; where they are not known together, over channels of their second moments."""
    if matrix.hessian is not None:
        return float(((w @ matrix.hessian) * w).sum(dtype=torch.float64))
    square = w.double().square()
    if matrix.moments is not None:
        square = square * matrix.spread(matrix.moments)
    return float(square.sum())


def _outputs(model: nn.Module, changed: dict[str, Tensor], batch: Any) -> list[Tensor]:
    """The floating-point tensors of the model's output on one batch, with other weights."""
    args, kwargs = arguments(batch)
    with evaluating(model):
        found = _floats(functional_call(model, changed, tuple(args), kwargs))
    if not found:
        raise NotCalibratedError(f"the output of {type(model).__name__} holds no floating-point tensor to compare")
    return found


def _floats(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.double()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _floats(value)]
    return [t for value in output for t in _floats(value)] if isinstance(output, (tuple, list)) else []


def _choose(table: Sensitivity, allowed: float) -> dict[str, str]:
    """One candidate for each layer, in at most `allowed` bytes."""
    starts = [{path: _smallest(row) for path, row in table.options.items()}]
    least = _bytes(table, starts[0])
    if least > allowed:
        bits = 8 / sum(table.weights.values())
        expected = f"at least {bits * least:.2f}, the bits of the smallest candidates"
        raise ArgumentError("budget", expected, round(bits * allowed, 2))
    # The same candidate everywhere is where a greedy way from below may end short of.
    everywhere = (dict.fromkeys(table.options, name) for name in table.candidates)
    uniform = [choice for choice in everywhere if _bytes(table, choice) <= allowed]

    def harm(choice: dict[str, str]) -> float:
        return sum(table.harm(path, name) for path, name in choice.items())

    best = min((_improve(table, choice, allowed) for choice in starts + uniform), key=harm)
    plain = min(uniform, key=harm, default=best)
    return best if harm(best) < CERTAIN * harm(plain) else plain


def _smallest(row: dict[str, Option]) -> str:
    return min(row, key=lambda name: row[name].bytes)


def _bytes(table: Sensitivity, choice: dict[str, str]) -> int:
    return sum(table.options[path][name].bytes for path, name in choice.items())


def _improve(table: Sensitivity, choice: dict[str, str], allowed: float) -> dict[str, str]:
    """Make the change that lowers the harm most for its bytes, as long as one fits."""
    choice, left = dict(choice), allowed - _bytes(table, choice)
    heap: list[tuple[float, str, str, str]] = []

    def offer(path: str) -> None:
        row, now = table.options[path], choice[path]
        for name, option in row.items():
            gain = table.harm(path, now) - table.harm(path, name)
            cost = option.bytes - row[now].bytes
            if gain > 0 and cost <= left:
                heapq.heappush(heap, (-gain / cost if cost > 0 else -torch.inf, path, now, name))

    for path in choice:
        offer(path)
    while heap:
        _, path, before, name = heapq.heappop(heap)
        cost = table.options[path][name].bytes - table.options[path][before].bytes
        if choice[path] == before and cost <= left:
            choice[path] = name
            left -= cost
            offer(path)
    return choice
