"""The quantized replacements of nn.LSTM and nn.GRU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ocsquant import ops
from ocsquant.errors import ArgumentError
from ocsquant.nn.linear import FLOATS, QuantizedLinear
from ocsquant.nn.quantized import Quantized

SETTINGS = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")


class QuantizedRecurrent(Quantized):
    """What `QuantizedLSTM` and `QuantizedGRU` share: the calling convention of torch's modules, in integers.

    Built by `ocsquant.quantize`. Every weight is a `QuantizedLinear`, named as the float one: `ih_l0` holds
    weight_ih_l0 and bias_ih_l0, `hh_l0_reverse` those of the hidden state in the other direction; `weight_ih_l0` and so
    on still read as dequantized float32. The input is projected in one product over all steps. States are kept in
    float32; the result has the dtype of the input (float32, bfloat16, float16 or float64).
    """

    gates: int
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def __init__(self, like: Any, parts: dict[str, QuantizedLinear]) -> None:
        """like: a module (or anything else) with the attributes `SETTINGS`; parts: by `part_names(like)`."""
        super().__init__()
        for name in SETTINGS:
            setattr(self, name, getattr(like, name))
        self.bits = parts["ih_l0"].bits
        for name, part in parts.items():
            self.add_module(name, part)

    def __getattr__(self, name: str) -> Any:
        kind, _, part = name.partition("_")
        if kind in ("weight", "bias") and part in self.__dict__["_modules"]:
            return getattr(self._modules[part], kind)
        return super().__getattr__(name)

    @property
    def parts(self) -> list[QuantizedLinear]:
        return [self._modules[name] for name in part_names(self)]  # type: ignore[misc]

    @property
    def activation_bits(self) -> int:
        return self.parts[0].activation_bits

    @property
    def split_channels(self) -> int:
        return sum(part.split_channels for part in self.parts)

    @property
    def float_bytes(self) -> int:
        return sum(part.float_bytes for part in self.parts)

    @property
    def mode(self) -> str:
        return self.origin

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Of one direction."""
        return self.proj_size or self.hidden_size

    def flatten_parameters(self) -> None:
        """Nothing to do: there is one copy of every weight."""

    def settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in SETTINGS}
        parts = {name: part.settings() for name, part in zip(part_names(self), self.parts, strict=True)}
        return {"kind": type(self).__name__, **own, "parts": parts}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in SETTINGS)

    def _run(self, input: Tensor | PackedSequence, states: tuple[Tensor, ...] | None) -> tuple[Any, tuple[Tensor, ...]]:
        """The output in the form of the input, and the last states [layers * directions, (batch,) size]."""
        order = None
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            self._check_input(data, (2,))
            batch = int(sizes[0])
            rows, one = data, False
        else:
            self._check_input(input, (2, 3))
            one = input.dim() == 2
            steps = input.unsqueeze(1) if one else input.transpose(0, 1) if self.batch_first else input
            batch, sizes, rows = steps.shape[1], None, steps.flatten(0, 1)
        first = self._first_states(states, batch, one, rows)
        if order is not None:
            first = [state.index_select(1, order) for state in first]
        y, last = self._run_layers(rows.float(), [state.float() for state in first], sizes)
        y, last = y.to(rows.dtype), [state.to(rows.dtype) for state in last]
        if isinstance(input, PackedSequence):
            if back is not None:
                last = [state.index_select(1, back) for state in last]
            return PackedSequence(y, sizes, order, back), tuple(last)
        y = y.unflatten(0, (steps.shape[0], batch))
        if one:
            return y.squeeze(1), tuple(state.squeeze(1) for state in last)
        return y.transpose(0, 1) if self.batch_first else y, tuple(last)

    def _check_input(self, x: Tensor, dims: tuple[int, ...]) -> None:
        if not isinstance(x, Tensor) or x.dim() not in dims or x.shape[-1] != self.input_size:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError("input", f"{' or '.join(map(str, dims))} dimensions, the last {self.input_size}", got)
        if x.dtype not in FLOATS:
            raise ArgumentError("input", "float32, bfloat16, float16 or float64", x.dtype)

    def _first_states(self, states: tuple[Tensor, ...] | None, batch: int, one: bool, rows: Tensor) -> list[Tensor]:
        count = self.num_layers * self.num_directions
        shapes = [(count, batch, size) for size in self._state_sizes]
        if states is None:
            return [rows.new_zeros(shape) for shape in shapes]
        given = []
        for state, shape in zip(states, shapes, strict=True):
            wanted = (count, shape[2]) if one else shape
            if not isinstance(state, Tensor) or tuple(state.shape) != wanted or not state.is_floating_point():
                got = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
                raise ArgumentError("hx", f"a float tensor {list(wanted)}", got)
            given.append(state.unsqueeze(1) if one else state)
        return given

    def _run_layers(self, rows: Tensor, first: list[Tensor], sizes: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        last: list[list[Tensor]] = [[] for _ in first]
        for layer in range(self.num_layers):
            span = slice(layer * self.num_directions, (layer + 1) * self.num_directions)
            states = [state[span] for state in first]
            if torch.is_grad_enabled() and (rows.requires_grad or any(s.requires_grad for s in states)):
                rows, ended = self._straight_through(layer, rows, states, sizes)
            else:
                rows, ended = self._run_layer(layer, rows, states, sizes)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                rows = nn.functional.dropout(rows, self.dropout)
            for all_of, state in zip(last, ended, strict=True):
                all_of.append(state)
        return rows, [all_of[0] if self.num_layers == 1 else torch.cat(all_of) for all_of in last]

    def _run_layer(
        self, layer: int, rows: Tensor, states: list[Tensor], sizes: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        results = [
            self._run_direction(suffix, rows, [state[d] for state in states], sizes, d == 1)
            for d, suffix in enumerate(_suffixes(self, layer))
        ]
        if len(results) == 1:
            return results[0][0], [state.unsqueeze(0) for state in results[0][1:]]
        outputs, *ended = ([result[i] for result in results] for i in range(1 + len(states)))
        return torch.cat(outputs, 1), [torch.stack(state) for state in ended]

    def _straight_through(
        self, layer: int, rows: Tensor, states: list[Tensor], sizes: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The integer result with the gradient of the float layer whose weights are the dequantized ones."""
        with torch.no_grad():
            y, ended = self._run_layer(layer, rows, states, sizes)
        flat = [
            tensor
            for suffix in _suffixes(self, layer)
            for kind, part in _order(self)
            if (tensor := getattr(self._modules[part + suffix], kind)) is not None
        ]
        settings = (self.bias, 1, 0.0, False, self.bidirectional)
        state: Any = states if len(states) > 1 else states[0]
        run = getattr(torch._VF, self.origin.lower())
        if sizes is None:
            steps = rows.unflatten(0, (-1, states[0].shape[1]))
            smooth, *smooth_ended = run(steps, state, flat, *settings, False)
            smooth = smooth.flatten(0, 1)
        else:
            smooth, *smooth_ended = run(rows, sizes, state, flat, *settings)
        return _with_gradient(y, smooth), [_with_gradient(a, b) for a, b in zip(ended, smooth_ended, strict=True)]

    @property
    def _state_sizes(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _run_direction(
        self, suffix: str, rows: Tensor, states: list[Tensor], sizes: Tensor | None, reverse: bool
    ) -> tuple[Tensor, ...]:
        """Outputs [rows, output_size] and last states [batch, size] of one layer and direction."""
        raise NotImplementedError


class QuantizedLSTM(QuantizedRecurrent):
    """nn.LSTM over integer weights: `forward(input, (h_0, c_0))` gives output, (h_n, c_n)."""

    origin = "LSTM"
    kernel = "quantized_lstm"
    gates = 4

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            raise ArgumentError("hx", "(h_0, c_0) or None", type(hx).__name__)
        output, (h, c) = self._run(input, None if hx is None else tuple(hx))
        return output, (h, c)

    @property
    def _state_sizes(self) -> tuple[int, ...]:
        return self.output_size, self.hidden_size

    def _run_direction(
        self, suffix: str, rows: Tensor, states: list[Tensor], sizes: Tensor | None, reverse: bool
    ) -> tuple[Tensor, ...]:
        gates = self._modules["ih" + suffix](rows)  # type: ignore[misc]
        hh, h, c = self._modules["hh" + suffix], *states
        operands: tuple[Any, ...] = (*_operands(hh), sizes, reverse)
        if self.proj_size:
            p: Any = self._modules["hr" + suffix]
            operands += (p.packed, p.scale, p.tail_index, p.group_size, p.weight_bits, p.zero, p.levels)
        return ops.quantized_lstm(gates, h, c, *operands)


class QuantizedGRU(QuantizedRecurrent):
    """nn.GRU over integer weights: `forward(input, h_0)` gives output, h_n."""

    origin = "GRU"
    kernel = "quantized_gru"
    gates = 3

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        output, (h,) = self._run(input, None if hx is None else (hx,))
        return output, h

    @property
    def _state_sizes(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _run_direction(
        self, suffix: str, rows: Tensor, states: list[Tensor], sizes: Tensor | None, reverse: bool
    ) -> tuple[Tensor, ...]:
        gates = self._modules["ih" + suffix](rows)  # type: ignore[misc]
        operands: tuple[Any, ...] = (*_operands(self._modules["hh" + suffix]), sizes, reverse)
        return ops.quantized_gru(gates, states[0], *operands)


RECURRENT_FORMS: dict[str, type[QuantizedLSTM | QuantizedGRU]] = {"LSTM": QuantizedLSTM, "GRU": QuantizedGRU}


def recurrent_form(module: nn.RNNBase) -> type[QuantizedLSTM | QuantizedGRU]:
    """Of a torch module or a subclass of one."""
    return RECURRENT_FORMS["LSTM" if isinstance(module, nn.LSTM) else "GRU"]


def part_names(like: Any) -> Iterator[str]:
    """Of the weights of a torch module, quantized or not, or of anything with its `SETTINGS`, in the module's order."""
    for layer in range(like.num_layers):
        for suffix in _suffixes(like, layer):
            yield from (part + suffix for part in ("ih", "hh", *(("hr",) if like.proj_size else ())))


def part_sizes(like: Any, name: str, gates: int) -> tuple[int, int]:
    """Outputs and inputs of that weight."""
    part, layer, *_ = name.split("_")
    outputs = like.proj_size or like.hidden_size
    if part == "hr":
        return like.proj_size, like.hidden_size
    below = like.input_size if layer == "l0" else outputs * (2 if like.bidirectional else 1)
    return gates * like.hidden_size, below if part == "ih" else outputs


def _suffixes(like: Any, layer: int) -> list[str]:
    return [f"_l{layer}", f"_l{layer}_reverse"][: 2 if like.bidirectional else 1]


def _order(like: Any) -> list[tuple[str, str]]:
    """What torch's function for one direction is given."""
    biases = [("bias", "ih"), ("bias", "hh")] if like.bias else []
    return [("weight", "ih"), ("weight", "hh"), *biases, *([("weight", "hr")] if like.proj_size else [])]


def _operands(hh: Any) -> tuple[Any, ...]:
    # Read from the dictionary, as QuantizedLinear does.
    a, b = hh.activations, hh._buffers
    weight = (b["packed"], b["scale"], b["bias"], b["tail_index"])
    limits = (a.bits, a.max_outliers, a.outlier_threshold)
    return *weight, *limits, hh.group_size, hh.weight_bits, b["zero"], b["levels"]


def _with_gradient(value: Tensor, smooth: Tensor) -> Tensor:
    return value + (smooth - smooth.detach())
