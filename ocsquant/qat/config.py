"""What a user asks of quantization-aware training."""

from __future__ import annotations

from dataclasses import dataclass

from ocsquant.config import OCS, check_choice, check_number, check_patterns, check_type
from ocsquant.errors import ArgumentError, ArgumentTypeError

CLIP_INITS = ("mse", "percentile", "max")
FOLDS = ("none", "channel")
SKIP = ("lm_head",)


@dataclass(frozen=True)
class Config:
    """Activation regularisation (Nrusimha et al. 2024, arXiv 2404.03605) of a model's linear layers, in training.

    Args:
        activation_bits: 2..8, of each layer's input; static, between two learned clips. None: inputs stay float.
        weight_bits: 2..8 to train the weights through their own rounding too (one step per output, the largest weight
            at the last code, straight-through gradients); None: they are rounded afterwards, by `convert`.
        weight_group_size: 8..131072 inputs that share a step of an output's weights; None: all of them.
        split: an `OCS(expand_ratio)`: the input channels with the largest weights get codes as wide as their copies
            would have together (with weight_bits, without weight_group_size).
        clip_init: "mse" (least squared error on 128 tokens of the calibration data), "percentile" (their 0.1 and 99.9
            percentiles), "max" (the range of all), or a number c for +-c, which needs no data.
        kurtosis_weight: 0..1e6, the penalty's factor, quoted for 64 outputs: a layer of d outputs adds kurtosis_weight
            * d / 64 * mean over tokens of max(K - kurtosis_target, 0), K the kurtosis of a token's outputs. 0: none.
        kurtosis_target: 0..1e6; 3 leaves what is no heavier than a Gaussian alone, 0 is the paper's penalty, whose
            minimum is at K = 1.
        kurtosis_on: patterns of the layers that are penalized. Nothing may change their output in place, as
            nn.ReLU(inplace=True) does: backward needs it, and torch refuses.
        skip: patterns of layers left alone. Patterns are those of `Recipe`.
        align_zero: keep 0, where it lies between the clips, a level of every input's grid.
        fold: "channel" divides input channels that calibration shows to be large by a power of two first and
            multiplies their weights by it, which changes no output (not where two layers share a weight); "none".
    """

    activation_bits: int | None = 4
    weight_bits: int | None = None
    weight_group_size: int | None = None
    split: OCS | None = None
    clip_init: str | float = "mse"
    kurtosis_weight: float = 1e-3
    kurtosis_target: float = 3.0
    kurtosis_on: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = SKIP
    align_zero: bool = False
    fold: str = "none"

    def __post_init__(self) -> None:
        if self.activation_bits is not None:
            check_number("activation_bits", self.activation_bits, 2, 8, whole=True)
        if self.weight_bits is not None:
            check_number("weight_bits", self.weight_bits, 2, 8, whole=True)
        elif self.activation_bits is None:
            raise ArgumentError("activation_bits", "2..8 unless weight_bits is given", None)
        if self.weight_group_size is not None:
            check_number("weight_group_size", self.weight_group_size, 8, 131072, whole=True)
            if self.weight_bits is None:
                raise ArgumentError("weight_group_size", "None without weight_bits", self.weight_group_size)
        self._check_split()
        if isinstance(self.clip_init, str):
            check_choice("clip_init", self.clip_init, CLIP_INITS)
        elif isinstance(self.clip_init, bool) or not isinstance(self.clip_init, (int, float)):
            raise ArgumentTypeError("clip_init", f"a number or one of {', '.join(CLIP_INITS)}", repr(self.clip_init))
        elif not 1e-6 <= self.clip_init <= 1e6:
            raise ArgumentError("clip_init", "a number 1e-6..1e6", self.clip_init)
        check_number("kurtosis_weight", self.kurtosis_weight, 0.0, 1e6)
        check_number("kurtosis_target", self.kurtosis_target, 0.0, 1e6)
        object.__setattr__(self, "kurtosis_on", check_patterns("kurtosis_on", self.kurtosis_on))
        object.__setattr__(self, "skip", check_patterns("skip", self.skip))
        check_type("align_zero", self.align_zero, bool, "True or False")
        check_choice("fold", self.fold, FOLDS)
        if self.fold != "none" and self.activation_bits is None:
            raise ArgumentError("fold", "'none' without activation_bits", self.fold)

    def _check_split(self) -> None:
        if self.split is None:
            return
        check_type("split", self.split, OCS, "an ocsquant.OCS or None")
        s = self.split
        if self.weight_bits is None or self.weight_group_size is not None:
            raise ArgumentError("split", "None without weight_bits, or with weight_group_size", s)
        if not s.quantization_aware or s.max_overhead is not None:
            raise ArgumentError("split", "a quantization-aware OCS with an expand_ratio", s)

    @property
    def needs_calibration(self) -> bool:
        return (self.activation_bits is not None and isinstance(self.clip_init, str)) or self.fold != "none"
