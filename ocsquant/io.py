"""Save and load: a safetensors file with one metadata record, checked in full before a model is touched."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ocsquant import reporting
from ocsquant.config import check_type
from ocsquant.errors import (
    ArgumentError,
    CorruptCheckpointError,
    Error,
    SchemaMismatchError,
    TruncatedCheckpointError,
    UnsupportedModuleError,
    UnsupportedVersionError,
)
from ocsquant.folding import BATCH_NORMS, FoldedBatchNorm
from ocsquant.fusing import follower, placed, replace
from ocsquant.layers import CONVOLUTIONS
from ocsquant.nn import (
    FORMS,
    FusedNonlinearity,
    Quantized,
    QuantizedLinear,
    QuantizedMultiheadAttention,
    SharedInput,
    SimulatedLinear,
    SplitConv,
    SplitLinear,
    quantized_modules,
)
from ocsquant.nn.fused import nonlinearity_of
from ocsquant.nn.linear import FLOATS
from ocsquant.nn.shared import form
from ocsquant.records import layer_from
from ocsquant.transaction import FOLDED, Change, become, commit, inherit, set_attribute, set_class

VERSION = 9
KEY = "ocsquant"
LAYER_TENSORS = sorted({n for c in (QuantizedLinear, *FORMS.values()) for n in c.tensors})
SWITCHED_OFF = ("activation_relu_or_gelu", "use_nested_tensor")  # attributes that `quantize` may clear
ENTRIES = {"version", "layers", "attention", "attributes", "folded", "fused", "shared", "aliases", "sha256", "report"}
FOLDING = (*BATCH_NORMS, FoldedBatchNorm)  # what a convolution may take over, or has
DTYPES = (*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized model to a safetensors file; a crash leaves the old file or the new one, never half of it.

    Raises ArgumentError for a model without quantized layers, UnsupportedModuleError for simulated or written-out split
    layers (save their state_dict with torch.save instead).
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_type("path", path, (str, os.PathLike), "a path")
    layers: dict[str, Any] = {}
    attention, attributes, folded, fused = [], [], [], []
    for name, module in quantized_modules(model):
        layers[name] = module.settings()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (SplitLinear, SplitConv, SimulatedLinear)):
            raise UnsupportedModuleError(name, "simulated and written-out split layers are not saved by ocsquant.save")
        elif isinstance(module, QuantizedMultiheadAttention):
            attention.append(name)
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            attributes += [[name, a, module.__dict__[a]] for a in SWITCHED_OFF if not module.__dict__.get(a, True)]
        if isinstance(module, FoldedBatchNorm) or module.__dict__.get(FOLDED):
            folded.append(name)
        for place, found in (*module._modules.items(), *module.__dict__.items()):
            if isinstance(found, FusedNonlinearity):
                fused.append([name, place, found.nonlinearity, found.layers, found.called_elsewhere])
    if _computed(layers) != _replaced(fused):
        parts = "a layer that computes a nonlinearity without the module in that one's place"
        raise UnsupportedModuleError("", f"{parts}: save the model that holds both, or quantize with fuse=False")
    if not layers:
        raise ArgumentError("model", "a model with quantized layers", type(model).__name__)
    tensors, aliases = _unique(model.state_dict())
    record = {
        "version": VERSION,
        "layers": layers,
        "attention": attention,
        "attributes": attributes,
        "folded": folded,
        "fused": fused,
        "shared": _shared(model),
        "aliases": aliases,
        "sha256": {name: _sha256(t) for name, t in tensors.items()},
        "report": reporting.layers_to_json(model.__dict__.get(reporting.ATTRIBUTE, ())),
    }
    _write(tensors, {KEY: json.dumps(dict(record, digest=_digest(record)), sort_keys=True)}, Path(path))


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Turn a float model of the same architecture into the quantized one of a file, in place; returns the model.

    The model may be on the meta device. Everything is checked first: checksums, names, shapes, dtypes, ranges.

    Raises FileNotFoundError, TruncatedCheckpointError, CorruptCheckpointError, UnsupportedVersionError,
    SchemaMismatchError; the model is then what it was.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_type("path", path, (str, os.PathLike), "a path")
    tensors, record = _read(Path(path))
    try:
        with torch.no_grad():
            changes = _place(model, tensors, record)
    except (TypeError, AttributeError, KeyError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, Error):
            raise
        raise CorruptCheckpointError(
            f"{path}: its '{KEY}' metadata is not what ocsquant.save writes: {error}"
        ) from error
    commit(changes)
    return model


def _unique(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the first of their names, and the other names of each."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.is_meta:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UnsupportedModuleError(name, f"an entry of the state_dict that cannot be saved ({kind})")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor.detach().contiguous().clone()  # safetensors refuses views of a shared storage
    return tensors, aliases


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(
        tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""
    ).hexdigest()


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise TruncatedCheckpointError(f"{path} is no complete safetensors file: {error}") from error
    if text is None:
        raise UnsupportedVersionError(f"{path} has no '{KEY}' metadata: it was not written by ocsquant.save")
    try:
        record = json.loads(text)
        version, digest = record["version"], record.pop("digest")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path}: its '{KEY}' metadata cannot be read: {error}") from error
    if version != VERSION:
        raise UnsupportedVersionError(f"{path} has format version {version!r}, this ocsquant reads {VERSION}")
    if digest != _digest(record):
        raise CorruptCheckpointError(f"{path}: its '{KEY}' metadata does not match its digest")
    if set(record) != ENTRIES:
        raise CorruptCheckpointError(f"{path}: its '{KEY}' metadata has unknown or missing entries")
    if set(record["sha256"]) != set(tensors):
        raise CorruptCheckpointError(f"{path}: the tensors and their checksums differ in number or name")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CorruptCheckpointError(f"{path}: tensor '{name}' has dtype {tensor.dtype}")
        if _sha256(tensor) != record["sha256"][name]:
            raise CorruptCheckpointError(f"{path}: tensor '{name}' does not match its checksum")
    aliases = record["aliases"]
    if not isinstance(aliases, dict) or any(s not in tensors or n in tensors for n, s in aliases.items()):
        raise CorruptCheckpointError(f"{path}: its aliases name tensors that are not there")
    for name, source in aliases.items():
        tensors[name] = tensors[source]
    return tensors, record


def _place(model: nn.Module, tensors: dict[str, Tensor], record: dict[str, Any]) -> list[Change]:
    """Check a file against the model and list what loading it changes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    left = dict(tensors)
    changes: list[Change] = []
    made: dict[int, nn.Module] = {}
    for path, settings in record["layers"].items():
        old = modules.get(path)
        if old is None:
            raise SchemaMismatchError(f"the file has a quantized layer '{path}', the model has no such module")
        prefix = f"{path}." if path else ""
        names = [*LAYER_TENSORS, *(f"{part}.{n}" for part in settings.get("parts", ()) for n in LAYER_TENSORS)]
        own = {n: left.pop(prefix + n) for n in names if prefix + n in left}
        new = layer_from(path, old, settings, own, path in record["folded"])
        module = made.setdefault(id(old), inherit(new, old))
        changes.append(become(old, module))
    changes += _place_fused(modules, record)
    _place_shared(modules, made, record["shared"])
    for name in record["attention"]:
        if not isinstance(modules.get(name), nn.MultiheadAttention):
            raise SchemaMismatchError(
                f"the file has an attention '{name}', the model {type(modules.get(name)).__name__}"
            )
        changes.append(set_class(modules[name], QuantizedMultiheadAttention))
    for name, attribute, value in record["attributes"]:
        if attribute not in SWITCHED_OFF or name not in modules or value:
            raise SchemaMismatchError(f"the file sets '{attribute}' of '{name}', which the model does not have")
        changes.append(set_attribute(modules[name], attribute, value))
    norms = {name for name in record["folded"] if isinstance(modules.get(name), FOLDING)}
    for name in record["folded"]:
        changes += _place_folded(name, modules.get(name), left)
    changes += _place_floats(model, left, {*record["layers"], *norms})
    try:
        layers = tuple(reporting.Layer(**row) for row in record["report"])
    except TypeError as error:
        raise CorruptCheckpointError(f"the file's report cannot be read: {error}") from error
    return [*changes, set_attribute(model, reporting.ATTRIBUTE, layers or None)]


