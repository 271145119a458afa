"""Twelve small, different networks with how each is to be quantized, and a snapshot of all that a model is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ocsquant import OCS, PerToken, Recipe, Weights


@dataclass(frozen=True)
class Network:
    """`build` gives a fresh model; `tolerance` bounds |quantized - float| / |float| of its output on `inputs`."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.03

    def fresh(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.build()

    def output(self, model: nn.Module) -> Tensor:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(2)
            x = self.inputs()
            y = model(*x) if isinstance(x, tuple) else model(x)
        return (y[0] if isinstance(y, tuple) else y).float()


class Twice(nn.Module):
    """One module under two names, beside a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.first = nn.Linear(128, 128)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.conv(x)).relu())


class SharedWeight(nn.Module):
    """Two modules, one weight, two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(128, 64), nn.Linear(128, 64)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) - 2 * self.right(x)


class TiedHead(nn.Module):
    """A language model's shape: the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 128)
        self.body = nn.Linear(128, 128)
        self.head = nn.Linear(128, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.lstm = nn.LSTM(32, 16, batch_first=True)
        self.out = nn.Linear(16, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(tokens))[0])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 128))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 2, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 1).eval()


def convolutional() -> nn.Module:
    stages = (nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 16))
    model = nn.Sequential(*stages)
    stages[1].running_mean.uniform_(-1, 1)  # statistics that folding must not lose
    stages[1].running_var.uniform_(0.5, 2)
    return model.eval()


def hooked_half() -> nn.Module:
    """float16, in training mode, half of it frozen, with hooks of every sort that change nothing."""
    model = mlp().half().train()
    model[2].weight.requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, y: None)
    model[0].register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    model[2].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    model.register_forward_hook(lambda module, args, y: None, always_call=True)
    return model


def parametrized() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 128), parametrizations.weight_norm(nn.Linear(128, 128)), nn.Linear(128, 64))


class Residual(nn.Module):
    """Convolutions, each before a BatchNorm, around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 96, 3, bias=False), nn.BatchNorm2d(96))
        self.body = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1, bias=False), nn.BatchNorm2d(96))
        self.last = nn.Conv2d(96, 96, 3, 2)
        for norm in (self.stem[1], self.body[1]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.last(torch.relu(self.body(x) + x)).view(len(x), -1)


def tokens(limit: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(limit, (2, 5))


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape).to(dtype)


def split_recipe(bits: int | None = 8, **split: Any) -> Recipe:
    return Recipe(Weights(bits, split=OCS(**split)))


NETWORKS = {
    "root linear": Network(
        lambda: nn.Linear(128, 64), values(3, 128), {"recipe": Recipe(Weights(clip="mse", split=OCS(0.01)))}
    ),
    "mlp": Network(mlp, values(3, 128), {"recipe": Recipe(Weights(split=OCS(0.05)), PerToken(8, 4))}),
    "used twice": Network(
        Twice, values(2, 6, 128), {"recipe": split_recipe(None, expand_ratio=0.1, shares="halving")}, 1e-5
    ),
    "shared weight": Network(
        SharedWeight, values(3, 128), {"recipe": split_recipe(expand_ratio=0.04, select="gain"), "progress": False}
    ),
    "tied head": Network(TiedHead, tokens(40), {"overrides": {"re:b.*": "W8A8"}}),
    "root attention": Network(
        lambda: nn.MultiheadAttention(128, 2, batch_first=True).eval(), lambda: (torch.randn(2, 5, 128),) * 3
    ),
    "encoder": Network(encoder, values(2, 5, 128)),
    "recurrent": Network(Recurrent, tokens(20), {"recipe": "W4A8", "simulate": True}, 0.25),
    "convolutional": Network(
        convolutional,
        values(2, 4, 5, 5),
        {"recipe": split_recipe(max_overhead=0.05), "fold_batchnorm": True, "simulate": True},
    ),
    "residual": Network(Residual, values(2, 3, 9, 9), {"fold_batchnorm": torch.ones(2, 3, 9, 9)}),
    "bfloat16": Network(
        lambda: mlp().bfloat16(),
        values(3, 128, dtype=torch.bfloat16),
        {"recipe": split_recipe(max_overhead=0.05), "filter_fn": lambda module, path: path != "1"},
    ),
    "hooked half": Network(hooked_half, values(3, 128, dtype=torch.float16)),
    "parametrized": Network(parametrized, values(3, 128), {"ignore": ["2"]}),
}


def snapshot(model: nn.Module) -> list[Any]:
    """All that must not change: bytes, identities, classes, attributes, hooks, modes, random state.

    Identities are kept as the objects themselves, so that no new object can come by the address of an old one.
    """
    facts: list[Any] = [torch.is_grad_enabled(), torch.get_rng_state().tolist(), random.getstate()]
    facts += [(key, _bytes(t)) for key, t in model.state_dict().items()]
    for path, module in model.named_modules(remove_duplicate=False):
        facts.append((path, Same(module), type(module), module.training))
        for name, value in module.__dict__.items():
            facts.append((name, Same(value), _contents(value)))
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                kind = (t.dtype, tuple(t.shape), t.stride(), t.device, t.data_ptr(), t.requires_grad)
                facts.append((name, Same(t), Same(t.grad), kind, _bytes(t)))
    return facts


class Same:
    """Equal to another where both hold the very same object."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self.held).__name__} at {id(self.held):#x}>"


def _contents(value: object) -> Any:
    if isinstance(value, dict):
        return [(key, Same(held)) for key, held in value.items()]
    return [Same(held) for held in value] if isinstance(value, (list, tuple, set)) else None


def _bytes(t: Tensor) -> bytes | None:
    return None if t.is_meta else t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
