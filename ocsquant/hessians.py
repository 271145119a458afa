"""What the rounding of weights gets to know of their inputs: second moments, and the Hessians of GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ocsquant.errors import ArgumentError, NotCalibratedError, first_few
from ocsquant.inputs import columns, run_batches, statistics_key, watch
from ocsquant.layers import weight_names
from ocsquant.methods.learned_clips import ClippedInput
from ocsquant.methods.outliertune import InputTransform
from ocsquant.nn import QuantizedMultiheadAttention
from ocsquant.observers import InputStatistics, Statistics, check_batches, check_finite
from ocsquant.planning import Target

MEMORY = 128 * 2**20  # bytes of Hessians held at a time, or those of one layer where they are more


def unseen_by_design(model: nn.Module, target: Target) -> str | None:
    """Why no run of the model can show the input of this layer; None where it should have been seen."""
    if target.kind == "embedding":
        return "an embedding has no input to calibrate"
    parent = model.get_submodule(target.path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) and not isinstance(parent, QuantizedMultiheadAttention):
        return "attention reads it past its forward, so calibration cannot see its input"
    return None


def attach_moments(model: nn.Module, targets: list[Target], statistics: Statistics | None) -> None:
    """Give the targets that clip by output error the second moments of their inputs, one per matrix and channel."""
    missing = []
    for target in targets:
        weights = target.recipe.weights
        if weights.clip != "output":
            continue
        if (why := unseen_by_design(model, target)) is not None:
            target.notes.append(f"clipped by weight error: {why}")
            continue
        for name in weight_names(target.source):
            seen = None if statistics is None else statistics.get(statistics_key(target.path, name))
            if seen is None or seen.count == 0:
                missing.append(target.path)
                break
            check_width(target, name, seen)
            target.moments[name] = by_output(target.source, second_moments(seen, target.transform))
    if missing:
        raise NotCalibratedError(
            f"calibration must show the inputs of {len(missing)} layers whose clip is 'output': {first_few(missing)}"
        )


def check_width(target: Target, name: str, seen: InputStatistics) -> None:
    """Raise ArgumentError for statistics of another layer's inputs."""
    expected = getattr(target.source, name).shape[1] * target.groups
    if seen.total.numel() != expected:
        key = statistics_key(target.path, name)
        raise ArgumentError("calibration", f"statistics in which '{key}' has {expected} channels", seen.total.numel())


def by_output(module: nn.Module, moments: Tensor) -> Tensor:
    """[1, channels], or with a grouped convolution [outputs, channels of their group]."""
    groups: int = getattr(module, "groups", 1)
    if groups == 1:
        return moments[None]
    outputs: int = module.out_channels  # type: ignore[assignment]
    return moments.reshape(groups, -1).repeat_interleave(outputs // groups, 0)


def second_moments(seen: InputStatistics, transform: InputTransform | ClippedInput | None) -> Tensor:
    """float32 [channels]: the mean of the square of what the (folded) weight is multiplied with."""
    if transform is None:
        return seen.second_moment
    if isinstance(transform, ClippedInput):
        return transform.apply(seen.sample).square().mean(0)
    square, shift = seen.squares / seen.count, transform.shift
    if shift is not None:
        z = shift.double()
        square = square - 2 * z * seen.total / seen.count + z.square()
    return (square * transform.inverse.double().square()).float().clamp(min=0.0)


def with_hessians(
    model: nn.Module, targets: Iterable[Target], batches: Any, progress: Callable[[Any], Any]
) -> Iterator[Target]:
    """The targets one by one, each with its Hessians while it is out, if it rounds by GPTQ.

    The batches are run once for every `MEMORY` bytes of Hessians.
    """
    waiting: list[Target] = []
    held = 0
    for target in targets:
        size = _bytes(target)
        if waiting and held + size > MEMORY:
            yield from _release(model, waiting, batches, progress)
            waiting, held = [], 0
        waiting.append(target)
        held += size
    yield from _release(model, waiting, batches, progress)


def _bytes(target: Target) -> int:
    if target.recipe.weights.rounding != "gptq":
        return 0
    weights = [getattr(target.source, name) for name in weight_names(target.source)]
    return sum(4 * (w.numel() // w.shape[0]) ** 2 for w in weights)


def _release(model: nn.Module, targets: list[Target], batches: Any, progress: Callable[[Any], Any]) -> Iterator[Target]:
    asking = {}
    for target in targets:
        if target.recipe.weights.rounding != "gptq":
            continue
        if (why := unseen_by_design(model, target)) is not None:
            target.notes.append(f"rounded to nearest: {why}")
        elif target.groups != 1:
            target.notes.append("rounded to nearest: a grouped convolution has one Hessian for each group")
        else:
            asking[target.path] = target
    if asking:
        _collect(model, asking, progress(batches))
    for target in targets:
        yield target
        target.hessians = {}


def _collect(model: nn.Module, asking: dict[str, Target], batches: Iterable[Any]) -> None:
    last: list[Any] = [None, 0, None]  # layers that share an input come one after the other

    def look(path: str, module: nn.Module, given: Any, state: Any) -> None:
        target = asking[path]
        for name, x in columns(module, given, state):
            check_finite(x, f"the input of {statistics_key(path, name) or 'the model'}")
            if target.transform is not None:
                u = target.transform.apply(x)
                product = u.T @ u
            elif isinstance(module, nn.Linear) and not given.is_inference():
                if given is not last[0] or given._version != last[1]:
                    last[:] = given, given._version, x.T @ x
                product = last[2]
            else:
                product = x.T @ x
            if name in target.hessians:
                target.hessians[name] += product
            else:
                target.hessians[name] = product.clone()

    with watch(model, look, set(asking)):
        run_batches(model, batches)
    for path, target in asking.items():
        for name, hessian in target.hessians.items():
            check_finite(hessian, f"the squares of {statistics_key(path, name) or 'the model'}'s inputs")
    unseen = [path for path, target in asking.items() if not target.hessians]
    if unseen:
        raise NotCalibratedError(f"calibration reached none of these layers: {first_few(unseen)}")


def repeatable(batches: Any) -> Any:
    """Batches that can be run several times: a one-shot iterator is kept as a list."""
    if batches is None:
        raise NotCalibratedError(
            "calibration must be batches: they are run again for rounding by 'gptq' and for search"
        )
    if isinstance(batches, Statistics):
        raise ArgumentError("calibration", "batches where weights are rounded by 'gptq'", repr(batches))
    check_batches(batches)
    return list(batches) if iter(batches) is batches else batches
