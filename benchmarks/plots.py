"""Bars of a benchmark's ratios, beside its tables: with matplotlib, where that is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Bars = Mapping[str, Mapping[str, Any]]  # group -> name -> measure.Ratio


def draw(path: Path, title: str, bars: Bars) -> bool:
    """Write a PNG with a group of bars for every entry, their bounds as whiskers; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for group in bars.values() for name in group))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.35 * len(names) * len(bars) + 2), 4.5))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        here = [(at, group[name]) for at, group in enumerate(bars.values()) if name in group]
        places = [at + (i - (len(names) - 1) / 2) * width for at, _ in here]
        values = [ratio.median for _, ratio in here]
        whiskers = [[r.median - r.low for _, r in here], [r.high - r.median for _, r in here]]
        axes.bar(places, values, width, yerr=whiskers, label=name, error_kw={"linewidth": 0.8})
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(bars)), list(bars), rotation=30, ha="right")
    axes.set_ylabel("times as fast")
    axes.set_title(title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True
