"""One nn.Linear against the other quantized linears that PyTorch users can have on a CPU, at 8, 4 and 2 bits a weight.

Each peer is called as its users call it, on float32 tokens where it takes them; what is not installed is named and left
out (pip install torchao onnxruntime onnx auto-round-lib bitsandbytes; the last two also with --no-deps). A peer whose
output is far from the float layer's is named too. Times are of hot weights, ours with quantizing the tokens, run-time
outlier splitting and the module call.
"""

from __future__ import annotations

import copy
import importlib
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ocsquant
from benchmarks import measure
from benchmarks.measure import Call
from ocsquant import Recipe, Weights

SIZES = ((768, 768), (3072, 768), (2048, 2048), (4096, 4096))  # outputs, inputs
SHORT_SIZES = SIZES[:1]
TOKENS, SHORT_TOKENS = (1, 4, 16, 128, 1024), (1, 16, 128)
GROUP = 128
HOPELESS = 8.0  # times slower than float32: not worth waiting for
FAR = {8: 0.05, 4: 0.3, 2: 1.0}  # relative error of an output, by bits of the weight

Run = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """`prepare(layer, x)` gives what to call; `result` makes a tensor of what that returns."""

    bits: int
    prepare: Callable[[nn.Linear, Tensor], Run]
    package: str = "torch"
    engine: str | None = None
    native: bool = False  # runs inside torch: no tensor leaves it
    result: Callable[[Any], Tensor] = lambda y: y


def symmetric_codes(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """int8 [n, k] and float32 scales [n, k / group]."""
    n, k = weight.shape
    levels = 2 ** (bits - 1)
    grouped = weight.view(n, k // group, group)
    scale = grouped.abs().amax(2).div(max(levels - 1, 1)).clamp_min(1e-8)
    codes = (grouped / scale[..., None]).round().clamp(-levels, levels - 1)
    return codes.to(torch.int8).view(n, k), scale


def ours(recipe: Recipe | str) -> Peer:
    def prepare(layer: nn.Linear, x: Tensor) -> Run:
        module = ocsquant.quantize(nn.Sequential(copy.deepcopy(layer)), recipe)
        return lambda: module(x)

    return Peer(8, prepare)


def dynamic(engine: str) -> Peer:
    def prepare(layer: nn.Linear, x: Tensor) -> Run:
        module = measure.dynamic_peer(nn.Sequential(layer), engine)
        return lambda: module(x)

    return Peer(8, prepare, engine=engine, native=True)


def frozen(module: nn.Module, x: Tensor) -> Run:
    """Compiled with its weights as constants."""
    # Its import registers the passes that fuse the integer product.
    importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    torch._dynamo.reset()
    torch._inductor.config.freezing = True  # type: ignore[attr-defined]
    fast = torch.compile(module)
    fast(x), fast(x)
    return lambda: fast(x)


def torchao(make: Callable[[], Any], bits: int, compiled: bool = False) -> Peer:
    def prepare(layer: nn.Linear, x: Tensor) -> Run:
        from torchao.quantization import quantize_

        module = nn.Sequential(copy.deepcopy(layer))
        quantize_(module, make())
        return frozen(module, x) if compiled else lambda: module(x)

    return Peer(bits, prepare, "torchao", native=True)


def torchao_w8a8() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def torchao_w4a8() -> Any:
    from torchao.prototype.quantization.int4 import Int8DynamicActivationInt4WeightConfig

    return Int8DynamicActivationInt4WeightConfig()


def torch_4bit(layer: nn.Linear, x: Tensor) -> Run:
    """ATen's 4-bit product with int8 activations, one scale for each output."""
    n, k = layer.weight.shape
    codes, scale = symmetric_codes(layer.weight.detach(), 4, k)
    number = (codes + 8).to(torch.uint8)
    both = (number[:, 1::2] << 4 | number[:, ::2]).contiguous()
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(both, scale, None, k, k, n)
    return lambda: torch.ops.aten._dyn_quant_matmul_4bit(x, packed, k, k, n)


def onnx_session(model: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_call(session: Any, x: Tensor) -> Run:
    import onnxruntime

    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
    binding.bind_output("y")

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding

    return run


def onnx_result(binding: Any) -> Tensor:
    return torch.from_numpy(binding.get_outputs()[0].numpy())


def onnx_model(node: Any, constants: dict[str, Tensor], sizes: tuple[int, int], domains: dict[str, int]) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    n, k = sizes
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*d) for d in domains.items()], ir_version=8)


