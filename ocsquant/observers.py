"""Calibration: what the inputs of a model's layers look like, in memory that grows with channels, not with data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ocsquant.config import check_type
from ocsquant.errors import (
    ArgumentError,
    ArgumentTypeError,
    CorruptCheckpointError,
    NonFiniteError,
    NotCalibratedError,
)
from ocsquant.inputs import run_batches, statistics_key, tokens, watch

SAMPLE = 128  # tokens kept of every layer, evenly spread over all it saw
KEY = "ocsquant_statistics"


@dataclass
class InputStatistics:
    """The inputs of one layer, token by token (of a convolution: pixel by pixel), seen as [tokens, channels].

    count: tokens; low, high: float32 [2, channels], the ranges of two halves of the data, so that a scale from one can
    be judged by the other; total, squares: float64 [channels], sums of x and x^2; sample: float32 [at most 128,
    channels], every stride-th token; half: int8, to which half each of those belongs.
    """

    count: int
    low: Tensor
    high: Tensor
    total: Tensor
    squares: Tensor
    sample: Tensor
    half: Tensor
    stride: int = 1
    calls: int = 0

    @property
    def minimum(self) -> Tensor:
        """float32 [channels]."""
        return self.low.amin(0)

    @property
    def maximum(self) -> Tensor:
        """float32 [channels]."""
        return self.high.amax(0)

    @property
    def mean(self) -> Tensor:
        """float32 [channels]."""
        return (self.total / max(self.count, 1)).float()

    @property
    def second_moment(self) -> Tensor:
        """float32 [channels]: the mean of x^2."""
        return (self.squares / max(self.count, 1)).float()

    @property
    def absmax(self) -> Tensor:
        """float32 [channels]."""
        return torch.maximum(self.maximum.abs(), self.minimum.abs())

    @property
    def outlier_counts(self) -> Tensor:
        """int64 [channels]: of the sampled tokens, the values above the layer's 99th percentile of |x|."""
        size = self.sample.abs()
        if size.numel() == 0:
            return torch.zeros(size.shape[1], dtype=torch.int64)
        threshold = size.flatten().kthvalue(math.ceil(0.99 * size.numel())).values
        return (size > threshold).sum(0)

    @classmethod
    def empty(cls, channels: int) -> InputStatistics:
        """Of a layer that saw nothing yet."""
        edge = torch.full((2, channels), torch.inf, dtype=torch.float32, device="cpu")
        zero = torch.zeros(channels, dtype=torch.float64, device="cpu")
        sample = torch.empty(0, channels, dtype=torch.float32, device="cpu")
        return cls(0, edge, -edge, zero, zero.clone(), sample, torch.empty(0, dtype=torch.int8, device="cpu"))

    def add(self, x: Tensor) -> None:
        """Count the float32 tokens [m, channels]."""
        # The first part of a batch goes to one half, the second to the other, and the next batch the other way round.
        middle = (len(x) + 1) // 2
        half = torch.full((len(x),), (self.calls + 1) % 2, dtype=torch.int8, device="cpu")
        half[:middle] = self.calls % 2
        low, high = self.low.clone(), self.high.clone()
        for i, part in ((self.calls % 2, x[:middle]), ((self.calls + 1) % 2, x[middle:])):
            if len(part):
                low[i] = torch.minimum(low[i], part.amin(0))
                high[i] = torch.maximum(high[i], part.amax(0))
        self.low, self.high = low, high
        self.calls += 1
        self.total = self.total + x.sum(0, dtype=torch.float64)
        self.squares = self.squares + torch.linalg.vector_norm(x, dim=0, dtype=torch.float64).square()
        self._keep(x, half)
        self.count += x.shape[0]

    def _keep(self, x: Tensor, half: Tensor) -> None:
        """Every stride-th of more tokens, at a stride at which all fit: nothing larger is made on the way."""
        stride, step = self.stride, 1
        while len(range(0, len(self.sample), step)) + len(range(-self.count % stride, len(x), stride)) > SAMPLE:
            stride, step = 2 * stride, 2 * step
        more = slice(-self.count % stride, None, stride)
        self.stride = stride
        self.sample, self.half = torch.cat([self.sample[::step], x[more]]), torch.cat([self.half[::step], half[more]])

    def _thin(self, stride: int) -> None:
        """Keep every stride-th token, and so few that they fit."""
        while self.stride < stride or self.sample.shape[0] > SAMPLE:
            self.stride *= 2
            self.sample, self.half = self.sample[::2].clone(), self.half[::2].clone()

    def _is_sound(self) -> bool:
        """Whether a file's numbers can be what `add` makes."""
        k, rows = self.total.shape[-1], self.sample.shape[0]
        shapes = {"low": (2, k), "high": (2, k), "total": (k,), "squares": (k,), "sample": (rows, k), "half": (rows,)}
        empty = InputStatistics.empty(0)
        return (
            all(type(n) is int and n >= 0 for n in (self.count, self.calls))
            and type(self.stride) is int
            and self.stride > 0
            and all(getattr(self, t).shape == shape for t, shape in shapes.items())
            and all(getattr(self, t).dtype == getattr(empty, t).dtype for t in shapes)
            and all(bool(getattr(self, t).isfinite().all()) for t in ("total", "squares", "sample"))
            and not bool(self.low.isnan().any() or self.high.isnan().any())
            and bool(((self.half == 0) | (self.half == 1)).all())
        )

    def merged(self, other: InputStatistics) -> InputStatistics:
        """Both together; each has the share of the sample that it has of the tokens."""
        parts = [dataclasses.replace(part) for part in (self, other)]
        for part in parts:
            part._thin(max(self.stride, other.stride))
        both = InputStatistics(
            self.count + other.count,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.total + other.total,
            self.squares + other.squares,
            torch.cat([part.sample for part in parts]),
            torch.cat([part.half for part in parts]),
            parts[0].stride,
            self.calls + other.calls,
        )
        both._thin(1)
        return both


