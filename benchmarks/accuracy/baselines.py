"""Other people's methods as simulations in float, beside ours in the tables: AWQ, HQQ, Hadamard, LLM.int8(), DFQ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ocsquant.methods.clip import clip_range
from ocsquant.methods.grid import blocked, code_limit, quantize_weight

CLIPPED = 1 << 16  # values that choose a clip
TOKENS = 512  # of a layer's inputs that AWQ's search looks at
AWQ_STEPS = 20
HQQ_STEPS, HQQ_NORM, HQQ_BETA, HQQ_GROWTH = 20, 0.7, 10.0, 1.01  # as its authors set them
LLM_INT8_THRESHOLD = 6.0


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and module of every linear that the tables quantize: not of a head tied to an embedding."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and id(module.weight) not in embeddings:
            yield model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], module


def dequantized(w: Tensor, bits: int, options: dict[str, Any]) -> Tensor:
    return quantize_weight(w, bits, **options).dequantize()


@torch.no_grad()
def awq(model: nn.Module, bits: int, options: dict[str, Any], batches: Iterable[Any]) -> nn.Module:
    """Activation-aware scaling (arXiv 2306.00978): input channels times mean |x|^a, a by the error of the outputs."""
    inputs = layer_inputs(model, [module for _, _, module in linears(model)], batches)
    for _, _, module in linears(model):
        w, x = module.weight, inputs[id(module)]
        size = x.abs().mean(0).clamp(min=1e-4)

        def scaled(power: float, w: Tensor = w, size: Tensor = size) -> Tensor:
            s = size**power
            s = s / (s.max() * s.min()).sqrt()
            return dequantized(w * s, bits, options) / s

        def error(power: float, w: Tensor = w, x: Tensor = x, scaled: Callable[[float], Tensor] = scaled) -> float:
            return float((x @ (scaled(power) - w).T).square().sum())

        w.copy_(scaled(min((step / AWQ_STEPS for step in range(AWQ_STEPS)), key=error)))
    return model


def layer_inputs(model: nn.Module, modules: list[nn.Linear], batches: Iterable[Any]) -> dict[int, Tensor]:
    """Up to TOKENS inputs of each module, evenly out of all of its calls, by its id."""
    seen: dict[int, list[Tensor]] = {id(module): [] for module in modules}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[id(module)].append(args[0].detach().reshape(-1, args[0].shape[-1]))

    hooks = [module.register_forward_pre_hook(keep) for module in modules]
    for batch in batches:
        model(**batch) if isinstance(batch, dict) else model(batch)
    for hook in hooks:
        hook.remove()
    found = {key: torch.cat(parts) for key, parts in seen.items()}
    return {key: x[:: max(1, len(x) // TOKENS)][:TOKENS] for key, x in found.items()}


@torch.no_grad()
def hqq(model: nn.Module, bits: int, options: dict[str, Any]) -> nn.Module:
    """Half-quadratic quantization (Badri and Shaji 2023): real zero points that leave few large errors; no data."""
    weights = [module.weight for _, _, module in linears(model)]
    weights += [
        p for m in model.modules() if isinstance(m, nn.RNNBase) for n, p in m.named_parameters() if "weight" in n
    ]
    for w in weights:
        n, k = w.shape
        blocks = blocked(w, options.get("group_size", k) if options["granularity"] == "group" else k)
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        step = (high - low).clamp(min=1e-8) / (2**bits - 1)
        zero, beta = -low / step, HQQ_BETA

        def grid(zero: Tensor, blocks: Tensor = blocks, step: Tensor = step) -> Tensor:
            return (blocks / step + zero).round().clamp(0, 2**bits - 1)

        for _ in range(HQQ_STEPS):
            codes = grid(zero)
            error = blocks - (codes - zero) * step
            shrunk = (error.abs() - error.abs().clamp(min=1e-8) ** (HQQ_NORM - 1) / beta).clamp(min=0) * error.sign()
            zero = (codes - (blocks - shrunk) / step).mean(-1, keepdim=True)
            beta *= HQQ_GROWTH
        w.copy_(((grid(zero) - zero) * step).reshape(n, -1)[:, :k])
    return model


class Rotation(nn.Module):
    """x times a Hadamard matrix, in blocks of the largest power of two that divides its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.size = channels & -channels
        matrix = torch.ones(1, 1)
        while len(matrix) < self.size:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
        self.register_buffer("matrix", matrix / self.size**0.5)

    matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, self.size)) @ self.matrix).flatten(-2)


@torch.no_grad()
def rotated(model: nn.Module) -> nn.Module:
    """Every linear behind a rotation of its inputs (QuaRot, arXiv 2404.00456, with what is done at run time alone)."""
    for parent, name, module in linears(model):
        turn = Rotation(module.in_features)
        module.weight.copy_(turn(module.weight))
        setattr(parent, name, nn.Sequential(turn, module))
    return model


