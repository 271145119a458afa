"""Does a split network equal the original? Layer by layer, in units of what float rounding may cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ocsquant.config import check_type
from ocsquant.errors import ArgumentError, ArgumentTypeError, SchemaMismatchError
from ocsquant.nn import SplitConv, SplitLinear


@dataclass(frozen=True)
class Equivalence:
    """`layers`: path -> largest |difference| / sum |x| |w| over the outputs of that layer; `largest` is their maximum.

    `output` is the largest difference of the whole networks' outputs, relative to the largest output. `holds` compares
    `largest` with `tolerance`.
    """

    layers: dict[str, float]
    largest: float
    output: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.largest <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal" if self.holds else "NOT equal"
        return (
            f"{len(self.layers)} split layers {verdict} to their originals: largest difference {self.largest:.2e} of "
            f"sum |x||w| (tolerance {self.tolerance:.0e}); outputs differ by {self.output:.2e} of the largest"
        )


def verify_equivalence(model: nn.Module, reference: nn.Module, inputs: Any, tolerance: float = 1e-6) -> Equivalence:
    """Show that a network split without rounding equals the original.

    Args:
        model: made by `quantize` with `Weights(bits=None, split=OCS(...))`.
        reference: the original network.
        inputs: what to call both with: a dict by keyword, a tuple or list by position, anything else as the one
            argument.
        tolerance: largest allowed difference of a layer's output, relative to sum |x| |w|; float32 rounding of two
            sums in different order stays below 1e-6.

    Raises SchemaMismatchError where the two networks do not correspond, ArgumentError where nothing is split.
    """
    for name, network in (("model", model), ("reference", reference)):
        check_type(name, network, nn.Module, "a torch.nn.Module")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise ArgumentTypeError("tolerance", "a number 0..1", repr(tolerance))
    if not 0 <= tolerance <= 1:
        raise ArgumentError("tolerance", "a number 0..1", tolerance)
    originals = dict(reference.named_modules())
    split = {path: m for path, m in model.named_modules() if isinstance(m, (SplitLinear, SplitConv))}
    if not split:
        raise ArgumentError(
            "model", "a network with split layers, from Weights(bits=None, split=OCS(...))", type(model).__name__
        )
    layers: dict[str, float] = {}
    handles = []
    try:
        for path, module in split.items():
            if not isinstance(originals.get(path), (nn.Linear, nn.Conv1d, nn.Conv2d)):
                raise SchemaMismatchError(f"reference has no linear or convolution '{path}'")
            handles.append(module.register_forward_hook(_compare(path, originals[path], layers), with_kwargs=True))
        with torch.no_grad():
            got, expected = _call(model, inputs), _call(reference, inputs)
    finally:
        for handle in handles:
            handle.remove()
    ours, theirs = _tensors(got), _tensors(expected)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise SchemaMismatchError("model and reference differ in number or shape of their outputs")
    output = max((_relative(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    return Equivalence(layers, max(layers.values(), default=0.0), output, tolerance)


def _compare(path: str, original: nn.Module, layers: dict[str, float]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        expected = original(x)
        if expected.shape != y.shape:
            raise SchemaMismatchError(f"'{path}' gives {tuple(y.shape)}, in the reference {tuple(expected.shape)}")
        magnitude = _magnitude(original, x)
        difference = ((y - expected).abs() / magnitude.clamp(min=torch.finfo(torch.float32).tiny)).max()
        layers[path] = max(layers.get(path, 0.0), float(difference))

    return hook


def _magnitude(original: nn.Module, x: Tensor) -> Tensor:
    """sum |x| |w| for every output of a linear or convolution."""
    weight, bias = original.weight.detach().abs(), original.bias  # type: ignore[operator]
    bias = None if bias is None else bias.detach().abs()  # type: ignore[operator]
    if isinstance(original, nn.Linear):
        return nn.functional.linear(x.abs(), weight, bias)
    assert isinstance(original, (nn.Conv1d, nn.Conv2d))
    return original._conv_forward(x.abs(), weight, bias)


def _call(network: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, (tuple, list)) else network(inputs)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [t for value in values for t in _tensors(value)]


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
