"""Quantization-aware training with learned input clips and a kurtosis penalty (arXiv 2404.03605)."""

from ocsquant.qat.config import Config
from ocsquant.qat.converting import convert
from ocsquant.qat.linear import QATLinear
from ocsquant.qat.losses import kurtosis_loss, kurtosis_report, set_kurtosis_weight, with_kurtosis
from ocsquant.qat.preparing import param_groups, prepare

__all__ = [
    "Config",
    "QATLinear",
    "convert",
    "kurtosis_loss",
    "kurtosis_report",
    "param_groups",
    "prepare",
    "set_kurtosis_weight",
    "with_kurtosis",
]
