"""Layers whose split channels are written out as real copies, without rounding: OCS's own form, for checking it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SplitLinear(nn.Module):
    """A float linear over copied input channels: y = x[..., index] W^T + b, W [out, in + copies]."""

    index: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, index: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape[0], int(index.max()) + 1 if index.numel() else 0
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_buffer("index", index)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input[..., self.index], self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, copies={self.weight.shape[1]}"


class SplitConv(nn.Module):
    """A float convolution (1d or 2d, groups = 1) over copied input channels."""

    index: Tensor

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, weight: Tensor, index: Tensor) -> None:
        super().__init__()
        self.conv = _like(conv, weight)
        self.register_buffer("index", index)

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input.index_select(-self.conv.weight.dim() + 1, self.index))


def _like(conv: nn.Conv1d | nn.Conv2d, weight: Tensor) -> Any:
    options: dict[str, Any] = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "padding_mode": conv.padding_mode,
        "bias": conv.bias is not None,
    }
    # On the meta device no random numbers are drawn for weights that are replaced at once.
    size: Any = conv.kernel_size
    wider = type(conv)(weight.shape[1], conv.out_channels, size, device="meta", **options)
    wider.weight = nn.Parameter(weight, requires_grad=False)
    if conv.bias is not None:
        wider.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
    return wider.train(conv.training)
