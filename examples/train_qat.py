"""Train a small language model whose layers will run on 4-bit inputs: float, then through quantization, then integers.

A LLaMA of 0.9 million parameters reads the bytes of a text: TinyStories from the evaluation data (the folder that
OCSQUANT_DATA names, else shared/data beside the repository), or any file (--text). It is trained in float32, prepared
by `ocsquant.qat.prepare` (4-bit inputs with learned clips, a kurtosis penalty on the outputs), trained on, and turned
into integer layers by `ocsquant.qat.convert`. A table shows the perplexity after each step.

    python examples/train_qat.py                     # about six minutes on two cores
    python examples/train_qat.py --resume            # goes on where an interrupted run stopped
    torchrun --nproc-per-node 2 examples/train_qat.py

Needs, beside ocsquant: pip install "transformers>=5"; matplotlib for the plots of kurtosis and clips, tqdm for the bar.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ocsquant
from ocsquant import Weights, qat

LENGTH, SCORED = 128, 64  # bytes of a sequence; sequences that are scored
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def text_bytes(path: Path | None) -> tuple[Tensor, Tensor]:
    """Training bytes and, from the end of the text, those that are scored [64, 128]."""
    if path is None:
        folder = os.environ.get("OCSQUANT_DATA") or Path(__file__).parents[2] / "shared" / "data"
        path = Path(folder) / "tinystories" / "tinystories_train_2MiB.txt"
    if not path.exists():
        raise SystemExit(f"there is no text at {path}: name one with --text")
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    if len(data) < 4 * SCORED * LENGTH:
        raise SystemExit(f"{path} is too short: at least {4 * SCORED * LENGTH} bytes are needed")
    return data[: -SCORED * LENGTH], data[-SCORED * LENGTH :].view(SCORED, LENGTH)


def network() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def batches(data: Tensor, size: int, first: int, last: int) -> Iterator[Tensor]:
    """The same batch for the same step, whether a run was interrupted or not, and another for each process."""
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step * WORLD + RANK)
        starts = torch.randint(0, len(data) - LENGTH, (size,), generator=draw)
        yield torch.stack([data[i : i + LENGTH] for i in starts.tolist()])


@torch.no_grad()
def perplexity(model: nn.Module, scored: Tensor) -> float:
    """Per byte."""
    training = model.training
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) for part in scored.split(16)]
    model.train(training)
    return math.exp(sum(losses) / len(losses))


class Run:
    """One phase of training: its optimizer, its schedule, and a checkpoint from which it goes on."""

    def __init__(self, model: nn.Module, groups: Any, lr: float, steps: int, file: Path) -> None:
        self.model, self.steps, self.file, self.step = model, steps, file, 0
        self.optimizer = torch.optim.AdamW(groups, lr=lr)
        warm = steps // 10 + 1
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: min(1.0, (i + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * i / steps))
        )
        self.history: list[dict[str, Any]] = []

    def save(self) -> None:
        if RANK == 0:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
            state |= {"schedule": self.schedule.state_dict(), "history": self.history}
            torch.save(state, self.file.with_suffix(".part"))
            self.file.with_suffix(".part").replace(self.file)  # never half a checkpoint

    def resume(self) -> None:
        state = torch.load(self.file)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.history = state["step"], state["history"]

    def train(self, data: Tensor, scored: Tensor, batch: int, every: int = 50) -> None:
        """Needs no word about the penalty: the model's own loss has passed `with_kurtosis`."""
        parallel = nn.parallel.DistributedDataParallel(self.model) if WORLD > 1 else self.model
        self.model.train()
        for ids in progress(batches(data, batch, self.step, self.steps), self.step, self.steps, self.file.stem):
            loss = parallel(input_ids=ids, labels=ids).loss
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            if self.step % every == 0 or self.step == self.steps:
                self.history.append(
                    {"step": self.step, "perplexity": perplexity(self.model, scored), **seen(self.model)}
                )
                self.save()


