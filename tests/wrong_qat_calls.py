"""Right and wrong values for every argument of ocsquant.qat."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from wrong_operator_calls import Case, Wrong

import ocsquant
from ocsquant import OCS, ArgumentTypeError, Weights, qat

MODEL = nn.Sequential(nn.Linear(24, 16))
PREPARED = qat.prepare(copy.deepcopy(MODEL), qat.Config(clip_init=2.0))
TRAINED = qat.prepare(copy.deepcopy(MODEL), qat.Config(clip_init=2.0, weight_bits=4, weight_group_size=8))
NAN_CLIP = copy.deepcopy(PREPARED)
NAN_CLIP[0].clip_neg.data.fill_(float("nan"))
NAN_WEIGHT = nn.Sequential(nn.Linear(24, 16))
NAN_WEIGHT[0].weight.data[3, 4] = float("nan")
with ocsquant.calibrate(MODEL) as SEEN:
    MODEL(torch.randn(5, 24))
OTHERS = ocsquant.Statistics({"0": ocsquant.InputStatistics.empty(9)})

QAT_TOGETHER: list[tuple[str, Callable[[], Any]]] = [
    ("activation_bits", lambda: qat.Config(activation_bits=None)),
    ("weight_group_size", lambda: qat.Config(weight_group_size=32)),
    ("split", lambda: qat.Config(split=OCS(0.1))),
    ("split", lambda: qat.Config(weight_bits=4, weight_group_size=32, split=OCS(0.1))),
    ("fold", lambda: qat.Config(activation_bits=None, weight_bits=4, fold="channel")),
]

NOT_PREPARED = {"range": MODEL}
QAT_CASES = {
    "qat.Config": Case(
        qat.Config,
        {"weight_bits": 4},
        {
            "activation_bits": {"range": 9, "below": 1},
            "weight_bits": {"range": 9, "below": 1},
            "weight_group_size": {"range": 4},
            "split": {"range": OCS(0.1, quantization_aware=False), "budget": OCS(max_overhead=0.1)},
            "clip_init": {"range": "best", "below": -1.0, "nan": float("nan"), "infinite": float("inf")},
            "kurtosis_weight": {"range": -1.0, "nan": float("nan")},
            "kurtosis_target": {"range": -1.0, "nan": float("nan")},
            "kurtosis_on": {"range": [3], "string": Wrong("0", ArgumentTypeError)},
            "skip": {"range": [3], "string": Wrong("0", ArgumentTypeError)},
            "fold": {"range": "rows"},
        },
    ),
    "qat.prepare": Case(
        qat.prepare,
        {"model": MODEL, "calibration": [torch.zeros(1, 24)]},
        {
            "model": {
                "range": Wrong(nn.Sequential(nn.ReLU()), ocsquant.NothingToQuantizeError, "Sequential"),
                "not finite": Wrong(NAN_WEIGHT, ocsquant.NonFiniteError, "0.weight"),
                "twice": PREPARED,
            },
            "config": {
                "range": Wrong(qat.Config(skip=("nothing",)), text="skip"),
                "all": Wrong(qat.Config(skip=("*",)), ocsquant.NothingToQuantizeError, "skipped"),
                "none": Wrong(qat.Config(kurtosis_on=("nothing",)), text="kurtosis_on"),
            },
            "calibration": {
                "range": [],
                "tensor": Wrong(torch.zeros(3, 24), ArgumentTypeError),
                "statistics": OTHERS,
                "none": Wrong(None, ocsquant.NotCalibratedError, "calibration"),
                "infinite": Wrong([torch.full((1, 24), torch.inf)], ocsquant.NonFiniteError, "input"),
            },
        },
        {"calibration.type": "no annotation narrows it: tried by hand", "progress.range": "all three values are right"},
    ),
    "qat.param_groups": Case(
        qat.param_groups,
        {"model": PREPARED, "lr": 1e-3, "weight_decay": 0.1},
        {
            "model": NOT_PREPARED,
            "lr": {"range": -1.0, "nan": float("nan")},
            "weight_decay": {"range": -1.0},
            "betas": {"range": (0.9, 2.0), "three": (0.9, 0.9, 0.9)},
        },
    ),
    "qat.with_kurtosis": Case(
        qat.with_kurtosis,
        {"model": PREPARED, "loss": torch.ones(1)},
        {
            "model": NOT_PREPARED,
            "loss": {"range": torch.ones(2)},
            "share": {"range": 1.5, "below": -0.1, "two": torch.ones(2)},
        },
        {
            "share.dtype": "its value counts",
            "share.rank": "one entry is one entry",
            "share.size": "tried as two",
            "share.device": "its value counts",
            "loss.dtype": "a loss may have any",
            "loss.rank": "one entry is one entry",
            "loss.device": "it is passed on",
        },
    ),
    "qat.kurtosis_loss": Case(
        qat.kurtosis_loss,
        {"model": qat.prepare(copy.deepcopy(MODEL), qat.Config(clip_init=2.0, kurtosis_weight=0.0))},
        {"model": NOT_PREPARED | {"no forward": Wrong(PREPARED, ocsquant.PenaltyError, "with_kurtosis")}},
    ),
    "qat.kurtosis_report": Case(qat.kurtosis_report, {"model": PREPARED}, {"model": NOT_PREPARED}),
    "qat.set_kurtosis_weight": Case(
        qat.set_kurtosis_weight,
        {"model": PREPARED, "weight": 0.01},
        {"model": NOT_PREPARED, "weight": {"range": -1.0, "nan": float("nan")}},
    ),
    "qat.convert": Case(
        qat.convert,
        {"model": PREPARED},
        {
            "model": NOT_PREPARED
            | {
                "not finite": Wrong(NAN_CLIP, ocsquant.NonFiniteError, "0.clip_neg"),
                "groups": Wrong(TRAINED, ocsquant.UnsupportedModuleError, "'0'"),
            },
            "weights": {
                "range": Weights(bits=None, split=OCS(0.1)),
                "groups": Wrong(Weights(symmetric=False), ocsquant.UnsupportedModuleError, "'0'"),
                "uncalibrated": Wrong(Weights(bits=4, rounding="gptq"), ocsquant.NotCalibratedError, "calibration"),
            },
        },
        {
            "calibration": "tried with weights that need it, in test_qat.py",
            "progress.range": "all three values are right",
        },
    ),
}
