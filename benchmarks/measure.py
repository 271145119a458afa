"""Measuring shared by the benchmarks: interleaved visits, paired ratios with bounds, peers, and the files of a run.

Every number that is compared was taken in one process, the competitors visited A, B, C, A, B, C, ..., so that whatever
slows the machine slows all of them. On one thread the clock is the process's CPU time: it does not count the time
another process has the core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ocsquant
from benchmarks import plots

RESULTS = Path(__file__).parent / "results"
BLOCK = 4e-3  # seconds of calls in one visit: far above the clock's resolution, far below a scheduler's patience
NOT_SLOWER = 0.98  # what measures as equal still scatters by a percent or two


@dataclass(frozen=True)
class Call:
    """A competitor: what to call, and the torch.backends.quantized engine it belongs to (None: does not matter)."""

    run: Callable[[], Any]
    engine: str | None = None


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with the bounds of its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}-{self.high:.2f}]"


def parser(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has; `description` is the script's docstring."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--short", action="store_true", help="fewer repetitions and cases: a smoke run, not a result")
    made.add_argument("--repetitions", type=int, help="visits per competitor (default 31, with --short 9)")
    made.add_argument("--threads", type=int, default=1, help="1 measures CPU time, more measure wall time (default 1)")
    return made


def with_openmp_threads(args: argparse.Namespace) -> None:
    """Start the running module anew where OMP_NUM_THREADS is another number: some peers read it at their import."""
    threads = str(args.threads)
    if os.environ.get("OMP_NUM_THREADS") != threads:
        module = sys.modules["__main__"].__spec__.name
        again = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | {"OMP_NUM_THREADS": threads})


def start(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Set the thread count and the seed, measure the machine and print it; the number of repetitions, and the head."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    head = header()
    print(show_header(head))
    return args.repetitions or (9 if args.short else 31), head


def interleave(
    calls: dict[str, Call], repetitions: int, block: float = BLOCK, training: bool = False
) -> dict[str, list[float]]:
    """Seconds per call of each competitor, one entry per visit; entries of the same index were taken side by side.

    training: with gradients, and without the warming call, where a call is a long step that needs none.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    before = torch.backends.quantized.engine
    counts, times = {}, {name: [] for name in calls}
    try:
        with torch.inference_mode(not training):
            for name, call in calls.items():
                use_engine(call.engine)
                call.run()
                begin = clock()
                call.run()
                counts[name] = max(1, min(4000, int(block / max(clock() - begin, 1e-7))))
            for _ in range(repetitions):
                for name, call in calls.items():
                    use_engine(call.engine)
                    if not training:
                        call.run()  # back into the caches that the competitors have used since
                    begin = clock()
                    for _ in range(counts[name]):
                        call.run()
                    times[name].append((clock() - begin) / counts[name])
    finally:
        torch.backends.quantized.engine = before
    return times


def use_engine(engine: str | None) -> None:
    if engine is not None and torch.backends.quantized.engine != engine:
        torch.backends.quantized.engine = engine


def ratio(numerator: Sequence[float], denominator: Sequence[float], resamples: int = 1000) -> Ratio:
    """How many times longer `numerator` took, visit by visit."""
    pairs = [a / b for a, b in zip(numerator, denominator, strict=True)]
    draw = random.Random(0)  # the bounds of a saved run can be computed again
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(resamples))
    return Ratio(statistics.median(pairs), medians[int(0.025 * resamples)], medians[int(0.975 * resamples)])


def fastest(times: dict[str, list[float]], names: Sequence[str]) -> str:
    return min(names, key=lambda name: statistics.median(times[name]))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def microseconds(times: Sequence[float]) -> str:
    value = statistics.median(times) * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def engines() -> list[str]:
    """The engines of quantize_dynamic worth comparing with; qnnpack is built for ARM."""
    return [name for name in torch.backends.quantized.supported_engines if name not in ("none", "qnnpack")]


@contextmanager
def quiet() -> Iterator[None]:
    """torch.ao announces its end at every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def dynamic_peer(model: nn.Module, engine: str) -> nn.Module:
    """`model` after torch.ao's quantize_dynamic, with one scale per output channel as ours has; a copy."""
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        with quiet():
            from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig, quantize_dynamic

            recurrent = dict.fromkeys((nn.LSTM, nn.GRU), default_dynamic_qconfig)  # it has no scales per channel
            return quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig, **recurrent})
    finally:
        torch.backends.quantized.engine = before


def rotate(modules: Sequence[nn.Module], x: torch.Tensor) -> Callable[[], Any]:
    """A call that uses the next module each time, so that no weight is still in a cache when its turn comes."""
    if len(modules) == 1:
        module = modules[0]
        return lambda: module(x)
    turn = cycle(modules)
    return lambda: next(turn)(x)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def limits() -> dict[str, float]:
    """What the machine gives at this moment on the threads in use: float32 GFLOPS of a matmul, GB/s of a read."""
    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    large = torch.ones(64 * 2**20)  # 256 MB
    times = interleave({"matmul": Call(lambda: a @ b), "read": Call(large.sum)}, 5)
    best = {name: min(values) for name, values in times.items()}
    return {
        "fp32_gflops": 2 * 512 * 1024 * 1024 / best["matmul"] / 1e9,
        "read_gb_per_s": large.numel() * 4 / best["read"] / 1e9,
    }


def header() -> dict[str, Any]:
    """Machine and versions, for the head of a result."""
    return {
        "cpu": _cpu_name(),
        "environment": str(ocsquant.env()),
        "clock": "CPU time" if torch.get_num_threads() == 1 else "wall time",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **limits(),
    }


def show_header(head: dict[str, Any]) -> str:
    return (
        f"{head['environment']}\n{head['cpu']}; {head['clock']}; in this run float32 matmul "
        f"{head['fp32_gflops']:.0f} GFLOPS, memory read {head['read_gb_per_s']:.1f} GB/s"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown that is also readable as it stands."""
    cells = [list(map(str, columns)), *[[str(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def named(table: str, scheme: str) -> str:
    """Of the results of a table: those of W8A8 have its own name."""
    return table if scheme == "W8A8" else f"{table}_{scheme}"


def finish(name: str, head: dict[str, Any], text: str, data: Any, bars: plots.Bars | None = None) -> None:
    """Print `text`; write it and `data` to results/name.md and results/name.json, and `bars` to results/name.png."""
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(f"# {name}\n\n```\n{show_header(head)}\n```\n\n{text}\n")
    (RESULTS / f"{name}.json").write_text(json.dumps({**head, "results": data}, indent=1) + "\n")
    if bars and not plots.draw(RESULTS / f"{name}.png", f"{name}: {head['cpu']}, {head['clock']}", bars):
        print(f"no matplotlib: {name}.json holds the numbers of its plot")
