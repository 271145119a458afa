"""What quantization-aware training adds to a training step of a small language model: forward, loss, backward, AdamW.

A4: 4-bit inputs between learned clips. K: the kurtosis penalty too. Beside them the same in plain PyTorch operators,
and (--compile) under torch.compile. Ratios to the fp32 step of the same visit, in this process, with its allocator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import measure
from benchmarks.measure import Call
from benchmarks.networks import Llama
from ocsquant import qat

# width, hidden, layers, heads, batch, length
SHAPES = {
    64: (172, 5, 8, 16, 128),
    288: (768, 3, 6, 8, 128),
    768: (2048, 2, 12, 4, 128),
    2048: (5504, 1, 16, 2, 128),
}


class EagerClip(torch.autograd.Function):
    """The input's rounding as PyTorch operators write it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        step = (high - low) / 15
        ctx.save_for_backward(x, low, high)
        return torch.round((torch.minimum(torch.maximum(x, low), high) - low) / step) * step + low

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, low, high = ctx.saved_tensors
        (g,) = grads
        under, over = x <= low, x >= high
        inside = ~(under | over)
        place = (torch.minimum(torch.maximum(x, low), high) - low) * (15 / (high - low))
        error = (g * (place - torch.round(place)) / 15 * inside).sum()
        return g * inside, ((g * under).sum() + error)[None], ((g * over).sum() - error)[None]


class EagerLinear(nn.Linear):
    """The same layer as QATLinear, in PyTorch operators; its output's kurtosis is left in `penalty`."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.low, self.high = (nn.Parameter(torch.tensor([c])) for c in (-3.0, 3.0))

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(EagerClip.apply(input, self.low, self.high), self.weight, self.bias)
        z = y - y.mean(-1, keepdim=True)
        z2 = z.square()
        k = z2.square().mean(-1) / z2.mean(-1).square()
        self.penalty = 1e-3 * y.shape[-1] / 64 * (k - 3).clamp(min=0).mean()
        return y


def with_eager_layers(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        for name, child in block.named_children():
            if isinstance(child, nn.Linear):
                setattr(block, name, EagerLinear(child))
    return model


def eager_penalty(model: nn.Module, loss: Tensor) -> Tensor:
    return loss + torch.stack([m.penalty for m in model.modules() if isinstance(m, EagerLinear)]).sum()


def no_penalty(model: nn.Module, loss: Tensor) -> Tensor:
    return loss


def arms(float_model: nn.Module) -> dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]]:
    """A model for each row, and what its loss passes through."""

    def prepared(weight: float) -> nn.Module:
        config = qat.Config(clip_init=3.0, kurtosis_weight=weight, skip=("head",))
        return qat.prepare(copy.deepcopy(float_model), config)

    return {
        "fp32": (copy.deepcopy(float_model), no_penalty),
        "A4": (prepared(0.0), no_penalty),
        "A4 + K": (prepared(1e-3), qat.with_kurtosis),
        "A4 + K in PyTorch": (with_eager_layers(copy.deepcopy(float_model)), eager_penalty),
    }


def step_of(model: nn.Module, ids: Tensor, penalty: Callable[[nn.Module, Tensor], Tensor], run: Any) -> Call:
    ours = any(isinstance(m, qat.QATLinear) for m in model.modules())
    groups: Any = qat.param_groups(model, 1e-4, 0.0) if ours else model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        penalty(model, loss).backward()
        optimizer.step()

    step()  # the optimizer's state
    return Call(step)


def cell(width: int, repetitions: int, compiled: bool) -> dict[str, Any]:
    hidden, layers, heads, batch, length = SHAPES[width]
    torch.manual_seed(0)
    float_model = Llama(width, hidden, layers, heads, heads, 512, length)
    ids = torch.randint(0, 512, (batch, length + 1))
    calls = {name: step_of(model, ids, penalty, model) for name, (model, penalty) in arms(float_model).items()}
    if compiled:
        for name, (model, penalty) in arms(float_model).items():
            if "PyTorch" not in name:
                calls[f"{name}, compiled"] = step_of(model, ids, penalty, torch.compile(model))
    times = measure.interleave(calls, repetitions, block=0.0, training=True)
    return {"width": width, "tokens": batch * length, "times": times}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", choices=SHAPES, help="default: all, with --short 64 and 288")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile (a minute for each width)")
    args = parser.parse_args()
    widths = args.widths or ([64, 288] if args.short else list(SHAPES))
    repetitions, head = measure.start(args)
    cells = [cell(width, repetitions, args.compile) for width in widths]
    names = [name for name in cells[0]["times"] if name != "fp32"]
    rows = []
    for c in cells:
        row = [str(c["width"]), str(c["tokens"]), f"{measure.microseconds(c['times']['fp32'])} us"]
        rows.append(row + [str(measure.ratio(c["times"][name], c["times"]["fp32"])) for name in names])
    table = measure.table(["width", "tokens", "fp32 step", *(f"{name} / fp32" for name in names)], rows)
    measure.finish("training_step", head, table, cells)


if __name__ == "__main__":
    main()
