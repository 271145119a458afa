"""A linear layer in quantization-aware training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ocsquant.config import Weights, check_type
from ocsquant.errors import ArgumentError
from ocsquant.methods.grid import blocked, code_limit, quantize_weight, usable_scale
from ocsquant.methods.learned_clips import ClippedInput
from ocsquant.nn.quantized import keeping_dtype
from ocsquant.ops import fake_quantize_clip, fake_quantize_split
from ocsquant.qat.config import Config
from ocsquant.qat.penalty import Penalty

Self = TypeVar("Self", bound="QATLinear")


def _widened(x: Tensor) -> Tensor:
    """In a dtype that the operators take."""
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


class QATLinear(nn.Linear):
    """nn.Linear whose input passes a grid between learned clips, and whose output the kurtosis penalty can see.

    Made by `ocsquant.qat.prepare`; `weight` and `bias` are those of the layer it was. Besides them: `clip_neg` and
    `clip_pos`, float32 [1], parameters; `input_inverse`, float32 [in_features] or None, powers of two that the input
    is multiplied by; `splits`, int32 [in_features] or None, how wide each input channel's weight codes are. No dtype
    conversion touches these. `log`, float64 [3], is what this process's backward saw: the sum of K, tokens, calls.
    """

    quantized_as = "linear"
    clip_neg: nn.Parameter | None
    clip_pos: nn.Parameter | None
    input_inverse: Tensor | None
    splits: Tensor | None
    log: Tensor

    def __init__(self, layer: nn.Linear, config: Config, penalty: Penalty | None) -> None:
        # All that the layer has, what its user gave it included; only the tables that get more entries are copies.
        self.__dict__.update(layer.__dict__)
        for table in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = layer.__dict__[table].copy()
        self.config, self.penalty = config, penalty
        for name in ("clip_neg", "clip_pos"):
            clip = None if config.activation_bits is None else nn.Parameter(torch.zeros(1, dtype=torch.float32))
            self.register_parameter(name, clip)
        self.register_buffer("input_inverse", None)
        self.register_buffer("splits", None)
        # No buffer: DDP would overwrite it with that of the first process.
        self.log = torch.zeros(3, dtype=torch.float64, device="cpu")

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            clipped, weights = self.clipped_input(), self.trained_weights
            if clipped is not None and weights is not None:
                return self._evaluated(input, clipped, weights)
        y = F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)
        if self.penalty is not None and self.training and torch.is_grad_enabled() and y.requires_grad:
            y = self.penalty.apply(self, _widened(y), self.config.kurtosis_target, self.log).to(y.dtype)
        return y

    def _evaluated(self, input: Tensor, clipped: ClippedInput, weights: Weights) -> Tensor:
        """The output of what `convert` makes of this layer, bit for bit."""
        bits, size = weights.bits, weights.group_size
        assert bits is not None
        quantized = quantize_weight(self.weight.float(), bits, weights.granularity, size, ranges=self.splits)
        form = (quantized.integers(), quantized.scale, quantized.group_size, clipped.offset(quantized))
        flat, bias = input.reshape(-1, input.shape[-1]).float(), None if self.bias is None else self.bias.float()
        return clipped.product(flat, *form, bias).reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def quantized_input(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with."""
        if self.input_inverse is not None:
            x = x * self.input_inverse.to(x.dtype)
        if self.clip_neg is None or self.clip_pos is None or self.config.activation_bits is None:
            return x
        bits, align_zero = self.config.activation_bits, self.config.align_zero
        return fake_quantize_clip(_widened(x), self.clip_neg, self.clip_pos, bits, align_zero).to(x.dtype)

    def quantized_weight(self) -> Tensor:
        """The weight, or what its codes stand for where it is trained through its rounding."""
        bits, w = self.config.weight_bits, self.weight
        if bits is None:
            return w
        size = self.config.weight_group_size or self.in_features
        rows = w if size >= self.in_features else blocked(w, size).flatten(0, 1)
        splits = self.splits
        if splits is None:
            splits = torch.ones(rows.shape[1], dtype=torch.int32, device=w.device)
        with torch.no_grad():
            scale = usable_scale((rows.float().abs() / splits).amax(1) / code_limit(bits))
        rows = fake_quantize_split(_widened(rows), scale, splits, bits).to(w.dtype)
        return rows if rows.shape == w.shape else rows.reshape(w.shape[0], -1)[:, : self.in_features]

    def clipped_input(self) -> ClippedInput | None:
        """The grid of the input between its clips as they are now."""
        bits, low, high = self.config.activation_bits, self.clip_neg, self.clip_pos
        if bits is None or low is None or high is None:
            return None
        return ClippedInput.between(low, high, bits, self.config.align_zero, self.input_inverse)

    @property
    def trained_weights(self) -> Weights | None:
        """How `convert` must round the weights to get what training saw; `splits` widens their channels."""
        c = self.config
        if c.weight_bits is None:
            return None
        if c.weight_group_size is None:
            return Weights(bits=c.weight_bits)
        return Weights(bits=c.weight_bits, granularity="group", group_size=c.weight_group_size)

    def extra_repr(self) -> str:
        c = self.config
        return f"{super().extra_repr()}, activation_bits={c.activation_bits}, weight_bits={c.weight_bits}"

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        own = [self.clip_neg, self.clip_pos, self.input_inverse, self.splits]
        kept = {id(t) for t in own if t is not None} | {id(t.grad) for t in own[:2] if t is not None}
        keep = keeping_dtype(fn)
        return super()._apply(lambda t: keep(t) if id(t) in kept else fn(t), recurse)


def prepared_layers(model: nn.Module) -> dict[str, QATLinear]:
    """By their paths. Raises ArgumentError for a model that holds none."""
    check_type("model", model, nn.Module, "a torch.nn.Module")
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QATLinear)}
    if not layers:
        raise ArgumentError("model", "a model of ocsquant.qat.prepare", type(model).__name__)
    return layers
