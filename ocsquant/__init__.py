"""Quantize PyTorch networks for CPUs: `model = ocsquant.quantize(model)`."""

from ocsquant import ops, qat
from ocsquant.config import (
    OCS,
    SCHEMES,
    Activations,
    PerChannelStatic,
    PerTensorStatic,
    PerToken,
    Recipe,
    SplitQuant,
    Weights,
)
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
    NotCalibratedError,
    NothingToQuantizeError,
    PenaltyError,
    SchemaMismatchError,
    TruncatedCheckpointError,
    UnsupportedModuleError,
    UnsupportedVersionError,
)
from ocsquant.io import load, save
from ocsquant.observers import InputStatistics, Statistics, calibrate
from ocsquant.quantization import quantize
from ocsquant.reporting import Layer, Report, report
from ocsquant.searching import Option, Sensitivity, search, sensitivity

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
    "InputStatistics",
    "Layer",
    "NonFiniteError",
    "NotCalibratedError",
    "NothingToQuantizeError",
    "Option",
    "PenaltyError",
    "PerChannelStatic",
    "PerTensorStatic",
    "PerToken",
    "Recipe",
    "Report",
    "SchemaMismatchError",
    "Sensitivity",
    "SplitQuant",
    "Statistics",
    "TruncatedCheckpointError",
    "UnsupportedModuleError",
    "UnsupportedVersionError",
    "Weights",
    "calibrate",
    "env",
    "load",
    "ops",
    "qat",
    "quantize",
    "report",
    "save",
    "search",
    "sensitivity",
    "verify_equivalence",
]
