"""Activation regularisation on stories260k: 4-bit inputs trained and not, with what weights and which penalty.

Fine-tuning by 200 steps of 16 x 128 tokens of TinyStories; perplexity on 112 x 256 held-out tokens. Columns: W16 leaves
the weights; r rounds them to nearest and g by GPTQ, asymmetric per output; s (symmetric per output) and k (16 levels by
k-means) by GPTQ are what the integer kernels run. kurtosis: of a token's outputs; spread: largest over median channel.
integer same: how often the integer model's likeliest token is that of the fake-quantized one, beside how often the
latter agrees with itself in float64. --scratch trains small models from the beginning, pairs of the same seed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ocsquant
from benchmarks import measure, networks
from benchmarks.accuracy.qat_baselines import kure, use_baseline
from benchmarks.networks import Llama
from ocsquant import Recipe, Weights, ops, qat
from ocsquant.inputs import evaluating

BATCH, LENGTH, WINDOW, WINDOWS = 16, 128, 256, 112
NO_HEAD = ("head",)
WEIGHTS = {
    "W8r": Weights(bits=8, symmetric=False),
    "W4r": Weights(bits=4, symmetric=False),
    "W3r": Weights(bits=3, symmetric=False),
    "W4g": Weights(bits=4, symmetric=False, rounding="gptq"),
    "W3g": Weights(bits=3, symmetric=False, rounding="gptq"),
    "W4s": Weights(bits=4, rounding="gptq"),
    "W4k": Weights(bits=4, codebook="kmeans", clip="output", rounding="gptq"),
}


@dataclass
class Arm:
    """A row: how the model is prepared and trained."""

    name: str
    config: dict[str, Any] | None = field(default_factory=dict)  # None: float
    seeds: int = 1
    injected: bool = False
    baseline: str | None = None
    extra: Callable[[nn.Module], Tensor] | None = None  # a term of the loss


ARMS = [
    Arm("fp32", None),
    Arm("A4", {"kurtosis_weight": 0.0}, seeds=3),
    Arm("A4, kurtosis .001 over 3", {"kurtosis_weight": 1e-3}, seeds=3),
    Arm("A4, kurtosis .001", {"kurtosis_weight": 1e-3, "kurtosis_target": 0.0}),
    Arm("A4, kurtosis .01 over 3", {"kurtosis_weight": 1e-2}),
    Arm("A4, kurtosis .01 over 3 on wo, w2", {"kurtosis_weight": 1e-2, "kurtosis_on": ("*.wo", "*.w2")}),
    Arm("A4 + kurtosis of weights (KURE)", {"kurtosis_weight": 0.0}, extra=kure),
    Arm("A4, one clip for both sides (PACT)", None, baseline="pact"),
    Arm("A4, one step (LSQ)", None, baseline="lsq"),
    Arm("A4, 0 on the grid", {"kurtosis_weight": 0.0, "align_zero": True}),
    Arm("A4, folded first", {"kurtosis_weight": 0.0, "fold": "channel"}),
    Arm("W4A4", {"kurtosis_weight": 0.0, "weight_bits": 4}),
    Arm("W4A4, folded first", {"kurtosis_weight": 0.0, "weight_bits": 4, "fold": "channel"}),
    Arm("outliers: A4", {"kurtosis_weight": 0.0}, injected=True),
    Arm("outliers: fold, then A4", {"kurtosis_weight": 0.0, "fold": "channel"}, injected=True),
]
SHORT = ("A4", "A4, kurtosis .001 over 3", "outliers: fold, then A4")


def held_out() -> tuple[Tensor, Tensor]:
    """Training tokens, and the windows that are scored [112, 257]."""
    tokens = networks.stories_tokens()
    assert tokens is not None
    first = int(len(tokens) * 0.92)
    return tokens[:first], tokens[first:].unfold(0, WINDOW + 1, WINDOW)[:WINDOWS]


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    total = 0.0
    with evaluating(model):
        for part in windows.split(28):
            logits = model(part[:, :-1])
            total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return math.exp(min(total / windows[:, 1:].numel(), 50.0))


def inject_outliers(model: Llama, factor: float = 16.0, channels: int = 2) -> None:
    """Channels of every block made large, and what reads them small: the network computes the same."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in model.blocks:
            for norm, readers in (
                (block.attention_norm, (block.wq, block.wk, block.wv)),
                (block.mlp_norm, (block.w1, block.w3)),
            ):
                chosen = torch.randperm(norm.weight.numel(), generator=draw)[:channels]
                norm.weight[chosen] *= factor
                for reader in readers:
                    reader.weight[:, chosen] /= factor
            chosen = torch.randperm(block.w3.out_features, generator=draw)[:channels]
            block.w3.weight[chosen] *= factor
            block.w2.weight[:, chosen] /= factor


