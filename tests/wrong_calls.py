"""Right and wrong values for every argument of every public callable; test_arguments.py makes the calls."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from wrong_convolution_calls import CONVOLUTION_CASES
from wrong_operator_calls import OPERATOR_CASES, Case, Wrong
from wrong_qat_calls import QAT_CASES, QAT_TOGETHER
from wrong_recurrent_calls import RECURRENT_CASES

import ocsquant
from ocsquant import OCS, Activations, ArgumentTypeError, Recipe, SplitQuant, Weights

MODEL = nn.Sequential(nn.Linear(128, 64))
QUANTIZED = ocsquant.quantize(copy.deepcopy(MODEL))
SPLIT = ocsquant.quantize(copy.deepcopy(MODEL), Recipe(Weights(bits=None, split=OCS(0.05)), None))
RECIPE = Recipe().to_json()


NAN_MODEL = nn.Sequential(nn.Linear(128, 64))
NAN_MODEL[0].weight.data[3, 4] = float("nan")

with ocsquant.calibrate(MODEL) as SEEN:
    MODEL(torch.randn(5, 128))
OTHERS = ocsquant.Statistics({"0": ocsquant.InputStatistics.empty(9)})


def observe(model: nn.Module) -> None:
    with ocsquant.calibrate(model):
        model(torch.zeros(1, 128))


# Values that are right alone and wrong together: the argument the error names, and the call.
TOGETHER: list[tuple[str, Callable[[], Any]]] = [
    ("bits", lambda: Weights(bits=None, split=SplitQuant())),
    ("bits", lambda: Weights(bits=None, split=OCS(0.1), rounding="gptq")),
    ("bits", lambda: Weights(bits=5, split=SplitQuant())),
    ("bits", lambda: Weights(bits=7, codebook="kmeans")),
    ("bits", lambda: Weights(bits=3, codebook="nf4")),
    ("clip", lambda: Weights(symmetric=False, clip="kl")),
    ("clip", lambda: Weights(bits=4, codebook="nf4", clip="output")),
    ("clip", lambda: Weights(bits=4, codebook="kmeans", clip="mse")),
    ("clip", lambda: Weights(bits=2, split=SplitQuant(), clip="output")),
    ("symmetric", lambda: Weights(bits=4, codebook="nf4", symmetric=False)),
    ("symmetric", lambda: Weights(symmetric=False, split=OCS(0.1))),
    ("symmetric", lambda: Weights(symmetric=False, granularity="tensor")),
    ("granularity", lambda: Weights(bits=2, granularity="group", split=SplitQuant())),
    ("rounding", lambda: Weights(rounding="gptq", split=OCS(0.1, quantization_aware=False))),
    ("rounding", lambda: Weights(rounding="squant", split=OCS(0.1, quantization_aware=False))),
    ("rounding", lambda: Weights(bits=4, rounding="squant", codebook="nf4")),
    ("split", lambda: Weights(bits=4, codebook="nf4", split=OCS(0.1))),
    ("ranges", lambda: SplitQuant(clusters="row")),
    ("boundaries", lambda: SplitQuant(parts=2, boundaries="optimal")),
    ("split", lambda: Activations(scale="channel", split=OCS(0.1, quantization_aware=False))),
    ("split", lambda: Activations(smooth_alpha=0.5, split=OCS(0.1, quantization_aware=False))),
    (
        "activations",
        lambda: Recipe(Weights(split=OCS(0.1)), Activations(split=OCS(0.1, quantization_aware=False))),
    ),
    ("symmetric", lambda: Activations(symmetric=False)),
    ("symmetric", lambda: ocsquant.PerTensorStatic(max_outliers=4, symmetric=False)),
    ("max_overhead", lambda: OCS(expand_ratio=0.1, max_overhead=0.1)),
]

# What the two callables of searching share with quantize.
WRONG_SEARCH: dict[str, dict[str, Any]] = {
    "model": {"range": Wrong(nn.Sequential(nn.ReLU()), ocsquant.NothingToQuantizeError, "Sequential")},
    "calibration": {
        "range": [],
        "tensor": Wrong(torch.zeros(3, 128), ArgumentTypeError),
        "statistics": SEEN,
        "none": Wrong(None, ocsquant.NotCalibratedError, "calibration"),
    },
    "candidates": {
        "range": {},
        "split": {"a": Recipe(Weights(bits=None, split=OCS(0.1)), None)},
        "values": {"a": "W9A9"},
        "keys": Wrong({3: "W8A8"}, ArgumentTypeError),
    },
    "ignore": {"string": "0", "range": ["nothing"]},
    "filter_fn": {"range": lambda module, path: "yes"},
}
EXCUSED_SEARCH = {"calibration.type": "no annotation narrows it: tried by hand"}

CASES = {
    "OCS": Case(
        OCS,
        wrong={
            "expand_ratio": {"range": 1.5, "below": -0.1, "nan": float("nan")},
            "max_overhead": {"range": 2.0, "below": -0.1},
            "shares": {"range": "thirds"},
            "select": {"range": "best"},
        },
    ),
    "Weights": Case(
        Weights,
        wrong={
            "bits": {"range": 9, "below": 1, "without split": None},
            "granularity": {"range": "row"},
            "group_size": {"range": 4, "above": 131073},
            "clip": {"range": "percentile"},
            "rounding": {"range": "up"},
            "codebook": {"range": "nf3"},
        },
        excused={"split.range": "valid by construction"},
    ),
    "SplitQuant": Case(
        SplitQuant,
        wrong={
            "parts": {"range": 5, "below": 1},
            "clusters": {"range": "column"},
            "ranges": {"range": "column"},
            "boundaries": {"range": "best"},
        },
    ),
    "Activations": Case(
        Activations,
        wrong={
            "bits": {"range": 16, "below": 1},
            "max_outliers": {"range": 65, "below": -1},
            "outlier_threshold": {"range": 1.0, "above": 2e6},
            "scale": {"range": "row"},
            "smooth_alpha": {"range": 2.0, "below": -1.0},
            "split": {"range": OCS(0.1), "halving": OCS(0.1, shares="halving", quantization_aware=False)},
        },
    ),
    "PerTensorStatic": Case(
        ocsquant.PerTensorStatic, wrong={"bits": {"range": 9}, "max_outliers": {"range": 65, "below": -1}}
    ),
    "PerChannelStatic": Case(
        ocsquant.PerChannelStatic,
        wrong={
            "bits": {"range": 1},
            "max_outliers": {"range": 65, "below": -1},
            "smooth_alpha": {"range": 1.5, "below": -0.1, "nan": float("nan")},
        },
    ),
    "InputStatistics": Case(
        ocsquant.InputStatistics.empty,
        {"channels": 3},
        excused={"channels": "made by calibrate; a width of another layer is refused where statistics are used"},
    ),
    "Statistics": Case(
        ocsquant.Statistics, wrong={"layers": {"range": Wrong({"a": 3}, ArgumentTypeError), "keys": {3: SEEN["0"]}}}
    ),
    "Statistics.merge": Case(
        ocsquant.Statistics.merge,
        {"self": SEEN, "other": SEEN},
        {"other": {"range": OTHERS}},
        {"self": "valid by construction"},
    ),
    "Statistics.save": Case(
        ocsquant.Statistics.save,
        {"self": SEEN, "path": "seen"},
        {"path": {"range": Wrong("missing/file", Exception, "missing")}},
        {"self": "valid by construction"},
    ),
    "Statistics.load": Case(
        ocsquant.Statistics.load,
        {"path": "statistics"},
        {
            "path": {
                "range": Wrong("missing", FileNotFoundError, "missing"),
                "model": Wrong("file", ocsquant.CorruptCheckpointError, "no statistics"),
            }
        },
    ),
    "calibrate": Case(observe, {"model": MODEL}, excused={"model.range": "any module may be run"}),
    "PerToken": Case(
        ocsquant.PerToken,
        wrong={"bits": {"range": 1}, "max_outliers": {"range": 1000}, "outlier_threshold": {"range": float("nan")}},
    ),
    "Recipe": Case(
        Recipe,
        wrong={
            "overrides": {"range": {"a": "W9A9"}, "keys": {3: "W8A8"}, "values": {"a": 8}},
            "ignore": {"range": ["a", 3]},
        },
        excused={"weights.range": "valid by construction", "activations.range": "valid by construction"},
    ),
    "Recipe.from_json": Case(
        Recipe.from_json,
        {"text": RECIPE},
        {
            "text": {
                "range": RECIPE.replace('"bits": 8', '"bits": 9'),
                "no json": "no",
                "no mapping": "[]",
                "empty": "{}",
                "unknown": RECIPE.replace("{", '{"more": 1,', 1),
                "weights": Recipe(ignore=("a",)).to_json().replace('"weights": {', '"weights": "ab", "w": {'),
                "ignore": RECIPE.replace('"ignore": null', '"ignore": "head"'),
                "deep": "[" * 100_000,
            }
        },
    ),
    "Recipe.to_json": Case(Recipe.to_json, {"self": Recipe()}, excused={"self": "valid by construction"}),
    "quantize": Case(
        ocsquant.quantize,
        {"model": MODEL},
        {
            "model": {
                "range": Wrong(nn.Sequential(nn.ReLU()), ocsquant.NothingToQuantizeError, "Sequential"),
                "not finite": Wrong(NAN_MODEL, ocsquant.NonFiniteError, "0.weight"),
            },
            "recipe": {"range": "W9A9"},
            "calibration": {"range": [], "tensor": Wrong(torch.zeros(3, 128), ArgumentTypeError)},
            "ignore": {"string": "0", "range": ["nothing"], "regex": ["re:("], "items": [3]},
            "filter_fn": {"range": lambda module, path: "yes"},
            "overrides": {"range": {"nothing": "W8A8"}, "values": {"0": "W9A9"}, "keys": {3: "W8A8"}},
            "fuse": {"type": Wrong("yes", ArgumentTypeError), "type number": Wrong(1, ArgumentTypeError)},
            "fold_batchnorm": {
                "type": Wrong("yes", ArgumentTypeError),
                "type number": Wrong(1, ArgumentTypeError),
                "type none": Wrong(None, ArgumentTypeError),
            },
        },
        {
            "calibration.type": "no annotation narrows it: tried by hand",
            "progress.range": "all three values are right",
            "fuse.range": "what the model makes of a batch is the model's own affair",
            "fold_batchnorm.range": "what the model makes of a batch is the model's own affair",
        },
    ),
    "sensitivity": Case(
        ocsquant.sensitivity,
        {"model": MODEL, "calibration": [torch.zeros(1, 128)]},
        WRONG_SEARCH,
        EXCUSED_SEARCH,
    ),
    "search": Case(
        ocsquant.search,
        {"model": MODEL, "calibration": [torch.zeros(1, 128)], "budget": 5.0},
        WRONG_SEARCH | {"budget": {"range": 65.0, "below": -1.0, "small": 1.0, "nan": float("nan")}},
        EXCUSED_SEARCH,
    ),
    "report": Case(ocsquant.report, {"model": QUANTIZED}, {"model": {"range": MODEL}}),
    "save": Case(
        ocsquant.save,
        {"model": QUANTIZED, "path": "file"},
        {
            "model": {"range": MODEL, "split": Wrong(SPLIT, ocsquant.UnsupportedModuleError, "'0'")},
            "path": {"range": Wrong("missing/file", FileNotFoundError, "missing")},
        },
    ),
    "load": Case(
        ocsquant.load,
        {"model": MODEL, "path": "file"},
        {
            "model": {"range": Wrong(nn.Sequential(nn.Linear(128, 32)), ocsquant.SchemaMismatchError, "layer '0'")},
            "path": {"range": Wrong("missing", FileNotFoundError, "missing")},
        },
    ),
    "verify_equivalence": Case(
        ocsquant.verify_equivalence,
        {"model": SPLIT, "reference": MODEL, "inputs": torch.zeros(1, 128)},
        {
            "model": {"range": MODEL},
            "reference": {
                "range": Wrong(nn.Sequential(nn.ReLU()), ocsquant.SchemaMismatchError),
                "size": Wrong(nn.Sequential(nn.Linear(128, 63)), ocsquant.SchemaMismatchError),
                "outputs": Wrong(nn.Sequential(MODEL[0], nn.Linear(64, 3)), ocsquant.SchemaMismatchError),
            },
            "tolerance": {"range": 2.0, "below": -1e-9, "nan": float("nan")},
        },
        {"inputs": "whatever the networks take; what they do not take, they refuse themselves"},
    ),
    "env": Case(ocsquant.env),
}
CASES |= OPERATOR_CASES | CONVOLUTION_CASES | RECURRENT_CASES | QAT_CASES
TOGETHER += QAT_TOGETHER