def onnx_dynamic(layer: nn.Linear, x: Tensor) -> Run:
    import onnx
    from onnx import helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    weight = layer.weight.detach()
    model = onnx_model(helper.make_node("MatMul", ["x", "w"], ["y"]), {"w": weight.t()}, tuple(weight.shape), {"": 17})
    with tempfile.TemporaryDirectory() as folder:
        source, target = (str(Path(folder) / name) for name in ("float.onnx", "int8.onnx"))
        onnx.save(model, source)
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
        return onnx_call(onnx_session(target), x)


def onnx_matmul_nbits(bits: int) -> Peer:
    def prepare(layer: nn.Linear, x: Tensor) -> Run:
        from onnx import helper

        n, k = layer.weight.shape
        codes, scale = symmetric_codes(layer.weight.detach(), bits, GROUP)
        number = (codes + 2 ** (bits - 1)).to(torch.uint8).view(n, k // GROUP, GROUP)
        packed = torch.zeros(n, k // GROUP, GROUP * bits // 8, dtype=torch.uint8)
        for i in range(8 // bits):
            packed |= number[..., i :: 8 // bits] << bits * i
        form = {"K": k, "N": n, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **form)
        model = onnx_model(node, {"w": packed, "s": scale.reshape(-1)}, (n, k), {"": 17, "com.microsoft": 1})
        return onnx_call(onnx_session(model.SerializeToString()), x)

    return Peer(bits, prepare, "onnxruntime", result=onnx_result)


def ark(bits: int, per_output: bool = False) -> Peer:
    """auto-round-lib's kernels."""

    def prepare(layer: nn.Linear, x: Tensor) -> Run:
        import auto_round_kernel

        n, k = layer.weight.shape
        group, kind, none = k if per_output else GROUP, f"int{bits}", torch.empty(0)
        codes, scale = symmetric_codes(layer.weight.detach(), bits, group)
        parts = codes.t().contiguous(), scale.t().contiguous(), torch.Tensor()
        packed = auto_round_kernel.repack_quantized_weight(*parts, group, "int8", kind, "fp32", False)
        return lambda: auto_round_kernel.woqgemm(x, packed, none, n, k, group, "int8", kind, "fp32", False)

    return Peer(bits, prepare, "auto_round_kernel")


def bitsandbytes(threshold: float) -> Peer:
    def prepare(layer: nn.Linear, x: Tensor) -> Run:
        from bitsandbytes.nn import Linear8bitLt

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a note at every call would be part of its time

        n, k = layer.weight.shape
        module = Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold)
        module.load_state_dict({"weight": layer.weight.detach()})
        module = module.to("cpu").eval()
        return lambda: module(x)

    return Peer(8, prepare, "bitsandbytes")


OURS = {
    "W8A8": ours("W8A8"),
    "W4": ours(Recipe(Weights(bits=4))),
    "W4A8": ours("W4A8"),
    "W2": ours(Recipe(Weights(bits=2))),
    "W2A8": ours("W2A8"),
}
PEERS = {
    **{f"quantize_dynamic {name}": dynamic(name) for name in measure.engines()},
    "torchao W8A8": torchao(torchao_w8a8, 8),
    "torchao W8A8, compiled and frozen": torchao(torchao_w8a8, 8, compiled=True),
    "bitsandbytes LLM.int8, threshold 0": bitsandbytes(0.0),
    "bitsandbytes LLM.int8, threshold 6": bitsandbytes(6.0),
    "onnxruntime dynamic int8": Peer(8, onnx_dynamic, "onnxruntime", result=onnx_result),
    "onnxruntime MatMulNBits 8": onnx_matmul_nbits(8),
    "ARK W8A8": ark(8),
    "ATen dynamic 4-bit, per output": Peer(4, torch_4bit, native=True),
    "torchao W4A8": torchao(torchao_w4a8, 4),
    "onnxruntime MatMulNBits 4": onnx_matmul_nbits(4),
    "ARK W4A8": ark(4),
    "ARK W4A8, per output": ark(4, per_output=True),
    "onnxruntime MatMulNBits 2": onnx_matmul_nbits(2),
    "ARK W2A8": ark(2),
    "ARK W2A8, per output": ark(2, per_output=True),
}
# Which of ours stands against which peers.
CONTESTS: dict[str, tuple[str, Callable[[str, Peer], bool]]] = {
    "W8A8 / best inside torch": ("W8A8", lambda name, peer: peer.bits == 8 and peer.native),
    "W8A8 / onnxruntime dynamic": ("W8A8", lambda name, peer: name == "onnxruntime dynamic int8"),
    "W8A8 / best": ("W8A8", lambda name, peer: peer.bits == 8),
    "W4 / best of 4 bits": ("W4", lambda name, peer: peer.bits == 4),
    "W4A8 / best of 4 bits in groups": ("W4A8", lambda name, peer: peer.bits == 4 and "per output" not in name),
    "W2 / best of 2 bits": ("W2", lambda name, peer: peer.bits == 2),
    "W2A8 / best of 2 bits in groups": ("W2A8", lambda name, peer: peer.bits == 2 and "per output" not in name),
}


def prepared(name: str, peer: Peer, layer: nn.Linear, x: Tensor, missing: dict[str, str]) -> Run | None:
    """None, the reason in `missing`, where a peer is not installed, refuses the layer or computes something else."""
    try:
        importlib.import_module(peer.package)
        measure.use_engine(peer.engine)
        with torch.inference_mode():
            run = peer.prepare(layer, x)
            y, exact = peer.result(run()).float(), layer(x)
        error = float((y - exact).norm() / exact.norm())
    except Exception as problem:  # whatever a package raises: the table goes on without it, and says so
        missing[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"[:150]
        return None
    if not error < FAR[peer.bits]:
        missing[name] = f"relative error {error:.2f}"
        return None
    slower = seconds(run) / seconds(lambda: layer(x))
    if slower > HOPELESS:
        missing[f"{name}, {tuple(layer.weight.shape)}, {len(x)} tokens"] = f"{slower:.0f} times the time of float32"
        return None
    return run


@torch.inference_mode()
def seconds(run: Run) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def measure_cell(
    size: tuple[int, int], m: int, repetitions: int, compiled: bool, missing: dict[str, str]
) -> dict[str, Any]:
    outputs, inputs = size
    layer, x = nn.Linear(inputs, outputs, bias=False).eval(), torch.randn(m, inputs)
    with torch.no_grad():
        layer.weight.normal_(0, inputs**-0.5)
    calls = {"fp32": Call(lambda: layer(x))}
    for name, made in OURS.items():
        calls[name] = Call(made.prepare(layer, x))
    for name, peer in PEERS.items():
        if "compiled" in name and not compiled:
            continue
        run = prepared(name, peer, layer, x, missing)
        if run is not None:
            calls[name] = Call(run, peer.engine)
    times = measure.interleave(calls, repetitions)
    print(".", end="", flush=True)
    return {"size": size, "tokens": m, "times": times}


def contest(cell: dict[str, Any], ours_name: str, member: Callable[[str, Peer], bool]) -> str:
    times = cell["times"]
    names = [name for name, peer in PEERS.items() if name in times and member(name, peer)]
    if not names:
        return "-"
    best = measure.fastest(times, names)
    return f"{measure.ratio(times[best], times[ours_name])} {best}"


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--compile", action="store_true", help="with what must be compiled (half a minute a cell)")
    args = options.parse_args()
    measure.with_openmp_threads(args)
    repetitions, head = measure.start(args)
    missing: dict[str, str] = {}
    sizes, tokens = (SHORT_SIZES, SHORT_TOKENS) if args.short else (SIZES, TOKENS)
    cells = [measure_cell(size, m, repetitions, args.compile, missing) for size in sizes for m in tokens]
    print()
    labels = [f"{cell['size'][0]}x{cell['size'][1]}, {cell['tokens']}" for cell in cells]
    rows = []
    for name in ("fp32", *OURS, *PEERS):
        shown = [measure.microseconds(cell["times"][name]) if name in cell["times"] else "-" for cell in cells]
        rows.append([name, *shown])
    text = "us a call, layer and tokens\n\n" + measure.table(["", *labels], rows)
    rows = [[title, *(contest(cell, *match) for cell in cells)] for title, match in CONTESTS.items()]
    rows += [
        [f"{name} / fp32", *(str(measure.ratio(cell["times"]["fp32"], cell["times"][name])) for cell in cells)]
        for name in OURS
    ]
    text += "\n\npeer's time / ours\n\n" + measure.table(["", *labels], rows)
    text += "".join(f"\n\nleft out: {name}: {why}" for name, why in missing.items())
    bars = {
        label: {n: measure.ratio(cell["times"]["fp32"], t) for n, t in cell["times"].items() if n != "fp32"}
        for label, cell in zip(labels, cells, strict=True)
    }
    measure.finish("peers", head, text, {"cells": cells, "left_out": missing}, bars)


if __name__ == "__main__":
    main()
