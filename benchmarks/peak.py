"""How much of the machine the linear kernels use: int8 dot products per second, bytes per second, and two threads.

Beside each layer, in the same run, stands what the machine gives at that moment: a loop of dot products over registers
(vpdpbusd; without it vpmaddubsw and the additions), and one that reads memory. --scaling compares one thread with two,
by wall time: how much faster ours is on two, over how much faster that loop is. Needs g++, as building does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ocsquant
from benchmarks import measure
from benchmarks.linear import COLD_BYTES, SCHEMES
from benchmarks.measure import Call, Ratio

WIDTHS = {8: "W8A8", 4: "W4", 2: "W2"}
SIZES, TOKENS, SCALING_TOKENS = (768, 2048, 4096), (16, 128, 1024), (16, 128, 1024)
FLAGS = {"avx512_vnni": ("-mavx512f", "-mavx512vnni"), "avx_vnni": ("-mavx2", "-mavxvnni"), "avx2": ("-mavx2",)}
FLAGS["amx_int8"] = FLAGS["avx512_vnni"]  # of the vectors beside the tiles
CHUNK = 16 * 2**20  # read at a time
REST = 0.05  # seconds in which the threads of what ran before stop waiting for work


class Machine:
    """The two loops of peak.cpp."""

    def __init__(self) -> None:
        isa = ocsquant.ops.cpu_isa()[0]
        if isa not in FLAGS:
            raise SystemExit(f"no loop of dot products for the kernels of level {isa}")
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "peak.so"
            source = Path(__file__).with_name("peak.cpp")
            command = [os.environ.get("CXX", "g++"), "-O2", *FLAGS[isa], "-shared", "-fPIC", str(source), "-o"]
            subprocess.run([*command, str(built)], check=True)
            self.library = ctypes.CDLL(str(built))
        self.library.dot_products.argtypes = [ctypes.c_int64]
        self.library.read_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.memory = mmap.mmap(-1, COLD_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)  # as the packed weights have it
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8).fill_(1)
        self.at = 0

    def operations(self, rounds: int) -> int:
        return int(self.library.dot_operations()) * rounds

    def dot(self, rounds: int) -> None:
        self.library.dot_products(rounds)

    def read(self) -> None:
        """The next CHUNK of more than any cache holds."""
        self.library.read_bytes(self.bytes.data_ptr() + self.at, CHUNK)
        self.at = (self.at + CHUNK) % COLD_BYTES


def share(limit: list[float], limit_work: float, ours: list[float], our_work: float) -> Ratio:
    """Of the limit's work per second, what ours does."""
    return measure.ratio([t * our_work / limit_work for t in limit], ours)


def layers_of(size: int, bits: int, count: int = 1) -> nn.Sequential:
    made = nn.Sequential(*(nn.Linear(size, size) for _ in range(count))).eval()
    return ocsquant.quantize(made, SCHEMES[WIDTHS[bits]])


def product_rows(machine: Machine, sizes: tuple[int, ...], repetitions: int) -> list[list[Any]]:
    rows, rounds = [], 100_000
    for size in sizes:
        layers = {f"{bits} bits": layers_of(size, bits) for bits in WIDTHS}
        for m in TOKENS:
            x = torch.randn(m, size)
            calls = {name: Call(measure.rotate(layer, x)) for name, layer in layers.items()}
            times = measure.interleave({"limit": Call(lambda: machine.dot(rounds)), **calls}, repetitions)
            peak = machine.operations(rounds) / statistics.median(times["limit"]) / 1e9
            work = 2.0 * m * size * size
            shares = [share(times["limit"], machine.operations(rounds), times[name], work) for name in layers]
            rows.append([f"{size} x {size}", m, f"{peak:.0f}", *shares])
    return rows


def read_rows(machine: Machine, sizes: tuple[int, ...], repetitions: int) -> list[list[Any]]:
    rows = []
    for size in sizes:
        shares, rate = [], 0.0
        for bits in WIDTHS:
            stored = size * size * bits // 8
            layers, x = layers_of(size, bits, -(-COLD_BYTES // stored)), torch.randn(1, size)
            calls = {"limit": Call(machine.read), "ours": Call(measure.rotate(layers, x))}
            times = measure.interleave(calls, repetitions, block=40e-3)
            rate = CHUNK / statistics.median(times["limit"]) / 1e9
            shares.append(share(times["limit"], CHUNK, times["ours"], stored))
        rows.append([f"{size} x {size}", 1, f"{rate:.1f}", *shares])
    return rows


def seconds(run: Callable[[], Any], calls: int) -> float:
    time.sleep(REST)
    run()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def scaling_rows(machine: Machine, sizes: tuple[int, ...], repetitions: int) -> list[list[Any]]:
    rows, rounds = [], 2_000_000
    with ThreadPoolExecutor(2) as pool:

        def dots(threads: int) -> Callable[[], Any]:
            return lambda: list(pool.map(machine.dot, [rounds // threads] * threads))

        for size in sizes:
            for m in SCALING_TOKENS:
                cells: list[Any] = []
                for bits in WIDTHS:
                    layer, x = layers_of(size, bits), torch.randn(m, size)
                    run = measure.rotate(layer, x)
                    calls = max(1, int(20e-3 / max(seconds(run, 1), 1e-6)))
                    bare, ours = [], []
                    for _ in range(repetitions):
                        times = []
                        for threads in (1, 2):
                            torch.set_num_threads(threads)
                            times.append((seconds(dots(threads), 1), seconds(run, calls)))
                        (dot_one, one), (dot_two, two) = times
                        bare.append(dot_one / dot_two)
                        ours.append(one / two)
                    cells += [f"{statistics.median(ours):.2f}", measure.ratio(ours, bare)]
                rows.append([f"{size} x {size}", m, f"{statistics.median(bare):.2f}", *cells])
    return rows


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--scaling", action="store_true", help="two threads against one instead")
    args = options.parse_args()
    repetitions, head = measure.start(args)
    machine, sizes = Machine(), SIZES[:2] if args.short else SIZES
    with torch.inference_mode():
        if args.scaling:
            rows = scaling_rows(machine, sizes, repetitions)
            titles = [title for bits in WIDTHS for title in (f"{bits} bits", "over the loop's")]
            text = measure.table(["layer", "tokens", "loop: 2 threads / 1", *titles], rows)
            measure.finish("scaling", head, text, [list(map(str, row)) for row in rows])
            return
        columns = [f"share, {bits} bits" for bits in WIDTHS]
        products = product_rows(machine, sizes, repetitions)
        reads = read_rows(machine, sizes, repetitions)
    text = measure.table(["layer", "tokens", "GOPS of the loop", *columns], products)
    text += "\n\n" + measure.table(["from memory", "tokens", "GB/s of the loop", *columns], reads)
    measure.finish("peak", head, text, [list(map(str, row)) for row in products + reads])


if __name__ == "__main__":
    main()