TENSORS = ("low", "high", "total", "squares", "sample", "half")


class Statistics(Mapping[str, InputStatistics]):
    """What `calibrate` saw: layer path -> `InputStatistics`."""

    def __init__(self, layers: Mapping[str, InputStatistics] | None = None) -> None:
        if layers is not None:
            check_type("layers", layers, Mapping, "a mapping from layer paths to InputStatistics")
            for path, layer in layers.items():
                if not isinstance(path, str) or not isinstance(layer, InputStatistics):
                    raise ArgumentTypeError("layers", "a mapping from layer paths to InputStatistics", repr(path))
        self._layers = dict(layers or {})

    def __getitem__(self, path: str) -> InputStatistics:
        return self._layers[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Statistics of {len(self)} layers"

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both, as of one run over all the data. Raises ArgumentError where a layer's width differs."""
        check_type("other", other, Statistics, "an ocsquant.Statistics")
        layers = dict(self._layers)
        for path, layer in other.items():
            mine = layers.get(path)
            if mine is not None and mine.total.shape != layer.total.shape:
                expected = f"statistics in which '{path}' has {mine.total.numel()} channels"
                raise ArgumentError("other", expected, layer.total.numel())
            layers[path] = layer if mine is None else mine.merged(layer)
        return Statistics(layers)

    def all_reduce(self) -> Statistics:
        """Statistics of all processes of the default torch.distributed group, the same on each of them.

        Every process must have calibrated the same layers. Raises NotCalibratedError where they differ.
        """
        from torch import distributed

        world = distributed.get_world_size()
        text = json.dumps({path: self[path].total.numel() for path in sorted(self)})
        digest = torch.tensor([len(self), zlib.crc32(text.encode())])
        digests = [torch.zeros_like(digest) for _ in range(world)]
        distributed.all_gather(digests, digest)
        if not all(torch.equal(d, digest) for d in digests):
            raise NotCalibratedError(
                f"the processes calibrated different layers: {[int(d[0]) for d in digests]} of them each"
            )
        layers = {}
        for path in sorted(self):
            parts = _gather(self[path], world)
            together = parts[0]
            for part in parts[1:]:
                together = together.merged(part)
            layers[path] = together
        return Statistics(layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        check_type("path", path, (str, os.PathLike), "a path")
        record = {name: [layer.count, layer.stride, layer.calls] for name, layer in self.items()}
        tensors = {
            f"{name}:{t}": getattr(layer, t).clone(memory_format=torch.contiguous_format)
            for name, layer in self.items()
            for t in TENSORS
        }
        save_file(tensors, path, {KEY: json.dumps(record)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote. Raises CorruptCheckpointError for any other file."""
        check_type("path", path, (str, os.PathLike), "a path")
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {})[KEY])
                layers = {
                    name: InputStatistics(
                        count, stride=stride, calls=calls, **{t: file.get_tensor(f"{name}:{t}") for t in TENSORS}
                    )
                    for name, (count, stride, calls) in record.items()
                }
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CorruptCheckpointError(f"{path} holds no statistics of ocsquant.calibrate: {error!r}") from error
        for name, layer in layers.items():
            if not layer._is_sound():
                raise CorruptCheckpointError(f"{path}: the statistics of '{name}' do not fit together")
        return cls(layers)


def _gather(layer: InputStatistics, world: int) -> list[InputStatistics]:
    from torch import distributed

    rows = layer.sample.shape[0]
    sample, half = torch.zeros(SAMPLE, layer.total.numel()), torch.zeros(SAMPLE, dtype=torch.int8)
    sample[:rows], half[:rows] = layer.sample, layer.half
    head = torch.tensor([layer.count, rows, layer.stride, layer.calls])
    gathered = []
    for tensor in (head, layer.low, layer.high, layer.total, layer.squares, sample, half):
        parts = [torch.empty_like(tensor) for _ in range(world)]
        distributed.all_gather(parts, tensor)
        gathered.append(parts)
    return [
        InputStatistics(int(h[0]), low, high, total, squares, x[: int(h[1])], half[: int(h[1])], int(h[2]), int(h[3]))
        for h, low, high, total, squares, x, half in zip(*gathered, strict=True)
    ]


@contextlib.contextmanager
def calibrate(model: nn.Module) -> Iterator[Statistics]:
    """Watch the inputs of a model's linear, convolution, LSTM and GRU layers while you run it.

    with ocsquant.calibrate(model) as statistics:
        for batch in batches:
            model(**batch)
    ocsquant.quantize(model, recipe, calibration=statistics)

    Gradients, mode and outputs of the model are its own affair; the hooks are gone after the block.

    Raises:
        NonFiniteError: an input holds NaN or Inf; names the layer.
        NotCalibratedError: at the end of the block, if no layer was reached at all.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    statistics = Statistics()

    def look(path: str, module: nn.Module, given: Any, state: Any) -> None:
        for name, x in tokens(module, given, state):
            key = statistics_key(path, name)
            check_finite(x, f"the input of {key or 'the model'}")
            statistics._layers.setdefault(key, InputStatistics.empty(x.shape[1])).add(x)

    with watch(model, look) as watched:
        yield statistics
    if not statistics:
        raise NotCalibratedError(
            f"calibration reached none of the {watched} float layers of {type(model).__name__} that have inputs "
            f"(a compiled model must be calibrated before its first call)"
        )


def check_finite(x: Tensor, where: str) -> None:
    """Raise NonFiniteError for NaN or Inf."""
    bad = ~x.isfinite()
    if bad.any():
        raise NonFiniteError(where, int(bad.sum()), int(bad.flatten().nonzero()[0]))


def check_batches(calibration: Any) -> None:
    """Raise ArgumentTypeError for anything but an iterable of batches."""
    if isinstance(calibration, (Tensor, Mapping, str, bytes)) or not isinstance(calibration, Iterable):
        expected = "an iterable of batches or an ocsquant.Statistics"
        raise ArgumentTypeError("calibration", expected, type(calibration).__name__)


def statistics_of(model: nn.Module, calibration: Any, progress: Any) -> Statistics:
    """Statistics from themselves, or from batches: a mapping calls model(**batch), a tuple or list model(*batch)."""
    if isinstance(calibration, Statistics):
        keys = (path for path, _ in model.named_modules())
        if not any(
            key == path or key.startswith(statistics_key(path, "weight_")) for path in keys for key in calibration
        ):
            raise ArgumentError("calibration", "statistics of this model's layers", repr(calibration))
        return calibration
    check_batches(calibration)
    with calibrate(model) as statistics:
        run_batches(model, progress(calibration))
    return statistics
