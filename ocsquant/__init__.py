"""Quantize PyTorch networks for CPUs: `model = ocsquant.quantize(model)`."""

from ocsquant import ops
from ocsquant.config import OCS, SCHEMES, Activations, PerToken, Recipe, Weights
from ocsquant.environment import Environment, env
from ocsquant.equivalence import Equivalence, verify_equivalence
from ocsquant.errors import (
    ArgumentError,
    ArgumentTypeError,
    BuildMismatchError,
    CheckpointError,
    CorruptCheckpointError,
    Error,
    NonFiniteError,
    NothingToQuantizeError,
    SchemaMismatchError,
    TruncatedCheckpointError,
    UnsupportedModuleError,
    UnsupportedVersionError,
)
from ocsquant.io import load, save
from ocsquant.quantization import quantize
from ocsquant.reporting import Layer, Report, report

__all__ = [
    "OCS",
    "SCHEMES",
    "Activations",
    "ArgumentError",
    "ArgumentTypeError",
    "BuildMismatchError",
    "CheckpointError",
    "CorruptCheckpointError",
    "Environment",
    "Equivalence",
    "Error",
    "Layer",
    "NonFiniteError",
    "NothingToQuantizeError",
    "PerToken",
    "Recipe",
    "Report",
    "SchemaMismatchError",
    "TruncatedCheckpointError",
    "UnsupportedModuleError",
    "UnsupportedVersionError",
    "Weights",
    "env",
    "load",
    "ops",
    "quantize",
    "report",
    "save",
    "verify_equivalence",
]
