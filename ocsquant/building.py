"""Build the new modules of a plan, aside from the model, and the list of changes that would put them in place."""

from __future__ import annotations

import copy
import dataclasses
import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ocsquant.config import Recipe
from ocsquant.layers import (
    RECURRENT,
    Matrix,
    plan_from,
    plan_splits,
    quantize_matrix,
    splits_in_order,
    stored_bytes,
)
from ocsquant.methods import ocs
from ocsquant.methods.grid import QuantizedWeight, weight_sqnr
from ocsquant.methods.outliertune import InputTransform
from ocsquant.nn import (
    FORMS,
    Quantized,
    QuantizedConv,
    QuantizedLinear,
    QuantizedMultiheadAttention,
    SimulatedLinear,
    SplitConv,
    SplitLinear,
    StoredWeight,
    form_of,
)
from ocsquant.nn.recurrent import part_names, recurrent_form
from ocsquant.planning import Plan, Target
from ocsquant.reporting import ATTRIBUTE, Layer, found
from ocsquant.transaction import Change, become, inherit, set_attribute, set_class
from ocsquant.tying import Built, tie


def build(
    model: nn.Module,
    plan: Plan,
    simulate: bool,
    in_turn: Callable[[list[Target]], Iterable[Target]],
    finish: Callable[[list[Built]], object] = len,
) -> tuple[list[Change], list[Layer]]:
    """Every change and every report line; the model is only read. `in_turn` hands out the targets when it is theirs,
    `finish` sees what was built.
    """
    changes: list[Change] = []
    layers: list[Layer] = []
    budget = _share_budget(plan.targets)
    made = [
        (target, *_build_target(target, simulate, budget.get(id(target.module), {})))
        for target in in_turn(plan.targets)
    ]
    built = list(tie(made))
    finish(built)
    for target, new, layer in built:
        inherit(new, target.source)
        changes.append(become(target.module, new))
        layers.append(layer)
    layers += redirect(model, {id(target.module) for target in plan.targets}, changes)
    layers += [_left(model, *entry) for entry in plan.skipped]
    return changes, layers


def _left(model: nn.Module, path: str, kind: str, reason: str) -> Layer:
    """The line of a module that is left alone; of one quantized earlier, what was recorded then."""
    module = model.get_submodule(path)
    if not isinstance(module, Quantized):
        return Layer(path, kind, reason=reason)
    earlier = {layer.path: layer for layer in model.__dict__.get(ATTRIBUTE) or ()}
    return dataclasses.replace(earlier.get(path) or found(path, module), reason=reason)


def _build_target(target: Target, simulate: bool, budget: dict[str, ocs.SplitPlan]) -> tuple[nn.Module, Layer]:
    module, recipe = target.source, target.recipe
    integer = not simulate and recipe.weights.bits is not None
    notes = list(target.notes)
    parts: list[tuple[Matrix, ocs.SplitPlan | None]] = []
    for matrix in target.matrices():
        plan = budget.get(matrix.name) or plan_splits(matrix, recipe.weights)
        if target.copies is not None:
            plan = ocs.SplitPlan(target.copies)
        if target.kind == "embedding" and recipe.weights.ocs is not None:
            plan = None
            notes.append("not split: an embedding has no input channels")
        parts.append((matrix, plan))
    if recipe.weights.bits is None:
        return _build_split(target, *parts[0])
    quantized = [quantize_matrix(matrix, recipe.weights, plan) for matrix, plan in parts]
    layer = _describe(target, parts, quantized)
    if integer:
        made = _build_integer(module, {m.name: (m, q) for (m, _), q in zip(parts, quantized, strict=True)}, target)
        new: nn.Module = made
        layer.kernel, layer.split_channels = made.kernel, made.split_channels
        layer.activation_bits = made.activation_bits
        layer.bytes_after = sum(b.numel() * b.element_size() for b in made.buffers())
    else:
        new = _build_simulated(target, [matrix for matrix, _ in parts], quantized)
        layer.kernel = "simulated in float"
        if target.kind != "linear" and recipe.activations is not None:
            notes.append("activations stay float")
        layer.simulated = True
    layer.reason = "; ".join(notes)
    return new, layer