def calibration(tokens: Tensor, count: int = 32) -> list[Tensor]:
    return list(tokens[: count * WINDOW].view(-1, 8, WINDOW))


def train(model: nn.Module, tokens: Tensor, arm: Arm, seed: int, steps: int, lr: float, decay: float = 0.0) -> None:
    """AdamW with a warm-up and a cosine to a tenth, gradients clipped to norm 1."""
    prepared = any(isinstance(m, qat.QATLinear) for m in model.modules())
    plain = [{"params": list(model.parameters()), "weight_decay": decay, "betas": (0.9, 0.95)}]
    optimizer = torch.optim.AdamW(qat.param_groups(model, lr, decay) if prepared else plain, lr=lr)
    warm = min(80, steps // 8 + 1)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    draw = torch.Generator().manual_seed(1000 + seed)
    weights = [p for p in model.parameters() if p.numel() > 1]
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - LENGTH - 1, (BATCH,), generator=draw)
        batch = torch.stack([tokens[i : i + LENGTH + 1] for i in starts.tolist()])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        if arm.extra is not None:
            loss = loss + arm.extra(model)
        optimizer.zero_grad()
        (qat.with_kurtosis(model, loss) if prepared else loss).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()


def prepared(model: nn.Module, tokens: Tensor, config: dict[str, Any]) -> nn.Module:
    return qat.prepare(model, qat.Config(**config, skip=NO_HEAD), calibration=calibration(tokens, 8))


def converted(model: nn.Module, weights: Weights | None, tokens: Tensor, simulate: bool = True) -> nn.Module:
    return qat.convert(copy.deepcopy(model), weights, calibration=calibration(tokens), simulate=simulate)


def rounded(model: nn.Module, weights: Weights, tokens: Tensor) -> nn.Module:
    """The same weights in a network whose inputs stay float."""
    recipe = Recipe(weights, None)
    return ocsquant.quantize(
        copy.deepcopy(model), recipe, calibration=calibration(tokens), ignore=list(NO_HEAD), simulate=True
    )


def weight_columns(model: nn.Module, tokens: Tensor, windows: Tensor) -> dict[str, float]:
    ours = any(isinstance(m, qat.QATLinear) for m in model.modules())
    make = converted if ours else rounded
    return {name: perplexity(make(model, weights, tokens), windows) for name, weights in WEIGHTS.items()}


@torch.inference_mode()
def output_shape(model: nn.Module, windows: Tensor) -> tuple[float, float]:
    """Mean kurtosis of a token's outputs, and the largest over the median channel magnitude, over all inner layers."""
    found: list[tuple[float, float]] = []

    def look(module: nn.Module, args: Any, y: Tensor) -> None:
        size = y.flatten(0, -2).abs().mean(0)
        found.append((float(ops.kurtosis(y).mean()), float(size.max() / size.median())))

    inner = [m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "head"]
    handles = [m.register_forward_hook(look) for m in inner]
    model(windows[:16, :-1])
    for handle in handles:
        handle.remove()
    kurtosis, spread = zip(*found, strict=True)
    return sum(kurtosis) / len(kurtosis), sum(spread) / len(spread)


def run_arm(arm: Arm, steps: int, columns: bool) -> list[dict[str, Any]]:
    tokens, windows = held_out()
    rows = []
    for seed in range(arm.seeds):
        loaded = networks.stories260k()
        assert loaded is not None
        model: nn.Module = loaded[0]
        if arm.injected:
            inject_outliers(model)
        if arm.config is not None:
            prepared(model, tokens, arm.config)
        if arm.baseline is not None:
            use_baseline(model, arm.baseline, calibration(tokens, 8))
        train(model, tokens, arm, seed, steps, 1e-3)
        row: dict[str, Any] = {"arm": arm.name, "seed": seed, "W16": perplexity(model, windows)}
        row["kurtosis"], row["spread"] = output_shape(model, windows)
        if columns and arm.baseline is None:
            row |= weight_columns(model, tokens, windows)
        if arm.config is not None and (seed == 0):
            row |= agreement(model, tokens, windows, "weight_bits" in arm.config)
        rows.append(row)
        print(show(row), flush=True)
    return rows