def seen(model: nn.Module) -> dict[str, Any]:
    """Kurtosis of each layer's outputs since the last look, and its clips."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, qat.QATLinear)}
    if not layers:
        return {}
    clips = {path: (m.clip_neg.item(), m.clip_pos.item()) for path, m in layers.items()}
    return {"kurtosis": qat.kurtosis_report(model), "clips": clips}


def progress(items: Iterator[Tensor], first: int, last: int, text: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, initial=first, total=last, desc=text, disable=RANK > 0, mininterval=2.0)


def plot(history: list[dict[str, Any]], folder: Path) -> None:
    """Kurtosis and clips over the steps, one line for each layer."""
    (folder / "history.json").write_text(json.dumps(history, indent=1))
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print(f"no matplotlib: {folder / 'history.json'} holds the numbers of the plots")
        return
    steps = [entry["step"] for entry in history]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 9), sharex=True)
    for path in history[0]["kurtosis"]:
        above.plot(steps, [entry["kurtosis"][path] for entry in history], linewidth=0.8)
        low, high = zip(*(entry["clips"][path] for entry in history), strict=True)
        below.plot(steps, low, linewidth=0.8)
        below.plot(steps, high, linewidth=0.8)
    above.set(ylabel="kurtosis of outputs, per token", title="One line for each layer")
    below.set(xlabel="step", ylabel="clips of inputs")
    figure.savefig(folder / "training.png", dpi=120)
    print(f"plots: {folder / 'training.png'}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--text", type=Path, help="a text to learn from (default: TinyStories)")
    options.add_argument("--out", type=Path, default=Path("qat-run"), help="folder of checkpoints and plots")
    options.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    options.add_argument("--float-steps", type=int, default=400, help="steps in float32 (default 400)")
    options.add_argument("--steps", type=int, default=300, help="steps through quantization (default 300)")
    options.add_argument("--batch", type=int, default=16, help="sequences of 128 bytes in a process's batch")
    options.add_argument("--weight-bits", type=int, help="train the weights through their rounding too")
    options.add_argument("--kurtosis-weight", type=float, default=1e-3, help="of the penalty (default 0.001)")
    options.add_argument("--kurtosis-target", type=float, default=3.0, help="0 is the paper's penalty (default 3)")
    args = options.parse_args()
    if WORLD > 1:
        dist.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    data, scored = text_bytes(args.text)
    rows: dict[str, float] = {}

    model = network()
    run = Run(model, model.parameters(), 2e-3, args.float_steps, args.out / "float.pt")
    if args.resume and run.file.exists():
        run.resume()
    run.train(data, scored, args.batch)
    rows["fp32"] = perplexity(model, scored)

    examples = [{"input_ids": data[: 16 * LENGTH].view(16, LENGTH)}]
    config = qat.Config(
        weight_bits=args.weight_bits,
        kurtosis_weight=args.kurtosis_weight,
        kurtosis_target=args.kurtosis_target,
        fold="channel",
    )
    qat.prepare(model, config, calibration=examples)
    rows["4-bit inputs, not trained"] = perplexity(model, scored)
    run = Run(model, qat.param_groups(model, 1e-3, 0.0), 1e-3, args.steps, args.out / "qat.pt")
    if args.resume and run.file.exists():
        run.resume()
    run.train(data, scored, args.batch)
    rows["4-bit inputs, trained"] = perplexity(model, scored)
    if RANK == 0:
        finish(model, args, rows, run.history, examples, scored)
    if WORLD > 1:
        dist.destroy_process_group()


def finish(model: nn.Module, args: Any, rows: dict[str, float], history: Any, examples: Any, scored: Tensor) -> None:
    """Integer layers, the table, the plots."""
    weights = None if args.weight_bits else Weights(bits=4, rounding="gptq")
    for name, chosen in {"8-bit": Weights(bits=8), "4-bit": weights}.items():
        integer = qat.convert(copy.deepcopy(model), chosen, calibration=examples)
        rows[f"{name} weights, integer layers"] = perplexity(integer, scored)
    ocsquant.save(integer, args.out / "integer.safetensors")
    width = max(map(len, rows))
    print(f"\n{'':{width}}  perplexity per byte, held-out text")
    for name, value in rows.items():
        print(f"{name:{width}}  {value:.3f}")
    plot(history, args.out)


if __name__ == "__main__":
    main()
