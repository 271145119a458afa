"""Quantize and dequantize in one pass, for training: weights with split channels, activations between learned clips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocsquant.ops.library import check_devices, check_flag, check_once, compiled, wants_gradient

_fake_quantize_split = compiled.fake_quantize_split.default
_fake_quantize_clip = compiled.fake_quantize_clip.default
_fake_quantize_clip_backward = compiled.fake_quantize_clip_backward.default


def fake_quantize_split(x: Tensor, scale: Tensor, splits: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize a weight whose input channel c is split in splits[c] copies (quantization-aware OCS).

    y = clamp(rint(x / s), -n_c Q, n_c Q) * s with Q = 2^(bits - 1) - 1, computed with 1/s in float32. NaN passes
    through. Gradients are straight-through: dx is the incoming gradient g inside the range and 0 outside; the scale's
    is the sum of g * (rint(x/s) - x/s) inside and +-n_c Q g outside (LSQ, arXiv 1902.08153, without its optional
    factor).

    Args:
        x: float32 or bfloat16 [n, channels, ...]: a linear or convolution weight.
        scale: float32, a scalar or [n], positive.
        splits: int32 [channels], at least 1.
        bits: 2..8.
    """
    return _fake_quantize_split(x, scale, splits, bits)


class _FakeQuantizeClip(torch.autograd.Function):
    """Recording this costs a third of what a registered autograd formula costs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_neg: Tensor, clip_pos: Tensor, bits: int, align_zero: bool) -> Tensor:
        ctx.save_for_backward(x, clip_neg, clip_pos)
        ctx.bits, ctx.align_zero = bits, align_zero
        return _fake_quantize_clip(x, clip_neg, clip_pos, bits, align_zero)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_once("fake_quantize_clip")
        dx, dneg, dpos = _fake_quantize_clip_backward(grads[0], *ctx.saved_tensors, ctx.bits, ctx.align_zero)
        return dx, dneg, dpos, None, None


def fake_quantize_clip(x: Tensor, clip_neg: Tensor, clip_pos: Tensor, bits: int, align_zero: bool = False) -> Tensor:
    """Quantize and dequantize activations between two learned clips (Nrusimha et al. 2024, arXiv 2404.03605).

    With n = 2^bits - 1 and S = n / (c+ - c-): y = rint(S (clamp(x, c-, c+) - c-)) / S + c-, in float32. Gradients are
    straight-through, with e = (z - rint(z)) / n, z = S (x - c-): dx = g inside the clips, 0 at or beyond them; dc+ is
    the sum of g at or above c+ less the sum of e g inside, dc- the sum of g at or below c- plus the sum of e g inside.

    Args:
        x: float32 or bfloat16, any shape. NaN passes through; +-Inf is clipped.
        clip_neg, clip_pos: float32 or bfloat16, one entry each. Where c+ - c- is less than 1e-6 of the larger one's
            magnitude (or 1e-12), c+ is taken to be that much above c-; the gradients stay as above.
        bits: 2..8.
        align_zero: move the grid by less than a step, so that 0, where the clips enclose it, is a level; the paper's
            does not.
    """
    check_flag("fake_quantize_clip", "align_zero", align_zero)
    if wants_gradient(x) or wants_gradient(clip_neg) or wants_gradient(clip_pos):
        return _FakeQuantizeClip.apply(x, clip_neg, clip_pos, bits, align_zero)
    return _fake_quantize_clip(x, clip_neg, clip_pos, bits, align_zero)


@torch.library.register_fake("ocsquant::fake_quantize_split")
def _(x: Tensor, scale: Tensor, splits: Tensor, bits: int) -> Tensor:
    check_devices("fake_quantize_split", x=x, scale=scale, splits=splits)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("ocsquant::fake_quantize_split_backward")
def _(grad: Tensor, x: Tensor, scale: Tensor, splits: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    check_devices("fake_quantize_split_backward", grad=grad, x=x, scale=scale, splits=splits)
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(scale)


def _fake_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, splits, ctx.bits = inputs
    ctx.save_for_backward(x, scale, splits)


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, splits = ctx.saved_tensors
    dx, dscale = compiled.fake_quantize_split_backward(grad, x, scale, splits, ctx.bits)
    return dx, dscale, None, None


torch.library.register_autograd(
    "ocsquant::fake_quantize_split", _fake_quantize_backward, setup_context=_fake_quantize_setup
)


@torch.library.register_fake("ocsquant::fake_quantize_clip")
def _(x: Tensor, clip_neg: Tensor, clip_pos: Tensor, bits: int, align_zero: bool = False) -> Tensor:
    check_devices("fake_quantize_clip", x=x, clip_neg=clip_neg, clip_pos=clip_pos)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("ocsquant::fake_quantize_clip_backward")
def _(
    grad: Tensor, x: Tensor, clip_neg: Tensor, clip_pos: Tensor, bits: int, align_zero: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("fake_quantize_clip_backward", grad=grad, x=x, clip_neg=clip_neg, clip_pos=clip_pos)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(clip_neg, dtype=torch.float32), torch.empty_like(clip_pos, dtype=torch.float32)