def _build_integer(module: nn.Module, weights: dict[str, tuple[Matrix, QuantizedWeight]], target: Target) -> Quantized:
    activations, transform = target.recipe.activations, target.transform
    if isinstance(module, RECURRENT):
        assert activations is not None
        parts = {}
        for name in part_names(module):
            bias = getattr(module, f"bias_{name}", None)
            parts[name] = QuantizedLinear.from_weight(weights[f"weight_{name}"][1], bias, activations)
        return recurrent_form(module)(module, parts)
    matrix, weight = weights["weight"]
    if target.kind == "conv" and activations is not None:
        conv: Any = module
        bias, inverse, shift = conv.bias, None, None
        if isinstance(transform, InputTransform):
            flat = conv.weight.detach().float().reshape(conv.out_channels, -1)
            bias = transform.folded_bias(flat, None if bias is None else bias.detach(), conv.groups)
            inverse, shift = transform.inverse, transform.shift
        ordered = matrix.as_kernels_have(weight)
        product = QuantizedLinear.from_weight(ordered, bias, activations, nonlinearity=target.nonlinearity)
        return QuantizedConv(conv, product, inverse, shift, target.adds)
    if activations is None or target.kind == "embedding":
        form = FORMS[form_of(module) or ""]
        float_weight: Tensor = module.weight  # type: ignore[assignment]
        return form(module, StoredWeight.of(weight, float_weight.shape), getattr(module, "bias", None))
    assert isinstance(module, nn.Linear)
    return QuantizedLinear.from_weight(weight, module.bias, activations, transform, module.weight, target.nonlinearity)


def _build_simulated(target: Target, found: list[Matrix], quantized: list[QuantizedWeight]) -> nn.Module:
    module, transform, activations = target.source, target.transform, target.recipe.activations
    new = copy.copy(module)
    new.__dict__ = dict(module.__dict__)
    new._parameters = dict(module._parameters)
    for matrix, weight in zip(found, quantized, strict=True):
        old = module._parameters[matrix.name]
        assert old is not None
        values = matrix.in_own_order(weight.dequantize())
        if isinstance(transform, InputTransform):
            values = transform.unfold(values, target.groups)
        values = values.reshape(matrix.shape).to(old.dtype)
        new._parameters[matrix.name] = nn.Parameter(values, requires_grad=old.requires_grad)
    if isinstance(module, nn.Linear) and isinstance(transform, InputTransform) and transform.shift is not None:
        bias = transform.folded_bias(module.weight.detach(), None if module.bias is None else module.bias.detach())
        assert bias is not None
        new._parameters["bias"] = nn.Parameter(bias.to(module.weight.dtype), requires_grad=module.weight.requires_grad)
    if isinstance(new, nn.RNNBase):
        new._init_flat_weights()
    if isinstance(new, nn.Linear) and activations is not None:
        return SimulatedLinear.of(new, quantized[0], activations, transform)
    return new


def _build_split(target: Target, matrix: Matrix, plan: ocs.SplitPlan | None) -> tuple[nn.Module, Layer]:
    module = target.source
    plan = plan or ocs.SplitPlan(torch.ones(matrix.channels, dtype=torch.int32))
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    expanded, index = ocs.expand_weight(weight, plan)
    if isinstance(module, nn.Linear):
        new: nn.Module = SplitLinear(expanded, module.bias, index)
    else:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d))
        new = SplitConv(module, expanded, index)
    layer = Layer(target.path, type(module).__name__, kernel="float, channels copied")
    layer.split_channels = int((plan.copies > 1).sum())
    layer.bytes_before = weight.numel() * weight.element_size()
    layer.bytes_after = expanded.numel() * expanded.element_size()
    layer.sqnr = float("inf")
    return new, layer


