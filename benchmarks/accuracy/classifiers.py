"""SplitQuant's own question: do classifiers of texts keep their accuracy at 2 and 4 bits a weight?

Feelings of messages (6 classes; DAIR.AI emotion) and spam among text messages (UCI SMS Spam), by logistic regression on
MiniLM's sentence vectors, fitted to the float network. The encoder is quantized, weights alone but where a row says A8,
and the accuracy on texts the classifier has not seen is read again, with the standard error of its distance from
float32 (paired bootstrap over texts). The paper's networks (fine-tuned BERT-Tiny) are not published.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ocsquant
from benchmarks import networks
from benchmarks.accuracy.low_bits import authors_splitquant
from benchmarks.accuracy.subjects import Row, Subject, load_minilm, run, stored_bits
from ocsquant import PerToken, Recipe, SplitQuant, Weights

TRAIN, TEST, SHORT_TRAIN, SHORT_TEST = 4000, 1000, 500, 200
SHORT = ("INT2 row", "SplitQuant INT2, a codebook per row", "W4 row", "W8A8 (default)")
DECAY, STEPS = 1e-4, 100  # of the regression


def emotion() -> tuple[list[str], list[str]] | None:
    """Texts and labels, in an order that is not their source's."""
    path = networks.data_file("emotion/train.txt")
    if path is None:
        return None
    lines = [line.rpartition(";") for line in path.read_text().splitlines()[1:] if ";" in line]
    return [text for text, _, _ in lines], [label for _, _, label in lines]


def sms_spam() -> tuple[list[str], list[str]] | None:
    path = networks.data_file("sms_spam/SMSSpamCollection")
    if path is None:
        return None
    lines = [line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines() if "\t" in line]
    return [text for _, _, text in lines], [label for label, _, _ in lines]


def regression(x: Tensor, y: Tensor, classes: int) -> nn.Linear:
    """Multinomial logistic regression of vectors x [texts, hidden] on classes y."""
    made = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    optimizer = torch.optim.LBFGS(made.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(made(x), y) + DECAY * made.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return made.requires_grad_(False)


def subject(name: str, loaded: tuple[list[str], list[str]] | None, short: bool) -> Subject | None:
    minilm = load_minilm()
    if loaded is None or minilm is None:
        return None
    model, tokenizer = minilm
    texts, labels = loaded
    train, test = (SHORT_TRAIN, SHORT_TEST) if short else (TRAIN, TEST)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[: train + test].tolist()
    names = sorted(set(labels))
    texts, y = [texts[i] for i in order], torch.tensor([names.index(labels[i]) for i in order])
    count = len(texts) - test
    known = networks.embed(model, tokenizer, texts[:count]).clone()  # out of inference mode
    head = regression(known, y[:count], len(names))

    def losses(made: nn.Module) -> tuple[Tensor, Tensor]:
        wrong = head(networks.embed(made, tokenizer, texts[count:])).argmax(1) != y[count:]
        return wrong.double(), torch.ones(len(wrong), dtype=torch.float64)

    return Subject(name, model, _batches(tokenizer, texts[:128]), losses, lambda mean: 100 * (1 - mean), "% right")


def _batches(tokenizer: Any, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    return [
        dict(tokenizer(list(texts[i : i + 32]), padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(texts), 32)
    ]


def recipes() -> dict[str, Recipe]:
    rows = SplitQuant(clusters="row", ranges="row")
    table = {
        "INT2 row": Weights(2, symmetric=False),
        "INT2 groups of 128": Weights(2, "group", 128, symmetric=False),
        "INT2 groups of 128, clip mse": Weights(2, "group", 128, symmetric=False, clip="mse"),
        "SplitQuant INT2, one codebook, row scales": Weights(2, split=SplitQuant()),
        "SplitQuant INT2, a codebook per row": Weights(2, split=rows),
        "INT3 row": Weights(3, symmetric=False),
        "W4 row": Weights(4),
        "W4 groups of 128": Weights(4, "group", 128, symmetric=False),
        "W4 k-means 16 under row scales": Weights(4, codebook="kmeans"),
        "W4 k-means 16, fitted to outputs, GPTQ": Weights(4, codebook="kmeans", clip="output", rounding="gptq"),
        "SplitQuant INT4, one codebook, row scales": Weights(4, split=SplitQuant()),
    }
    found = {what: Recipe(weights, None) for what, weights in table.items()}
    found["W8A8, plain per token"] = Recipe(activations=PerToken(max_outliers=0))
    found["W8A8 (default)"] = Recipe()
    return found


def rows_of(subject: Subject, short: bool) -> Iterator[Row]:
    yield Row(subject.name, "float32", f"{subject.score(subject.model)[0]:.1f} {subject.unit}", "32")

    def row(what: str, made: nn.Module, bits: str = "") -> Row:
        value, distance, error = subject.score(made)
        return Row(subject.name, what, f"{value:.1f} ({distance:+.1f} +- {error:.1f})", bits)

    for what, recipe in recipes().items():
        if short and what not in SHORT:
            continue
        made = ocsquant.quantize(
            copy.deepcopy(subject.model),
            recipe,
            calibration=subject.calibration,
            simulate=recipe.activations is None,
            filter_fn=networks.no_embedding,
        )
        yield row(what, made, f"{stored_bits(made):.2f}")
    yield row("SplitQuant INT2, the authors' pipeline", authors_splitquant(copy.deepcopy(subject.model)))


SUBJECTS: dict[str, Callable[[bool], Subject | None]] = {
    "emotion": lambda short: subject("emotion, 6 classes", emotion(), short),
    "sms_spam": lambda short: subject("SMS spam", sms_spam(), short),
}


if __name__ == "__main__":
    run(__doc__, "classifiers", ["texts", "encoder", "score", "bits a weight", ""], rows_of, SUBJECTS)
