"""Fake quantization and the kurtosis penalty on one large weight, through autograd, as a training step calls them.

Beside them torch's own learnable fake quantization, the same arithmetic in PyTorch operators, and (--compile) that
under torch.compile. The weight is larger than the caches; a read of it is the time to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Call
from ocsquant import ops

BITS, LIMIT = 4, 7


def composed_fake_quantize(w: Tensor, scale: Tensor) -> Tensor:
    """LSQ per output channel in PyTorch operators."""
    step = scale[:, None]
    value = (w / step).clamp(-LIMIT, LIMIT)
    return ((value.round() - value).detach() + value) * step


def composed_kurtosis(y: Tensor) -> Tensor:
    centred = y - y.mean(1, keepdim=True)
    z = centred * (centred * centred).mean(1, keepdim=True).rsqrt()
    return (z * z).square().mean(1)


def contestants(size: int, compiled: bool) -> dict[str, dict[str, Callable[[], Any]]]:
    """By task: name and what to call."""
    w = (torch.randn(size, size) * 0.02).requires_grad_(True)
    grad, row_grad = torch.randn(size, size), torch.randn(size)
    scale = (w.detach().abs().amax(1) / LIMIT).requires_grad_(True)
    splits, zero = torch.ones(size, dtype=torch.int32), torch.zeros(size, requires_grad=True)

    def there_and_back(forward: Callable[[], Tensor], given: Tensor) -> Callable[[], None]:
        def run() -> None:
            w.grad = scale.grad = zero.grad = None
            forward().backward(given)

        return run

    def there(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return forward()

        return run

    def learnable() -> Tensor:
        return torch._fake_quantize_learnable_per_channel_affine(w, scale, zero, 0, -LIMIT - 1, LIMIT, 1.0)

    fake = {
        "ocsquant": lambda: ops.fake_quantize_split(w, scale, splits, BITS),
        "torch learnable": learnable,
        "PyTorch operators": lambda: composed_fake_quantize(w, scale),
    }
    kurtosis = {"ocsquant": lambda: ops.kurtosis(w), "PyTorch operators": lambda: composed_kurtosis(w)}
    if compiled:
        fast_fake = torch.compile(composed_fake_quantize, dynamic=False)
        fast_kurtosis = torch.compile(composed_kurtosis, dynamic=False)
        fake["torch.compile"] = lambda: fast_fake(w, scale)
        kurtosis["torch.compile"] = lambda: fast_kurtosis(w)
    return {
        "fake quantization, forward": {name: there(f) for name, f in fake.items()},
        "fake quantization, forward and backward": {name: there_and_back(f, grad) for name, f in fake.items()},
        "kurtosis, forward": {name: there(f) for name, f in kurtosis.items()},
        "kurtosis, forward and backward": {name: there_and_back(f, row_grad) for name, f in kurtosis.items()},
        "": {"read": there(w.sum)},
    }


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--compile", action="store_true", help="with torch.compile (a minute more)")
    options.add_argument("--size", type=int, help="rows and columns (default 4096, with --short 1024)")
    args = options.parse_args()
    size = args.size or (1024 if args.short else 4096)
    repetitions, head = measure.start(args)
    tasks = contestants(size, args.compile)
    calls = {f"{task}: {name}": Call(run) for task, entries in tasks.items() for name, run in entries.items()}
    times = measure.interleave(calls, min(repetitions, 15), training=True)
    rows = []
    for task, entries in tasks.items():
        own = times.get(f"{task}: ocsquant")
        for name in entries if own is not None else ():
            taken = times[f"{task}: {name}"]
            shown = f"{sorted(taken)[len(taken) // 2] * 1e3:.1f}"
            reads = measure.ratio(taken, times[": read"]).median
            rows.append([task, name, shown, f"{reads:.1f}", "" if name == "ocsquant" else measure.ratio(taken, own)])
    text = f"{size} x {size} float32\n\n" + measure.table(["", "by", "ms", "reads", "this / ocsquant"], rows)
    bars = {
        task: {n: measure.ratio(times[f"{task}: {n}"], times[f"{task}: ocsquant"]) for n in entries if n != "ocsquant"}
        for task, entries in tasks.items()
        if task
    }
    measure.finish("elementwise", head, text, {"size": size, "times": times}, bars)


if __name__ == "__main__":
    main()