def _describe(
    target: Target, found: list[tuple[Matrix, ocs.SplitPlan | None]], quantized: list[QuantizedWeight]
) -> Layer:
    module, recipe = target.source, target.recipe
    layer = Layer(target.path, type(module).__name__, bits=recipe.weights.bits)
    layer.activation_bits = recipe.activations.bits if recipe.activations and target.kind == "linear" else None
    layer.bytes_before = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
    rest = layer.bytes_before - sum(
        getattr(module, m.name).numel() * getattr(module, m.name).element_size() for m, _ in found
    )
    layer.bytes_after = rest + sum(
        stored_bytes(q, plan, m.positions) for (m, plan), q in zip(found, quantized, strict=True)
    )
    layer.split_channels = sum(int((plan.copies > 1).sum()) for _, plan in found if plan is not None)
    layer.sqnr = weight_sqnr((m.values, q) for (m, _), q in zip(found, quantized, strict=True))
    return layer


def redirect(model: nn.Module, quantized: set[int], changes: list[Change]) -> list[Layer]:
    """Keep attention and transformer layers from reading weights past the modules that hold them, named by their id."""
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and id(module.out_proj) in quantized:
            changes.append(set_class(module, QuantizedMultiheadAttention))
        elif isinstance(module, nn.TransformerEncoderLayer):
            if any(id(m) in quantized for m in module.modules()) and module.__dict__.get("activation_relu_or_gelu"):
                # The one condition of the fused path that belongs to the instance and to nothing else.
                changes.append(set_attribute(module, "activation_relu_or_gelu", 0))
                layers.append(
                    Layer(path, type(module).__name__, reason="fused inference path switched off: it reads weights")
                )
        elif isinstance(module, nn.TransformerEncoder) and any(id(m) in quantized for m in module.modules()):
            if module.__dict__.get("use_nested_tensor"):
                changes.append(set_attribute(module, "use_nested_tensor", False))
                layers.append(
                    Layer(path, type(module).__name__, reason="nested tensors switched off: that path reads weights")
                )
    return layers


def _share_budget(targets: list[Target]) -> dict[int, dict[str, ocs.SplitPlan]]:
    """Splits under `OCS.max_overhead`: by error gain per byte over all layers of one `Weights`."""
    plans: dict[int, dict[str, ocs.SplitPlan]] = {}
    recipes = {id(t.recipe.weights): t.recipe for t in targets}
    for key, recipe in recipes.items():
        split = recipe.weights.ocs
        if split is None or split.max_overhead is None:
            continue
        members = [t for t in targets if id(t.recipe.weights) == key and t.kind != "embedding"]
        for target, matrix, channels in _spend(members, recipe, split.max_overhead):
            if channels:
                plans.setdefault(id(target.module), {})[matrix.name] = plan_from(matrix, split, iter(channels))
    return plans


def _spend(members: list[Target], recipe: Recipe, overhead: float) -> Iterator[tuple[Target, Matrix, list[int]]]:
    parts = [(target, matrix) for target in members for matrix in target.matrices()]
    chosen: list[list[int]] = [[] for _ in parts]
    seen: list[set[int]] = [set() for _ in parts]
    orders = []
    for _, matrix in parts:
        most = matrix.channels if overhead else 0
        orders.append(islice(splits_in_order(matrix, recipe.weights), most))
    bits = recipe.weights.bits or 32
    left = overhead * sum(matrix.values.numel() * bits / 8 for _, matrix in parts)
    power = [max(float(matrix.power()), 1e-30) for _, matrix in parts]
    heap: list[tuple[float, int, int]] = []

    def offer(i: int) -> None:
        step = next(orders[i], None)
        if step is not None:
            channel, gain = step
            heapq.heappush(heap, (-gain / power[i] / _cost(parts[i][1], seen[i], channel), i, channel))

    for i in range(len(parts)):
        offer(i)
    while heap:
        _, i, channel = heapq.heappop(heap)
        cost = _cost(parts[i][1], seen[i], channel)
        if cost <= left:
            chosen[i].append(channel)
            seen[i].add(channel)
            left -= cost if cost > 1 else 0
            offer(i)
    for (target, matrix), channels in zip(parts, chosen, strict=True):
        yield target, matrix, channels


def _cost(matrix: Matrix, seen: set[int], channel: int) -> float:
    """Bytes of one more copy: a tail column for the first, next to nothing for those that use the same column."""
    return 1.0 if channel in seen else matrix.values.shape[0] * matrix.positions + 4.0
