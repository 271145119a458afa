"""One quantized layer out of a file: its tensors checked for all that the kernels rely on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ocsquant import ops
from ocsquant.config import PerToken, activations_from_dict
from ocsquant.errors import CorruptCheckpointError, SchemaMismatchError
from ocsquant.layout import WIDTHS, packed_shape
from ocsquant.nn import (
    FORMS,
    RECURRENT_FORMS,
    Quantized,
    QuantizedConv,
    QuantizedLinear,
    StoredWeight,
    TiedEmbedding,
    WeightOnly,
    form_of,
)
from ocsquant.nn.convolution import SETTINGS as CONVOLUTION_SETTINGS
from ocsquant.nn.recurrent import SETTINGS, part_names, part_sizes
from ocsquant.nn.sums import LATER, NEXT
from ocsquant.ops.nonlinear import NONLINEARITIES
from ocsquant.suitability import GROUP_STEP


def kind_of_layer(module: nn.Module) -> str | None:
    """The name of the torch module that a layer is or was; None for anything without a quantized form."""
    return module.origin if isinstance(module, Quantized) else form_of(module)


class Check:
    """Raises CorruptCheckpointError that names the layer."""

    def __init__(self, path: str, new_bias: bool = False) -> None:
        self.path, self.new_bias = path, new_bias

    def __call__(self, condition: bool, text: str) -> None:
        if not condition:
            raise CorruptCheckpointError(f"layer '{self.path}': {text}")

    def floats(self, name: str, t: Tensor | None, shape: tuple[int, ...], positive: bool = False) -> None:
        """A tensor that may be absent: float32, of that shape, finite."""
        if t is not None:
            self(t.dtype == torch.float32 and t.shape == shape, f"{name} must be float32 {list(shape)}")
            self(bool(t.isfinite().all()), f"{name} must be finite")
            self(not positive or bool((t > 0).all()), f"{name} must be positive")

    def index(self, t: Tensor | None, size: int) -> int:
        """tail_index: ascending columns; how many."""
        if t is None:
            return 0
        self(t.dtype == torch.int32 and t.dim() == 1 and t.numel() > 0, "tail_index must be an int32 vector")
        inside = int(t[0]) >= 0 and int(t[-1]) < size
        self(inside and bool((t[1:] > t[:-1]).all()), "tail_index must be ascending columns of the weight")
        return t.numel()


def layer_from(
    path: str, old: nn.Module, settings: dict[str, Any], t: dict[str, Tensor], new_bias: bool = False
) -> Quantized:
    """The quantized form of `old` that a file describes, with a bias whatever it had if `new_bias`.

    Raises CorruptCheckpointError and SchemaMismatchError.
    """
    check = Check(path, new_bias)
    kind = settings.get("kind")
    readers = {
        "QuantizedLinear": _quantized_linear,
        "QuantizedLSTM": _recurrent,
        "QuantizedGRU": _recurrent,
        "QuantizedConv": _convolution,
        "TiedEmbedding": _tied,
        "WeightOnly": _weight_only,
    }
    check(kind in readers, f"there is no layer of kind {kind!r}")
    try:
        return readers[str(kind)](path, old, settings, t, check)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CorruptCheckpointError(f"layer '{path}': its settings cannot be read: {error}") from error


def _check_sizes(path: str, old: nn.Module, shape: tuple[int, ...], biased: bool, any_bias: bool = False) -> None:
    weight: Any = old.weight_shape if isinstance(old, Quantized) else old.weight.shape
    had = getattr(old, "bias", None) is not None
    if tuple(weight) != shape or (had != biased and not any_bias):
        raise SchemaMismatchError(f"layer '{path}' is {list(shape)} (bias: {biased}) in the file, {old} in the model")


def _bits(check: Check, bits: Any) -> int:
    check(type(bits) is int and 2 <= bits <= 8, "bits must be 2..8")
    return int(bits)


def _quantized_linear(
    path: str, old: nn.Module, settings: dict[str, Any], t: dict[str, Tensor], check: Check
) -> QuantizedLinear:
    new = _linear(settings, t, check)
    if kind_of_layer(old) != "Linear":
        raise SchemaMismatchError(f"the file has a quantized linear '{path}', the model {type(old).__name__}")
    # A shift makes a bias of its own.
    _check_sizes(path, old, tuple(new.weight_shape), "bias" in t, any_bias="input_shift" in t)
    return new


def _tied(path: str, old: nn.Module, settings: dict[str, Any], t: dict[str, Tensor], check: Check) -> Quantized:
    n, k = settings["shape"]
    if kind_of_layer(old) != "Embedding":
        raise SchemaMismatchError(f"the file has a tied embedding '{path}', the model {type(old).__name__}")
    _check_sizes(path, old, (n, k), False)
    form = {"in_features": k, "out_features": n, "bits": 8, "group_size": 0, "weight_bits": 8, "nonlinearity": None}
    return TiedEmbedding(old, _linear({**form, "activations": dataclasses.asdict(PerToken())}, t, check))


def _recurrent(path: str, old: nn.Module, settings: dict[str, Any], t: dict[str, Tensor], check: Check) -> Quantized:
    form = RECURRENT_FORMS[settings["kind"].removeprefix("Quantized")]
    wanted = {name: settings[name] for name in SETTINGS}
    if not isinstance(old, (getattr(nn, form.origin), form)):
        raise SchemaMismatchError(f"the file has a quantized {form.origin} '{path}', the model {type(old).__name__}")
    had = {name: getattr(old, name) for name in SETTINGS}
    if wanted != had:
        raise SchemaMismatchError(f"layer '{path}' is {wanted} in the file, {had} in the model")
    parts = {}
    for name in part_names(old):
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in t.items() if key.startswith(f"{name}.")}
        part = _linear(settings["parts"][name], own, Check(f"{path}.{name}".lstrip(".")))
        check(tuple(part.weight_shape) == part_sizes(old, name, form.gates), f"{name} has the wrong size")
        check((part.bias is not None) == (wanted["bias"] and not name.startswith("hr")), f"{name} has the wrong bias")
        check(part.input_inverse is None, f"{name} has input scales, which recurrent layers do not")
        parts[name] = part
    return form(old, parts)


def _convolution(path: str, old: nn.Module, settings: dict[str, Any], t: dict[str, Tensor], check: Check) -> Quantized:
    wanted = {n: tuple(v) if isinstance(v := settings[n], list) else v for n in CONVOLUTION_SETTINGS}
    if kind_of_layer(old) != settings["origin"] or settings["origin"] not in ("Conv1d", "Conv2d", "Conv3d"):
        raise SchemaMismatchError(f"the file has a quantized {settings['origin']} '{path}', the model {old}")
    had = {name: getattr(old, name) for name in CONVOLUTION_SETTINGS}
    if wanted != had:
        raise SchemaMismatchError(f"layer '{path}' is {wanted} in the file, {had} in the model")
    own = {key.removeprefix("product."): tensor for key, tensor in t.items() if key.startswith("product.")}
    inverse, shift = (t.get(name) for name in QuantizedConv.tensors)
    check(inverse is not None or shift is None, "it has an input_shift without input_inverse")
    check.floats("input_inverse", inverse, (wanted["in_channels"],), positive=True)
    check.floats("input_shift", shift, (wanted["in_channels"],))
    product = _linear(settings["parts"]["product"], own, check, scaled=inverse is not None)
    adds = settings["adds"]
    able = product.nonlinearity is not None and settings["origin"] == "Conv2d"
    check(adds is None or (able and adds in (NEXT, LATER)), f"{settings['origin']} cannot add {adds!r}")
    new = QuantizedConv(old, product, inverse, shift, adds)
    check(tuple(product.weight_shape) == (new.out_channels, new.weight_shape[1:].numel()), "it has the wrong size")
    check(product.input_inverse is None, "its product has input scales")
    check(product.group_size == 0 or new.groups == 1, "it has scales for groups of columns, and groups of channels")
    any_bias = check.new_bias or shift is not None  # a shift makes a bias of its own
    _check_sizes(path, old, tuple(new.weight_shape), product.bias is not None, any_bias)
    return new


def _linear(settings: dict[str, Any], t: dict[str, Tensor], check: Check, scaled: bool = False) -> QuantizedLinear:
    """scaled: whatever it is a part of has scales for its inputs."""
    k, n, bits = settings["in_features"], settings["out_features"], _bits(check, settings["bits"])
    activations, size = activations_from_dict(settings["activations"]), settings["group_size"]
    check(type(size) is int and size >= 0 and size % GROUP_STEP == 0, f"group_size must be a multiple of {GROUP_STEP}")
    check(type(k) is int and type(n) is int and k > 0 and n > 0, "sizes must be whole numbers")
    check({"packed", "scale"} <= set(t), "packed and scale must be there")
    packed, scale, bias, index = t["packed"], t["scale"], t.get("bias"), t.get("tail_index")
    check.floats("scale", scale, (-(-k // size), n) if size else (n,), positive=True)
    check.floats("bias", bias, (n,))
    e = check.index(index, k)
    inverse, shift = t.get("input_inverse"), t.get("input_shift")
    check(size == 0 or (index is None and inverse is None), "its groups leave no room for a tail or input scales")
    width, zero, levels = settings["weight_bits"], t.get("zero"), t.get("levels")
    check(type(width) is int and width in WIDTHS, f"weight_bits must be one of {WIDTHS}")
    check(width < 8 or (zero is None and levels is None), "zero and levels are there for less than 8 bits")
    check(zero is None or levels is None, "it has levels and zero points")
    if zero is not None:
        fits = zero.dtype == torch.uint8 and zero.shape == (-(-k // size) if size else 1, n)
        check(fits and bool((zero < 2**width).all()), "zero must be uint8, for every scale one below 2^weight_bits")
    if levels is not None:
        fits = levels.dtype == torch.int8 and levels.dim() == 1 and 1 <= levels.numel() <= 2**width
        check(fits, "levels must be an int8 vector of at most 2^weight_bits")
    shape = packed_shape(n, k, e, width)
    check(packed.dtype == torch.uint8 and packed.shape == shape, f"packed must be uint8 {shape}")
    form = (width, zero, levels, size)
    base, tail = ops.unpack_weight(packed, n, k, e, *form)
    same = torch.equal(ops.pack_weight(base, tail if e else None, *form), packed)
    check(same, "packed holds something else than codes and their bounds")
    check((inverse is not None or scaled) == activations.needs_calibration, "its input scales do not fit its settings")
    check(shift is None or inverse is not None, "it has an input_shift without input_inverse")
    check.floats("input_inverse", inverse, (k,), positive=True)
    check.floats("input_shift", shift, (k,))
    kind = settings["nonlinearity"]
    check(kind is None or kind in NONLINEARITIES, f"there is no nonlinearity {kind!r}")
    return QuantizedLinear(
        k, n, bits, activations, packed, scale, bias, index, inverse, shift, size, width, zero, levels, kind
    )


def _weight_only(path: str, old: nn.Module, settings: dict[str, Any], t: dict[str, Tensor], check: Check) -> Quantized:
    origin, shape, bits = settings["origin"], tuple(settings["shape"]), _bits(check, settings["bits"])
    size = settings["group_size"]
    check(origin in FORMS, f"there is no weight-only form of {origin!r}")
    check(type(size) is int and size >= 1, "group_size must be a whole number")
    check(len(shape) > 1 and all(type(s) is int and s > 0 for s in shape), "sizes must be whole numbers")
    if kind_of_layer(old) != origin:
        raise SchemaMismatchError(f"the file has a weight-only {origin} '{path}', the model {type(old).__name__}")
    _check_sizes(path, old, shape, "bias" in t, check.new_bias)
    n, k = shape[0], torch.Size(shape[1:]).numel()
    groups = -(-k // size)
    check({"packed", "scale"} <= set(t), "packed and scale must be there")
    packed, zero, levels, tail = t["packed"], t.get("zero"), t.get("levels"), t.get("tail")
    check(packed.dtype == torch.uint8 and packed.shape == (n, -(-k // 8) * bits), "packed has the wrong dtype or shape")
    check.floats("scale", t["scale"], (n, groups), positive=True)
    check.floats("zero", zero, (n, groups))
    check.floats("bias", t.get("bias"), (n,))
    check(levels is None or zero is None, "it has levels and zero points")
    if levels is not None:
        fits = levels.dim() == 2 and levels.shape[0] in (1, n) and 1 <= levels.shape[1] <= 2**bits and bits <= 6
        check(levels.dtype == torch.int8 and fits, "levels must be int8, at most 2^bits for one or every row")
    e = check.index(t.get("tail_index"), k)
    check((tail is None) == (e == 0), "tail and tail_index go together")
    check(tail is None or (tail.dtype == torch.int8 and tail.shape == (n, e)), f"tail must be int8 {[n, e]}")
    tensors: dict[str, Any] = {name: t.get(name) for name in WeightOnly.tensors}
    stored = StoredWeight(torch.Size(shape), bits, size, **tensors)
    return FORMS[origin](old, stored, t.get("bias"))
