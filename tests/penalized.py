"""A small network with a kurtosis penalty, and what its gradient must be."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ocsquant
from ocsquant import qat

WEIGHT = 0.3
TARGETS = {"plain": 0.0, "hinge": 3.0}


class Block(nn.Module):
    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.up, self.down, self.reentrant = nn.Linear(24, 40), nn.Linear(40, 24), reentrant

    def inner(self, x):
        return x + self.down(F.silu(self.up(x)))

    def forward(self, x):
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Net(nn.Module):
    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(reentrant) for _ in range(3)), nn.Linear(24, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def network(kind: str, reentrant: bool | None = None) -> Net:
    torch.manual_seed(0)
    model = Net(reentrant)
    config = qat.Config(clip_init=2.5, kurtosis_weight=WEIGHT, kurtosis_target=TARGETS[kind], skip=("head",))
    return qat.prepare(model, config)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(16, 7, 24, generator=g)
    return x * (1 + 4 * (torch.rand(24, generator=g) > 0.8)), torch.randint(0, 5, (16, 7), generator=g)


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def explicit(kind: str, parts: int = 1, factor: float = 1.0) -> torch.Tensor:
    """The gradient with the penalty written into the loss, layer by layer, without anything of ocsquant.qat's."""
    model = network(kind)
    for p in [m.penalty for m in model.modules() if isinstance(m, qat.QATLinear)]:
        p.weight = 0.0
    outputs = []
    for layer in model.modules():
        if isinstance(layer, qat.QATLinear):
            layer.register_forward_hook(lambda module, args, y: outputs.append(y))
    x, y = data()
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        outputs.clear()
        loss = cross_entropy(model(a), b)
        for out in outputs:
            k = ocsquant.ops.kurtosis(out)
            loss = loss + WEIGHT * out.shape[-1] / 64 * (k - TARGETS[kind]).clamp(min=0).mean()
        (loss * (factor / parts)).backward()
    return gradient(model)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def step(model: nn.Module, run=None, parts: int = 1, factor: float = 1.0) -> torch.Tensor:
    """The gradient of a step with the anchor."""
    x, y = data()
    x.requires_grad_()  # reentrant checkpointing asks for it
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (qat.with_kurtosis(model, cross_entropy((model if run is None else run)(a), b)) * (factor / parts)).backward()
    return gradient(model)


def silent(model: nn.Module) -> bool:
    """Whether the scale has returned to 0."""
    return all(float(p.scale) == 0.0 for p in qat.losses.penalties_of(model))
