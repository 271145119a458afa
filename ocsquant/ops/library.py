"""Loads the compiled library, and what the operators' Python faces share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocsquant.errors import BuildMismatchError


def _load() -> None:
    library = Path(__file__).parents[1] / "_C.so"
    if hasattr(torch.ops.ocsquant, "cpu_isa") and str(library) not in torch.ops.loaded_libraries:
        raise BuildMismatchError(
            f"another copy of ocsquant's library is already in this process; not loading {library}"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        detail = error.__cause__ or error
        raise BuildMismatchError(
            f"ocsquant's library {library} cannot be loaded by torch {torch.__version__}: {detail}"
        ) from error
    torch.ops.ocsquant.cpu_isa()  # an unknown OCSQUANT_ISA is an error now, not at the first layer


_load()
compiled = torch.ops.ocsquant


def cpu_isa() -> tuple[str, str]:
    """The level the kernels run at ("amx_int8", "avx512_vnni", "avx_vnni", "avx2" or "scalar"), and why that one."""
    return compiled.cpu_isa()


def wants_gradient(x: object) -> bool:
    return getattr(x, "requires_grad", False) and torch.is_grad_enabled()  # anything but a tensor: the op says so


def check_there(op: str, name: str, tensor: object) -> None:
    """Without any tensor the dispatcher finds no kernel, and its error names no argument."""
    if tensor is None:
        raise RuntimeError(f"{op}: {name} must be a tensor, got None")


def check_flag(op: str, name: str, value: object) -> None:
    """The dispatcher takes None and numbers for a bool."""
    if value is not True and value is not False:
        raise RuntimeError(f"{op}: {name} must be True or False, got {value!r}")


def check_once(op: str) -> None:
    """Raise in a backward that is itself recorded: torch would take what it computes for constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op}: its gradient cannot be differentiated (create_graph=True)")


def check_vector(op: str, name: str, tensor: object, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() != 1:
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise RuntimeError(f"{op}: {name} must be a {dtype} vector, got {got}")


def bind(op: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of a call by their names in the schema, for fake kernels; the tensors must be on one device."""
    arguments = getattr(compiled, op).default._schema.arguments
    bound = {a.name: args[i] if i < len(args) else a.default_value for i, a in enumerate(arguments)}
    check_devices(op, **{name: value for name, value in bound.items() if isinstance(value, Tensor)})
    return bound


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """A meta tensor among CPU ones brings the dispatcher here instead of to the kernel, which checks the rest."""
    (first, device), *others = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    for name, other in others:
        if other != device:
            raise RuntimeError(f"{op}: {name} must be on {device}, as {first} is, got {other}")
