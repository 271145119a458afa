"""What a user asks for: frozen, validated, and the same after a round trip through JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ocsquant.errors import ArgumentError, ArgumentTypeError

CLIPS = ("none", "mse", "output", "aciq", "kl")
ROUNDINGS = ("auto", "nearest", "squant", "gptq")
CODEBOOKS = ("kmeans", "nf4")
LARGEST_CODEBOOK = 64  # entries
GRANULARITIES = ("channel", "tensor", "group")
INPUT_SCALES = ("token", "tensor", "channel")


def check_number(arg: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ArgumentTypeError(arg, f"{kind} {low}..{high}", repr(value))
    if not low <= value <= high:
        raise ArgumentError(arg, f"{kind} {low}..{high}", value)


def check_choice(arg: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise ArgumentTypeError(arg, "one of " + ", ".join(choices), repr(value))
    if value not in choices:
        raise ArgumentError(arg, "one of " + ", ".join(choices), repr(value))


def check_type(arg: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kind):
        raise ArgumentTypeError(arg, expected, repr(value))


@dataclass(frozen=True)
class OCS:
    """Outlier channel splitting of weights (Zhao et al. 2019, arXiv 1901.09504).

    Args:
        expand_ratio: splits per layer as a share of its input channels, 0..1; ceil(expand_ratio * channels) are made.
        max_overhead: instead, one budget for the whole model: added bytes over weight bytes, 0..1; the channels with
            the largest error gain per byte are split, whatever their layer.
        shares: "equal" gives n copies 1/n each, "halving" halves the largest copy as the paper does.
        quantization_aware: split w into (w - step/2)/2 and (w + step/2)/2, so that the copies' codes add up to w's own.
            False is the paper's naive split into equal values, for its tables.
        select: "max" splits the channel with the largest copy, as the paper does; "gain" the one whose split lowers the
            layer's squared error most.
    """

    expand_ratio: float = 0.0
    max_overhead: float | None = None
    shares: str = "equal"
    quantization_aware: bool = True
    select: str = "max"

    def __post_init__(self) -> None:
        check_number("expand_ratio", self.expand_ratio, 0.0, 1.0)
        if self.max_overhead is not None:
            check_number("max_overhead", self.max_overhead, 0.0, 1.0)
            if self.expand_ratio:
                raise ArgumentError("max_overhead", "None where expand_ratio is given", self.max_overhead)
        check_choice("shares", self.shares, ("equal", "halving"))
        check_type("quantization_aware", self.quantization_aware, bool, "True or False")
        check_choice("select", self.select, ("max", "gain"))


@dataclass(frozen=True)
class SplitQuant:
    """Weights cut by value in parts with a grid of their own each (SplitQuant, arXiv 2501.12428), as one codebook.

    A weight is one of parts * 2^bits levels, which are int8 multiples of its row's scale: one integer product, equal to
    the paper's sum of one layer per part. A code takes 4 bits at 2 bits in three parts, 6 at 4.

    Args:
        parts: 2..4; parts * 2^bits is at most 64.
        clusters: the boundaries are found over the "layer" (as the paper does for linear layers) or for each "row", an
            output (as it does for convolutions); over weights divided by the scale that `Weights.granularity` gives.
        ranges: each part's grid spans what the "layer" holds of it, or what each "row" holds. Rows that have clusters
            of their own have ranges of their own.
        boundaries: "kmeans" (the paper's), or "optimal": the three parts of least squared error (slower: seconds for a
            million weights of a layer, and for a thousand rows).
    """

    parts: int = 3
    clusters: str = "layer"
    ranges: str = "layer"
    boundaries: str = "kmeans"

    def __post_init__(self) -> None:
        check_number("parts", self.parts, 2, 4, whole=True)
        check_choice("clusters", self.clusters, ("layer", "row"))
        check_choice("ranges", self.ranges, ("layer", "row"))
        check_choice("boundaries", self.boundaries, ("kmeans", "optimal"))
        if self.clusters == "row" and self.ranges == "layer":
            raise ArgumentError("ranges", "'row' where clusters is 'row'", self.ranges)
        if self.boundaries == "optimal" and self.parts != 3:
            raise ArgumentError("boundaries", "'kmeans' for other than 3 parts", self.boundaries)


@dataclass(frozen=True)
class Weights:
    """How weights are quantized.

    Args:
        bits: 2..8, or None to split channels without rounding (float arithmetic, for `verify_equivalence`).
        granularity: one scale per "channel" (output), per "tensor", or per "group" of `group_size` inputs of an output.
        group_size: 8..131072 input channels; in a convolution with integer activations columns of
            [height][width][depth][channels], in other weights neighbours in memory.
        symmetric: codes in -Q..Q around zero; False uses a zero point and all 2^bits codes (per channel or group).
        clip: "none" (largest magnitude), "mse" (least squared error of the weights), "output" (least squared error of
            the outputs, channels weighed by the second moments of their inputs: needs calibration), "aciq" (arXiv
            1810.05723) or "kl" (TensorRT's).
        rounding: "nearest"; "squant" (arXiv 2202.07471): without data, errors cancel over each kernel and output (with
            several groups of scales and integer activations over those alone); "auto": "squant" for convolutions in
            two and three dimensions, whose inputs are alike from pixel to pixel, where the grid is uniform, "nearest"
            for the rest; or "gptq" (arXiv 2210.17323): each column makes up for the errors of those before it, on the
            same grid; needs calibration by batches, which are run again for every 128 MiB of Hessians.
        split: an `OCS`, a `SplitQuant`, or None.
        codebook: None, or 2^bits levels per layer under the scales: "kmeans" (2..6 bits; clip "output" weighs the
            channels) or "nf4" (4 bits; arXiv 2305.14314). Levels are int8 multiples of the scale.
    """

    bits: int | None = 8
    granularity: str = "channel"
    group_size: int = 128
    symmetric: bool = True
    clip: str = "none"
    rounding: str = "auto"
    split: OCS | SplitQuant | None = None
    codebook: str | None = None

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_number("bits", self.bits, 2, 8, whole=True)
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_number("group_size", self.group_size, 8, 131072, whole=True)
        check_type("symmetric", self.symmetric, bool, "True or False")
        check_choice("clip", self.clip, CLIPS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        if self.split is not None:
            check_type("split", self.split, (OCS, SplitQuant), "an ocsquant.OCS, an ocsquant.SplitQuant or None")
        if self.codebook is not None:
            check_choice("codebook", self.codebook, CODEBOOKS)
        plain = isinstance(self.split, OCS) and self.rounding in ("auto", "nearest") and self.codebook is None
        if self.bits is None and not plain:
            raise ArgumentError("bits", "2..8 unless channels are only split, by an OCS", None)
        if self.by_levels:
            self._check_levels()
        if not self.symmetric:
            if self.split is not None or self.by_levels or self.granularity == "tensor":
                raise ArgumentError("symmetric", "True with split, codebook or one scale per tensor", False)
            if self.clip in ("aciq", "kl"):
                raise ArgumentError("clip", "'none', 'mse' or 'output' where symmetric is False", self.clip)
        naive = self.ocs is not None and not self.ocs.quantization_aware
        if naive and self.rounding not in ("auto", "nearest"):
            raise ArgumentError("rounding", "'auto' or 'nearest' for naive splits", self.rounding)
        if self.by_levels and self.rounding == "squant":
            raise ArgumentError("rounding", "'auto', 'nearest' or 'gptq' with levels", self.rounding)

    @property
    def by_levels(self) -> bool:
        """Whether a code is the index of a level instead of a multiple of the scale."""
        return self.codebook is not None or isinstance(self.split, SplitQuant)

    def rounded_by(self, image: bool) -> str:
        """What `rounding` is for a layer; image: a convolution in two or three dimensions."""
        if self.rounding != "auto":
            return self.rounding
        uniform = not self.by_levels and (self.ocs is None or self.ocs.quantization_aware)
        return "squant" if image and uniform else "nearest"

    @property
    def ocs(self) -> OCS | None:
        """The channel splitting asked for."""
        return self.split if isinstance(self.split, OCS) else None

    def _check_levels(self) -> None:
        assert self.bits is not None
        if self.codebook is not None and self.split is not None:
            raise ArgumentError("split", "None with a codebook", self.split)
        if self.codebook == "nf4" and self.bits != 4:
            raise ArgumentError("bits", "4 for the codebook 'nf4'", self.bits)
        levels = 2**self.bits * (self.split.parts if isinstance(self.split, SplitQuant) else 1)
        if levels > LARGEST_CODEBOOK:
            raise ArgumentError(
                "bits", f"so few that there are at most {LARGEST_CODEBOOK} levels, not {levels}", self.bits
            )
        if isinstance(self.split, SplitQuant) and self.granularity == "group":
            raise ArgumentError("granularity", "'channel' or 'tensor' with a SplitQuant", self.granularity)
        if self.clip != "none" and (self.clip != "output" or self.codebook != "kmeans"):
            raise ArgumentError("clip", "'none' with levels ('output' for the codebook 'kmeans')", self.clip)


@dataclass(frozen=True)
class Activations:
    """How the inputs of a layer are quantized; `PerToken`, `PerTensorStatic`, `PerChannelStatic` name the usual ways.

    Args:
        bits: 2..8.
        max_outliers: 0..64 values of a token that may keep codes beyond the range; 0 is plain quantization.
        outlier_threshold: 2..1e6 root mean squares of the token, the largest value inside the range ("token" only).
        scale: one step per "token", found as it runs; or fixed by calibration, per "tensor" or per input "channel", the
            latter folded into the weights (OutlierTune, arXiv 2406.18832).
        smooth_alpha: 0..1, divide input channels by max|x|^alpha / max|w|^(1 - alpha) and multiply the weights
            (SmoothQuant, arXiv 2211.10438) before scaling; None: not for "token" and "tensor"; "channel" is alpha = 1.
        shift: move the middle of each channel's calibrated range to zero (symmetrization of OutlierTune, the shift of
            Outlier Suppression+, arXiv 2304.09145).
        split: an `OCS(expand_ratio, quantization_aware=False)`: channels that calibration shows to hold outliers are
            split in n copies of x / n, fixed in advance (activation OCS, arXiv 1901.09504, section 3.4); a tail column
            of the weight stands for the copies. select "max" takes those with the most values above the layer's 99th
            percentile, as the paper does; "gain" as many as lower the predicted output error. For "token" and "tensor"
            without smooth_alpha; splitting quantization-aware is what max_outliers does, as the layer runs.
        symmetric: False lets the range of "tensor" lie anywhere, with 0 on its grid and all 2^bits codes, for inputs of
            one sign; with max_outliers 0 and nothing else.
    """

    bits: int = 8
    max_outliers: int = 16
    outlier_threshold: float = 4.0
    scale: str = "token"
    smooth_alpha: float | None = None
    shift: bool = False
    split: OCS | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_number("bits", self.bits, 2, 8, whole=True)
        check_number("max_outliers", self.max_outliers, 0, 64, whole=True)
        check_number("outlier_threshold", self.outlier_threshold, 2.0, 1e6)
        check_choice("scale", self.scale, INPUT_SCALES)
        if self.smooth_alpha is not None:
            check_number("smooth_alpha", self.smooth_alpha, 0.0, 1.0)
        check_type("shift", self.shift, bool, "True or False")
        if self.split is not None:
            check_type("split", self.split, OCS, "an ocsquant.OCS or None")
            s = self.split
            if s.quantization_aware or s.shares != "equal" or s.max_overhead is not None:
                expected = "an OCS with quantization_aware=False, equal shares and an expand_ratio, for activations"
                raise ArgumentError("split", expected, s)
            if self.scale == "channel" or self.smooth_alpha is not None:
                raise ArgumentError("split", "None where channels have scales of their own", s)
        check_type("symmetric", self.symmetric, bool, "True or False")
        plain = self.scale == "tensor" and self.max_outliers == 0 and self.smooth_alpha is None and self.split is None
        if not self.symmetric and (self.shift or not plain):
            raise ArgumentError("symmetric", "True unless scale is 'tensor' and nothing else is asked for", False)

    @property
    def needs_calibration(self) -> bool:
        return self.scale != "token" or self.smooth_alpha is not None or self.shift or self.split is not None


def PerToken(bits: int = 8, max_outliers: int = 16, outlier_threshold: float = 4.0) -> Activations:
    """Dynamic per-token activations with run-time outlier splitting; `max_outliers=0` switches the splitting off."""
    return Activations(bits, max_outliers, outlier_threshold)


def PerTensorStatic(bits: int = 8, max_outliers: int = 0, symmetric: bool = True) -> Activations:
    """One calibrated scale for a layer's input; up to `max_outliers` values a token beyond it are split, not clipped.

    Args: as of `Activations`.
    """
    return Activations(bits, max_outliers, scale="tensor", symmetric=symmetric)


def PerChannelStatic(
    bits: int = 8, max_outliers: int = 0, smooth_alpha: float | None = None, shift: bool = True
) -> Activations:
    """OutlierTune: calibrated scales per input channel folded into the weights, and symmetrization.

    Where calibration shows a smaller output error per token (with the same bits and `max_outliers`), that is used.
    """
    return Activations(bits, max_outliers, scale="channel", smooth_alpha=smooth_alpha, shift=shift)


def _frozen_overrides(overrides: Any) -> dict[str, Recipe]:
    check_type("overrides", overrides, Mapping, "a mapping from patterns to recipes or scheme names")
    for pattern in overrides:
        check_type("overrides", pattern, str, "a mapping whose keys are patterns")
    recipes = {pattern: as_recipe(value, f"overrides[{pattern!r}]") for pattern, value in overrides.items()}
    for pattern, recipe in recipes.items():
        if recipe.ignore or recipe.overrides:
            raise ArgumentError(f"overrides[{pattern!r}]", "a recipe without ignore and overrides of its own", recipe)
    return recipes


@dataclass(frozen=True)
class Recipe:
    """A whole request: weights, activations (None: float activations), and which layers differ.

    Args:
        weights: a `Weights`.
        activations: an `Activations` (see `PerToken`), or None for weight-only quantization.
        overrides: pattern -> Recipe or scheme name, the first match counts. Patterns are globs over module paths
            ("*.down_proj"), or regular expressions after "re:".
        ignore: patterns of modules to leave alone.
    """

    weights: Weights = field(default_factory=Weights)
    activations: Activations | None = field(default_factory=Activations)
    overrides: Mapping[str, Any] | None = None
    ignore: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_type("weights", self.weights, Weights, "an ocsquant.Weights")
        if self.activations is not None:
            check_type("activations", self.activations, Activations, "an ocsquant.Activations or None")
            even = self.weights.symmetric and self.weights.split is None and not self.weights.by_levels
            if self.activations.split is not None and not even:
                expected = "without split where weights are split, asymmetric or levels"
                raise ArgumentError("activations", expected, self.activations)
        if self.overrides is not None:
            object.__setattr__(self, "overrides", _frozen_overrides(self.overrides))
        if self.ignore is not None:
            object.__setattr__(self, "ignore", check_patterns("ignore", self.ignore))

    def to_json(self) -> str:
        """JSON text that `Recipe.from_json` turns back into an equal recipe."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe of `to_json`'s text. Raises ArgumentError for anything else."""
        check_type("text", text, str, "JSON text")
        try:
            return _recipe_from_dict(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArgumentError("text", "JSON written by Recipe.to_json", f"{error}") from error


def activations_from_dict(data: dict[str, Any]) -> Activations:
    """The inverse of dataclasses.asdict."""
    split = data["split"]
    return Activations(**{**data, "split": None if split is None else OCS(**split)})


def _recipe_from_dict(data: dict[str, Any]) -> Recipe:
    weights = {**data["weights"]}  # unlike dict(), a TypeError for anything but a mapping
    if weights.get("split") is not None:
        weights["split"] = (SplitQuant if "parts" in weights["split"] else OCS)(**weights["split"])
    activations = data["activations"]
    overrides = data["overrides"]
    parts = {
        "weights": Weights(**weights),
        "activations": None if activations is None else activations_from_dict(activations),
        "overrides": None if overrides is None else {k: _recipe_from_dict(v) for k, v in overrides.items()},
    }
    return Recipe(**{**data, **parts})  # an unknown entry is a TypeError here


def check_patterns(arg: str, patterns: Any) -> tuple[str, ...]:
    if isinstance(patterns, str) or not isinstance(patterns, (list, tuple)):
        raise ArgumentTypeError(arg, "a list of patterns", repr(patterns))
    for pattern in patterns:
        check_type(arg, pattern, str, "a list of patterns")
    return tuple(patterns)


SCHEMES: dict[str, Recipe] = {
    "W8A8": Recipe(),
    "W8A16": Recipe(Weights(bits=8), None),
    "W4A8": Recipe(Weights(bits=4, granularity="group", group_size=128, symmetric=False)),
    "W4A16": Recipe(Weights(bits=4, granularity="group", group_size=128, symmetric=False), None),
    "W3A16": Recipe(Weights(bits=3, granularity="group", group_size=64, symmetric=False), None),
    "W2A8": Recipe(Weights(bits=2, split=SplitQuant())),
    "W2A16": Recipe(Weights(bits=2, split=SplitQuant()), None),
}


def as_recipe(value: Any, arg: str) -> Recipe:
    """A recipe from itself, from a scheme's name, or (None) the default W8A8."""
    if value is None:
        return SCHEMES["W8A8"]
    if isinstance(value, Recipe):
        return value
    if not isinstance(value, str):
        raise ArgumentTypeError(arg, "a Recipe or one of " + ", ".join(SCHEMES), repr(value))
    if value not in SCHEMES:
        raise ArgumentError(arg, "a Recipe or one of " + ", ".join(SCHEMES), repr(value))
    return SCHEMES[value]