def _place_folded(path: str, module: nn.Module | None, left: dict[str, Tensor]) -> list[Change]:
    """A BatchNorm that its convolution has taken over, or such a convolution, which has got a bias by that."""
    if isinstance(module, FOLDING):
        return [become(module, inherit(FoldedBatchNorm(), module))]
    if module is None or not (type(module) in CONVOLUTIONS or isinstance(module, Quantized)):
        kind = type(module).__name__
        raise SchemaMismatchError(f"the file has a BatchNorm folded into or taken from '{path}', the model {kind}")
    changes = [set_attribute(module, FOLDED, True)]
    if type(module) in CONVOLUTIONS and module.bias is None and (bias := left.pop(f"{path}.bias", None)) is not None:
        weight = module.weight
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise SchemaMismatchError(f"'{path}.bias' is {bias.dtype} {tuple(bias.shape)} in the file, for {module}")
        store, value = module._parameters, nn.Parameter(bias, requires_grad=weight.requires_grad)
        changes.append((lambda: store.__setitem__("bias", value), lambda: store.__setitem__("bias", None)))
    return changes


def _shared(model: nn.Module) -> list[list[str]]:
    """Paths of layers that quantize an input once, in the order of their calls."""
    paths: dict[int, str] = {}
    for path, module in quantized_modules(model):
        paths.setdefault(id(module), path)
    inputs = {id(s): s for m in model.modules() if (s := getattr(m, "shared", None)) is not None}.values()
    whole = (s.layers for s in inputs if all(id(m) in paths and m.shared is s for m in s.layers))
    return [[paths[id(m)] for m in layers] for layers in whole]