class LLMInt8(nn.Module):
    """LLM.int8() (arXiv 2208.07339): input channels with a value beyond 6 stay float, the rest is rounded per token."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        self.layer, self.bits = layer, bits
        self.register_buffer("rounded", dequantized(layer.weight.detach(), bits, {}))

    rounded: Tensor

    def forward(self, x: Tensor) -> Tensor:
        large = x.abs().reshape(-1, x.shape[-1]).amax(0) > LLM_INT8_THRESHOLD
        small = x.masked_fill(large, 0.0)
        step = small.abs().amax(-1, keepdim=True).clamp(min=1e-8) / code_limit(self.bits)
        y = F.linear((small / step).round() * step, self.rounded, self.layer.bias)
        return y + x[..., large] @ self.layer.weight[:, large].T


def llm_int8(model: nn.Module, bits: int) -> nn.Module:
    for parent, name, module in linears(model):
        setattr(parent, name, LLMInt8(module, bits))
    return model


def convolutions(model: nn.Sequential) -> list[tuple[int, nn.Conv2d]]:
    return [(i, module) for i, module in enumerate(model) if isinstance(module, nn.Conv2d)]


@torch.no_grad()
def equalized(model: nn.Sequential, skip: str) -> nn.Sequential:
    """Cross-layer equalization (Nagel et al. 2019, arXiv 1906.04721, eq. 11) of a chain of convolutions.

    BatchNorms are folded first. Between two convolutions lie only functions f with f(s x) = s f(x) for s > 0
    (LeakyReLU, max pooling), so that a channel's scale can move from one to the next until both have the same range.
    The layer named `skip` stays out: it is not quantized.
    """
    for i, module in convolutions(model):
        if i + 1 < len(model) and isinstance(model[i + 1], nn.BatchNorm2d):
            model[i], model[i + 1] = fuse_conv_bn_eval(module, model[i + 1]), nn.Identity()
    chain = [module for i, module in convolutions(model) if str(i) != skip]
    for first, second in pairwise(chain):
        own, next_ = first.weight.abs().amax((1, 2, 3)), second.weight.abs().amax((0, 2, 3))
        scale = torch.where((own > 0) & (next_ > 0), (own / next_).sqrt(), torch.ones_like(own))
        first.weight.div_(scale[:, None, None, None])
        assert first.bias is not None
        first.bias.div_(scale)
        second.weight.mul_(scale[:, None, None])
    return model


@torch.no_grad()
def bias_corrected(quantized: nn.Sequential, model: nn.Sequential, batches: Iterable[Tensor]) -> nn.Sequential:
    """Bias correction (the same paper, section 4.2) by calibration: each convolution's mean output becomes the float
    one's, layer by layer from the first on, so that what the layers before still shift is made up for too.
    """
    seen = torch.cat(list(batches))
    exact, own = seen, seen
    for i, module in enumerate(model):
        exact, own = module(exact), quantized[i](own)
        if isinstance(module, nn.Conv2d):
            shift = (exact.mean((0, 2, 3)) - own.mean((0, 2, 3)))[:, None, None]
            quantized[i] = nn.Sequential(quantized[i], Shift(shift))
            own = own + shift
    return quantized


class Shift(nn.Module):
    """x plus a constant for each channel."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)

    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def with_inputs(model: nn.Module, quantize: Callable[[Tensor], Tensor], skip: str = "") -> nn.Module:
    """Every linear of the tables, and every convolution but the one named `skip`, multiplies what `quantize` makes of
    its input [tokens or pixels, channels].
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        channel = 1 if isinstance(module, nn.Conv2d) else -1
        x = args[0].movedim(channel, -1)
        return (quantize(x.reshape(-1, x.shape[-1])).reshape(x.shape).movedim(-1, channel),)

    found = [module for _, _, module in linears(model)]
    found += [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name != skip]
    for module in found:
        module.register_forward_pre_hook(hook)
    return model


def in_range(x: Tensor, bits: int, clip: str = "none") -> Tensor:
    """Rounded to 2^bits levels between the least and the largest of these values, 0 among them; with clip "mse" between
    the ends that leave the least squared error of some of them.
    """
    low, high = x.min().clamp(max=0.0), x.max().clamp(min=0.0)
    some = x.reshape(-1)[:: max(1, x.numel() // CLIPPED)]
    low, high = (
        end.reshape(()) for end in clip_range(some[None, None], low[None, None], high[None, None], bits, clip, None)
    )
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return ((x / step).round() - (low / step).round()).clamp(0, 2**bits - 1) * step + (low / step).round() * step


def channel_parts(bits: int, parts: int) -> Callable[[Tensor], Tensor]:
    """SplitQuant's activation layers (arXiv 2501.12428): neighbouring channels in equal parts, each with a range."""
    return lambda x: torch.cat([in_range(part, bits) for part in x.tensor_split(parts, 1)], 1)


def oracle_ocs(bits: int, ratio: float, symmetric: bool = True) -> Callable[[Tensor], Tensor]:
    """Activation OCS (arXiv 1901.09504) that knows the batch: its largest channels are halved, one step for all.

    A channel's two copies hold a half each, so that its sum lies on a grid of twice the range. symmetric: codes from
    -Q to Q; else 2^bits codes between the ends that the copies need.
    """

    def quantize(x: Tensor) -> Tensor:
        largest = x.abs().amax(0)
        copies = torch.ones_like(largest)
        for _ in range(math.ceil(ratio * x.shape[1])):
            copies[(largest / copies).argmax()] += 1
        if symmetric:
            step = (largest / copies).max() / code_limit(bits)
        else:
            high, low = (x.amax(0) / copies).max().clamp(min=0.0), (x.amin(0) / copies).min().clamp(max=0.0)
            step = (high - low) / (2**bits - 1)
        return (x / step.clamp(min=1e-12)).round() * step

    return quantize
