"""What else is trained at 4 bits: one learned clip (PACT), one learned step (LSQ), the kurtosis of weights (KURE)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ocsquant import calibrate
from ocsquant.inputs import run_batches
from ocsquant.methods.learned_clips import mse_clips


def _straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


class Pact(nn.Linear):
    """Inputs clipped to +-alpha, 15 levels; only clipped values train alpha (arXiv 1805.06085, for both signs)."""

    alpha: nn.Parameter

    def start(self, clip: float, values: int) -> None:
        self.alpha = nn.Parameter(torch.tensor([clip]))

    def forward(self, input: Tensor) -> Tensor:
        inside = torch.minimum(torch.maximum(input, -self.alpha), self.alpha)
        step = self.alpha.detach() / 7
        return F.linear(_straight_through(inside / step) * step, self.weight, self.bias)


class Lsq(nn.Linear):
    """Inputs on 16 levels of a learned step around zero (arXiv 1902.08153, with its gradient factor)."""

    step: nn.Parameter

    def start(self, clip: float, values: int) -> None:
        self.step = nn.Parameter(torch.tensor([clip / 7]))
        self.factor = (7 * values) ** -0.5

    def forward(self, input: Tensor) -> Tensor:
        scaled = self.step * self.factor
        step = (self.step - scaled).detach() + scaled  # the step itself; its gradient times the factor
        return F.linear(_straight_through((input / step).clamp(-8, 7)) * step, self.weight, self.bias)


LEARNED = {"pact": Pact, "lsq": Lsq}


def use_baseline(model: nn.Module, name: str, batches: Iterable[Any]) -> None:
    """Every inner linear layer becomes one of those, starting at the symmetric clip of least squared error."""
    batches = list(batches)
    with calibrate(model) as seen:
        run_batches(model, batches)
    values = batches[0].numel()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and path != "head":
            sample = seen[path].sample
            low, high = mse_clips(torch.cat([sample, -sample]), 4, False)
            layer.__class__ = LEARNED[name]
            layer.start((high - low) / 2, values * layer.in_features)


def kure(model: nn.Module) -> Tensor:
    """0.1 times the mean over layers of (kurtosis of the weight - 1.8)^2: towards a uniform one (arXiv 2002.07686)."""
    terms = []
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and path != "head":
            z = layer.weight - layer.weight.mean()
            terms.append((z.pow(4).mean() / z.square().mean().square() - 1.8).square())
    return 0.1 * torch.stack(terms).mean()