@torch.inference_mode()
def agreement(model: nn.Module, tokens: Tensor, windows: Tensor, trained: bool) -> dict[str, float]:
    """Integer against fake-quantized logits: relative error (median), and how often the likeliest token is the same."""
    model.eval()
    weights = None if trained else WEIGHTS["W4s"]
    fake = model if trained else converted(model, weights, tokens)
    integer, exact = converted(model, weights, tokens, simulate=False), copy.deepcopy(fake).double()
    expected, got, double = (m(windows[:28, :-1]) for m in (fake, integer, exact))

    def same(a: Tensor, b: Tensor) -> float:
        return float((a.argmax(-1) == b.argmax(-1)).float().mean())

    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    return {
        "integer error": float(error.median()),
        "integer same": same(got, expected),
        "float64 same": same(double, expected),
        "integer, float64": same(got, double),
    }


def untrained(windows: Tensor, tokens: Tensor) -> list[dict[str, Any]]:
    """Static 4-bit inputs by the way their clips are found, and per token with run-time splitting."""
    loaded = networks.stories260k()
    assert loaded is not None
    model = loaded[0]
    rows = [{"arm": "not trained: fp32", "seed": 0, "W16": perplexity(model, windows)}]
    for how in (4.0, "max", "percentile", "mse"):
        made = prepared(copy.deepcopy(model), tokens, {"clip_init": how, "kurtosis_weight": 0.0})
        name = f"not trained: A4, clips {how if isinstance(how, str) else '+-4'}"
        rows.append({"arm": name, "seed": 0, "W16": perplexity(made, windows)})
    for outliers, threshold in ((0, 4.0), (16, 2.0)):
        per_token = Recipe(Weights(bits=8), ocsquant.PerToken(4, outliers, threshold))
        made = ocsquant.quantize(copy.deepcopy(model), per_token, ignore=list(NO_HEAD), simulate=True)
        name = f"not trained: A4 per token, {outliers} outliers split (W8)"
        rows.append({"arm": name, "seed": 0, "W16": perplexity(made, windows)})
    for row in rows:
        print(show(row), flush=True)
    return rows


def scratch(steps: int, seeds: int) -> list[dict[str, Any]]:
    """Small models from the beginning: 4-bit inputs without and with the hinge, seed by seed."""
    tokens, windows = held_out()
    rows = []
    for seed in range(seeds):
        for weight in (0.0, 1e-3):
            torch.manual_seed(seed)
            model = Llama(64, 172, 4, 2, 2, 512, WINDOW)
            for block in model.blocks:
                for layer in (block.wo, block.w2):
                    layer.weight.data.mul_((2 * len(model.blocks)) ** -0.5)
            model.embedding.weight.data.normal_(0.0, 0.02)
            prepared(model, tokens, {"kurtosis_weight": weight})
            arm = Arm(f"scratch: A4, kurtosis {weight:g} over 3")
            train(model, tokens, arm, seed, steps, 4e-3, 0.1)
            row = {"arm": arm.name, "seed": seed, "W16": perplexity(model, windows)}
            row["kurtosis"], row["spread"] = output_shape(model, windows)
            for name in ("W4r", "W3r", "W4g", "W3g"):
                row[name] = perplexity(converted(model, WEIGHTS[name], tokens), windows)
            rows.append(row)
            print(show(row), flush=True)
    return rows


COLUMNS = ("W16", *WEIGHTS, "kurtosis", "spread", "integer error", "integer same", "float64 same", "integer, float64")


def show(row: dict[str, Any]) -> str:
    return f"{row['arm']} (seed {row['seed']}): " + ", ".join(f"{c} {row[c]:.4g}" for c in COLUMNS if c in row)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [[r["arm"], r["seed"], *(f"{r[c]:.4g}" if c in r else "" for c in COLUMNS)] for r in rows]
    return measure.table(["A4: 4-bit static inputs", "seed", *COLUMNS], lines)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--steps", type=int, help="of training (default 200, with --short 40; 800 from scratch)")
    parser.add_argument("--scratch", action="store_true", help="the paired runs from scratch instead (half an hour)")
    parser.add_argument("--arms", nargs="+", help="only arms whose name holds one of these words")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if networks.stories_tokens() is None or networks.stories260k() is None:
        print("left out: stories260k and TinyStories are not among the evaluation data")
        return
    head = measure.header()
    print(measure.show_header(head))
    if args.scratch:
        rows = scratch(args.steps or (40 if args.short else 800), 1 if args.short else 3)
    else:
        tokens, windows = held_out()
        rows = untrained(windows, tokens)
        for arm in ARMS:
            wanted = any(word in arm.name for word in args.arms) if args.arms else True
            if args.short:
                wanted, arm.seeds = arm.name in SHORT, 1
            if wanted:
                rows += run_arm(arm, args.steps or (40 if args.short else 200), not args.short)
    measure.finish("qat_scratch" if args.scratch else "qat", head, table(rows), rows)


if __name__ == "__main__":
    main()
