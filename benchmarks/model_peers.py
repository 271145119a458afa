"""Whole models against what other packages make of them: torchao, onnxruntime, and with --compile inductor's int8.

The shapes of BERT-base (1 x 128 tokens), of a word LSTM (2 x 650, one text of 35 words) and of ResNet-50 (one image,
channels last, BatchNorms folded), with random weights. Ours, quantize_dynamic, torchao and onnxruntime's dynamic form
need no data; FX, PT2E and onnxruntime's static form are calibrated on the very input that is measured, and keep 8 bits
between layers. What is not installed or refuses a model is named and left out (pip install torchao onnxruntime onnx
onnxscript).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ocsquant
from benchmarks import measure, models, peers
from benchmarks.measure import Call
from benchmarks.peers import Run
from benchmarks.recurrent import Words
from benchmarks.resnet import INPUT, fx_peer, resnet50


class Encoder(nn.Module):
    """BERT's last hidden state alone, as a graph can return it."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(ids).last_hidden_state


@dataclass(frozen=True)
class Case:
    """A float model, its input, and the engines' form of it: dynamic, or static where there are convolutions."""

    model: nn.Module
    x: Tensor
    static: bool = False


def cases(short: bool) -> Iterator[tuple[str, Case]]:
    bert = models.bert()
    if bert is None:
        print("BERT shape skipped: transformers is not installed")
    else:
        yield "BERT-base shape, 1 x 128 tokens", Case(Encoder(bert), torch.randint(0, 30000, (1, 128)))
    yield "LSTM 2 x 650, 10,000 words, 1 x 35", Case(Words(nn.LSTM).eval(), torch.randint(0, 10_000, (1, 35)))
    if not short:
        yield "ResNet-50 shape, one image", Case(resnet50(), torch.randn(INPUT), static=True)


def called(model: nn.Module, x: Tensor) -> Run:
    return lambda: model(x)


def ours(case: Case) -> Run:
    if not case.static:
        return called(ocsquant.quantize(copy.deepcopy(case.model)), case.x)
    x = case.x.contiguous(memory_format=torch.channels_last)
    model = copy.deepcopy(case.model).to(memory_format=torch.channels_last)
    return called(ocsquant.quantize(model, fold_batchnorm=x), x)


def engine(name: str) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        made = fx_peer(case.model, name, case.x) if case.static else measure.dynamic_peer(case.model, name)
        return called(made, case.x)

    return prepare


def torchao(case: Case) -> nn.Module:
    from torchao.quantization import quantize_

    model = copy.deepcopy(case.model)
    quantize_(model, peers.torchao_w8a8())
    return model


def unshared(model: nn.Module) -> nn.Module:
    """With a ReLU of its own for every call: PT2E takes the calls of a shared one for one operation, and refuses."""
    traced = torch.fx.symbolic_trace(model)
    for i, node in enumerate(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.ReLU):
            traced.add_submodule(f"relu_of_{i}", nn.ReLU())
            node.target = f"relu_of_{i}"
            node.meta.clear()  # torch.export would go by the place it names
    traced.recompile()
    return traced


def pt2e(case: Case) -> Run:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(unshared(case.model), (case.x,)).module(), quantizer)
    prepared(case.x)
    return peers.frozen(convert_pt2e(prepared), case.x)


def onnxruntime(case: Case) -> Run:
    from onnxruntime import quantization as q

    with tempfile.TemporaryDirectory() as folder:
        source, made = (str(Path(folder) / name) for name in ("float.onnx", "int8.onnx"))
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "opset_version": 18}
        torch.onnx.export(case.model, (case.x,), source, dynamo=True, external_data=False, verbose=False, **names)
        if case.static:
            q.shape_inference.quant_pre_process(source, source, skip_symbolic_shape=True)
            form = {"quant_format": q.QuantFormat.QDQ, "activation_type": q.QuantType.QUInt8}
            q.quantize_static(source, made, Batch(case.x), per_channel=True, weight_type=q.QuantType.QInt8, **form)
        else:
            q.quantize_dynamic(source, made, per_channel=True, weight_type=q.QuantType.QInt8)
        return peers.onnx_call(peers.onnx_session(made), case.x)


class Batch:
    """One batch, as onnxruntime wants to read what it calibrates on."""

    def __init__(self, x: Tensor) -> None:
        self.left = [{"x": x.numpy()}]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None

    def set_range(self, start_index: int, end_index: int) -> None:
        """Asked for where data are read in parts."""


def competitors(case: Case, with_compiled: bool) -> dict[str, tuple[Callable[[Case], Run], str | None]]:
    made: dict[str, tuple[Callable[[Case], Run], str | None]] = {
        "fp32": (lambda case: called(case.model, case.x), None),
        "ocsquant": (ours, None),
    }
    kind = "FX" if case.static else "quantize_dynamic"
    made |= {f"{kind} {name}": (engine(name), name) for name in measure.engines()}
    if not case.static:
        made["torchao W8A8"] = (lambda case: called(torchao(case), case.x), None)
    made[f"onnxruntime {'static' if case.static else 'dynamic'} int8"] = (onnxruntime, None)
    if with_compiled:
        made["fp32, compiled and frozen"] = (lambda case: peers.frozen(copy.deepcopy(case.model), case.x), None)
        if case.static:
            made["PT2E, compiled and frozen"] = (pt2e, None)
        else:
            made["torchao W8A8, compiled and frozen"] = (lambda case: peers.frozen(torchao(case), case.x), None)
    return made


def measured(
    title: str, case: Case, with_compiled: bool, repetitions: int
) -> tuple[list[list[Any]], dict[str, list[float]], dict[str, str]]:
    calls, errors, missing = {}, {}, {}
    with torch.no_grad():
        exact = case.model(case.x)
    for name, (prepare, backend) in competitors(case, with_compiled).items():
        try:
            measure.use_engine(backend)
            with torch.no_grad():
                run = prepare(case)
            with torch.inference_mode():
                y = run()
                y = peers.onnx_result(y) if name.startswith("onnxruntime") else y
                errors[name] = float((y - exact).norm() / exact.norm())
        except Exception as problem:  # whatever a package raises: the table goes on without it, and says so
            missing[f"{title}: {name}"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:150]
            continue
        calls[name] = Call(run, backend)
        print(".", end="", flush=True)
    times = measure.interleave(calls, repetitions, block=0.1)
    rows = [
        [
            title,
            name,
            f"{sorted(t)[len(t) // 2] * 1e3:.1f}",
            measure.ratio(times["fp32"], t),
            measure.ratio(t, times["ocsquant"]),
            f"{errors[name]:.3f}",
        ]
        for name, t in times.items()
    ]
    return rows, times, missing


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--compile", action="store_true", help="with what must be compiled (minutes)")
    args = options.parse_args()
    measure.with_openmp_threads(args)
    repetitions, head = measure.start(args)
    rows, found, missing = [], {}, {}
    for title, case in cases(args.short):
        more, times, lost = measured(title, case, args.compile, min(repetitions, 15))
        rows += more
        missing |= lost
        found[title] = times
    print()
    text = measure.table(["model", "", "ms", "fp32 / this", "this / ours", "relative error"], rows)
    text += "".join(f"\n\nleft out: {name}: {why}" for name, why in missing.items())
    measure.finish("model_peers", head, text, {"times": found, "left_out": missing}, models.bars_of(found))


if __name__ == "__main__":
    main()