def _place_shared(modules: dict[str, nn.Module], made: dict[int, nn.Module], groups: list[list[str]]) -> None:
    """In the new layers, which are nobody's yet."""
    for paths in groups:
        old = [modules[path] for path in paths]
        new = [made[id(m)] for m in old]
        forms = {form(m) if isinstance(m, QuantizedLinear) else None for m in new}
        if len({id(m) for m in new}) < max(len(paths), 2) or len(forms) != 1 or None in forms:
            raise CorruptCheckpointError(f"the layers {', '.join(paths)} cannot share an input")
        shared = SharedInput(old)
        for module in new:
            module.share(shared)  # type: ignore[operator]  # a QuantizedLinear


def _place_fused(modules: dict[str, nn.Module], record: dict[str, Any]) -> list[Change]:
    """Nonlinearities that the layers before them compute."""
    if _computed(record["layers"]) != _replaced(record["fused"]):
        raise CorruptCheckpointError("its layers compute other nonlinearities than it says that they replace")
    changes = []
    for path, place, kind, count, elsewhere in record["fused"]:
        holder = modules.get(path) or nn.Identity()
        children = {f"{path}.{name}".lstrip("."): name for name in holder._modules}
        own = {p: s for p in children if _nonlinearity(s := record["layers"].get(p, {})) == kind}
        found = [(follower(holder, children[p], p in record["folded"]), s.get("adds")) for p, s in own.items()]
        here = [after.places for after, adds in found if after is not None and after[::2] == (place, adds)]
        computes = len(here) == count > 0 and (max(here) > count) == elsewhere
        if not computes or nonlinearity_of(placed(holder, place)) != kind:
            where = f"{path}.{place}".lstrip(".")
            raise SchemaMismatchError(f"the file has a {kind} at '{where}' that a layer computes, the model has not")
        inplace = getattr(placed(holder, place), "inplace", False)
        changes.append(replace(holder, place, FusedNonlinearity(kind, count, elsewhere, inplace)))
    return changes


def _nonlinearity(settings: dict[str, Any]) -> str | None:
    """That a layer computes; of a convolution its product does."""
    return settings.get("parts", {}).get("product", settings).get("nonlinearity")


def _computed(layers: dict[str, Any]) -> Counter[str]:
    """How many layers compute each nonlinearity."""
    return Counter(kind for settings in layers.values() if (kind := _nonlinearity(settings)))


def _replaced(fused: list[list[Any]]) -> Counter[str]:
    """The same by the modules in the places of the nonlinearities."""
    found: Counter[str] = Counter()
    for _, _, kind, count, _ in fused:
        found[kind] += count
    return found


def _place_floats(model: nn.Module, left: dict[str, Tensor], quantized: set[str]) -> list[Change]:
    """Everything but the quantized layers: into the parameter or buffer of the same name."""
    changes: list[Change] = []
    fresh: dict[int, nn.Parameter] = {}
    given: dict[int, Tensor] = {}  # what each tensor of the model gets
    owner: dict[int, int] = {}  # and where each tensor of the file goes
    for path, module in model.named_modules(remove_duplicate=False):
        names = path.split(".")
        if any(".".join(names[:depth]) in quantized for depth in range(len(names) + 1)):
            continue  # a quantized layer or a part of one
        transient = module._non_persistent_buffers_set
        for name, old in (*module._parameters.items(), *module._buffers.items()):
            if old is None:
                continue
            full = f"{path}.{name}" if path else name
            if name in transient:
                if old.is_meta:
                    raise SchemaMismatchError(
                        f"buffer '{full}' is not in the file and on the meta device: build it on the CPU"
                    )
                continue
            if full not in left:
                raise SchemaMismatchError(f"the model has a tensor '{full}', the file has not")
            new = left.pop(full)
            if new.shape != old.shape or new.dtype != old.dtype:
                got, expected = f"{new.dtype} {tuple(new.shape)}", f"{old.dtype} {tuple(old.shape)}"
                raise SchemaMismatchError(f"'{full}' is {got} in the file, {expected} in the model")
            if owner.setdefault(id(new), id(old)) != id(old):
                new = new.clone()  # tied in the file, not in the model
            if not torch.equal(given.setdefault(id(old), new), new):
                raise SchemaMismatchError(
                    f"'{full}' is tied to another tensor in the model, but differs from it in the file"
                )
            changes.append(_set_tensor(module, name, old, new, fresh))
    if left:
        raise SchemaMismatchError(f"the file has tensors that the model has not: {', '.join(sorted(left)[:5])}")
    return changes


def _set_tensor(module: nn.Module, name: str, old: Tensor, new: Tensor, fresh: dict[int, nn.Parameter]) -> Change:
    if not old.is_meta:
        before = old.data
        return lambda: setattr(old, "data", new), lambda: setattr(old, "data", before)
    store: dict[str, Any] = module._parameters if isinstance(old, nn.Parameter) else module._buffers
    value: Tensor = new
    if isinstance(old, nn.Parameter):  # parameters that were tied stay tied
        value = fresh.setdefault(id(old), nn.Parameter(new, requires_grad=old.requires_grad))
    return lambda: store.__setitem__(name, value), lambda: store.__setitem__(name, old)
