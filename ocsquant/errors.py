"""Every error this package raises on purpose: each names the argument or module, what was expected and what came."""

from __future__ import annotations


class Error(Exception):
    """Base of all errors raised by ocsquant."""


class ArgumentError(Error, ValueError):
    """A wrong argument: `arg` is its name, `expected` and `got` say what was wanted and what came."""

    def __init__(self, arg: str, expected: str, got: object) -> None:
        super().__init__(arg, expected, got)
        self.arg, self.expected, self.got = arg, expected, got

    def __str__(self) -> str:
        return f"{self.arg} must be {self.expected}, got {self.got}"


class ArgumentTypeError(ArgumentError, TypeError):
    """A wrong argument whose type is at fault."""


class NonFiniteError(Error, ValueError):
    """NaN or Inf where a finite number is needed; `where` names the module and tensor."""

    def __init__(self, where: str, count: int, first: int) -> None:
        super().__init__(where, count, first)
        self.where, self.count, self.first = where, count, first

    def __str__(self) -> str:
        return f"{self.where} holds {self.count} NaN or Inf, the first at flat index {self.first}"


class UnsupportedModuleError(Error, TypeError):
    """A module that cannot be treated as asked; `path` names it, `reason` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"module '{self.path}': {self.reason}"


class NothingToQuantizeError(Error, ValueError):
    """No layer was left to quantize; the text lists why."""


class NotCalibratedError(Error, ValueError):
    """A recipe needs to know a layer's inputs, and nothing was said of them; the text names the layers."""


class PenaltyError(Error, RuntimeError):
    """The kurtosis penalty of a training step is missing, or would count twice; the text says which."""


class CheckpointError(Error, RuntimeError):
    """A file that cannot be loaded; the model was not touched."""


class TruncatedCheckpointError(CheckpointError):
    """The file ends before its contents do, or is no safetensors file."""


class CorruptCheckpointError(CheckpointError):
    """Contents that do not match their checksum or are out of range."""


class UnsupportedVersionError(CheckpointError):
    """Written by another format version, or not by `ocsquant.save`."""


class SchemaMismatchError(CheckpointError):
    """The file's layers or tensors are not those of the model."""


class BuildMismatchError(Error, ImportError):
    """The compiled library is missing, or a second copy of it is in this process."""


def first_few(paths: list[str]) -> str:
    """Paths for a message, the first five of them."""
    return ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
