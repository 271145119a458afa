"""Progress bars, where tqdm is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from ocsquant.errors import ArgumentError
from ocsquant.planning import Target

T = TypeVar("T")
LONG_WORK = 50_000_000  # parameters from which a progress bar shows by itself


def layer_bar(targets: Iterable[Target], progress: bool | None) -> Iterable[Target]:
    """The layers to be quantized; a bar shows by itself where they are many parameters."""
    targets = list(targets)
    size = sum(p.numel() for t in targets for p in t.module.parameters(recurse=False))
    return bar_of(targets, progress if size >= LONG_WORK else progress or False, "quantize", "layer")


def bar_of(items: Iterable[T], progress: bool | None, text: str, unit: str) -> Iterable[T]:
    """The items; `progress` None shows a bar on a terminal only. Raises ArgumentError for True without tqdm."""
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return items
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        if progress:
            raise ArgumentError("progress", "False or None where tqdm is not installed", True) from None
        return items
    bar: Iterable[T] = tqdm(items, desc=text, unit=unit)
    return bar
