"""What reaches a layer while the model runs: hooks that look, and the input each of its weights is multiplied with."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from ocsquant.errors import ArgumentError, ArgumentTypeError
from ocsquant.layers import CONVOLUTIONS, RECURRENT, kind_of

PATCHES = 1 << 22  # values of a convolution's patches written out at a time
Look = Callable[[str, nn.Module, Any, Any], None]  # path, module, its input, an LSTM's or GRU's initial state


@contextlib.contextmanager
def watch(model: nn.Module, look: Look, paths: set[str] | None = None) -> Iterator[int]:
    """Call look(path, module, input, state) before every linear, convolution, LSTM and GRU; gives how many those are.

    paths: only these. The hooks are gone after the block.
    """
    lock, handles = threading.Lock(), []
    # Padded batches would reach the layers of these as nested tensors.
    nesting = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    try:
        for module in nesting:
            module.use_nested_tensor = False
        for path, module in model.named_modules():
            if kind_of(module) in ("linear", "conv", "recurrent") and (paths is None or path in paths):
                handles.append(module.register_forward_pre_hook(_hook(path, look, lock), with_kwargs=True))
        yield len(handles)
    finally:
        for handle in handles:
            handle.remove()
        for module in nesting:
            module.use_nested_tensor = True


def _hook(path: str, look: Look, lock: threading.Lock) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input")
        state = args[1] if len(args) > 1 else kwargs.get("hx")
        if isinstance(given, (Tensor, PackedSequence)):
            with torch.no_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False), lock:
                look(path, module, given, state)

    return hook


def run_batches(model: nn.Module, batches: Iterable[Any]) -> None:
    """Run the model on each batch, in evaluation mode without gradients.

    A mapping calls model(**batch), a tuple or list model(*batch), anything else model(batch). Raises ArgumentError
    where there is no batch.
    """
    count = 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            count += 1
            args, kwargs = arguments(batch)
            model(*args, **kwargs)
    if count == 0:
        raise ArgumentError("calibration", "an iterable of at least one batch", "an empty one")


def output_of(model: nn.Module, batch: Any) -> Any:
    """What the model gives for one batch in evaluation mode; the random numbers it draws are the same every time."""
    args, kwargs = arguments(batch)
    with evaluating(model), torch.random.fork_rng(devices=[]):
        return model(*args, **kwargs)


def change_of(exact: Any, got: Any) -> float:
    """Of two outputs, the largest change of a floating-point tensor over its norm; inf where one has another shape."""
    changes = [0.0]
    for one, other in zip(tree_leaves(exact), tree_leaves(got), strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            alike = isinstance(other, Tensor) and other.shape == one.shape
            size = one.detach().norm().clamp(min=1e-20)
            changes.append(float((other - one).detach().norm() / size) if alike else math.inf)
    return math.nan if any(map(math.isnan, changes)) else max(changes)


def check_batch_or_bool(arg: str, value: Any) -> None:
    """Raise ArgumentTypeError for anything but True, False and what a model can be run on."""
    if not isinstance(value, (bool, Tensor, tuple, list, Mapping)):
        expected = "True, False or a batch to run the model on: a tensor, a tuple or list, or a mapping"
        raise ArgumentTypeError(arg, expected, repr(value))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def arguments(batch: Any) -> tuple[Sequence[Any], dict[str, Any]]:
    """What a model is called with for a batch. Tensors are copies: it may change them, and gets them again."""
    if isinstance(batch, Mapping):
        return (), {key: _copied(value) for key, value in batch.items()}
    return [_copied(value) for value in batch] if isinstance(batch, (tuple, list)) else (_copied(batch),), {}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(v) for key, v in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def statistics_key(path: str, weight: str) -> str:
    """The name under which the inputs of a weight are kept: a recurrent layer has several."""
    return path if weight == "weight" else f"{path}.{weight}".lstrip(".")


def tokens(module: nn.Module, given: Any, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and input of each weight: float32 [tokens, channels], of a convolution its pixels.

    Nothing for an input that does not fit the layer, which says so itself.
    """
    if isinstance(module, RECURRENT):
        yield from _recurrent_tokens(module, given, state)
        return
    dim, channels = -1, getattr(module, "in_features", None)
    if isinstance(module, CONVOLUTIONS):
        dim, channels = -len(module.kernel_size) - 1, module.in_channels
    if isinstance(given, Tensor) and given.dim() >= -dim and given.shape[dim] == channels and given.numel():
        yield "weight", _float(given.movedim(dim, -1).reshape(-1, given.shape[dim]))


def columns(module: nn.Module, given: Any, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Name of each weight and the rows [m, k] that its [n, k] matrix is multiplied with: a convolution's patches."""
    if not isinstance(module, CONVOLUTIONS):
        yield from tokens(module, given, state)
    elif module.groups == 1:  # with groups, every group of outputs has patches of its own
        spatial = len(module.kernel_size)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        images = given if given.dim() == spatial + 2 else given[None]
        k = module.weight[0].numel()
        for part in images.split(max(1, PATCHES // max(1, images[0, 0].numel() * k))):
            x = nn.functional.pad(_float(part), module._reversed_padding_repeated_twice, mode=mode)
            for d, (size, dilation, stride) in enumerate(
                zip(module.kernel_size, module.dilation, module.stride, strict=True)
            ):
                x = x.unfold(2 + d, (size - 1) * dilation + 1, stride)[..., ::dilation]
            yield "weight", x.movedim(1, spatial + 1).reshape(-1, k)


def _float(x: Tensor) -> Tensor:
    """Of the values, which may be the tensor's own: to be read, not kept."""
    return x.detach().to("cpu", torch.float32)


def _recurrent_tokens(module: nn.LSTM | nn.GRU, given: Any, state: Any) -> Iterator[tuple[str, Tensor]]:
    """The sequence that reaches each layer, and the hidden states that its recurrent weights see."""
    x, lengths = _time_major(module, given)
    if x.shape[-1] != module.input_size or x.numel() == 0:
        return
    batch, directions = x.shape[1], 2 if module.bidirectional else 1
    size = getattr(module, "proj_size", 0) or module.hidden_size
    hidden, cell = _initial_state(module, state, batch, size)
    inside = torch.arange(x.shape[0])[:, None] < lengths
    for layer in range(module.num_layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        begin = hidden[rows] if cell is None else (hidden[rows], cell[rows])
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y = pad_packed_sequence(_one_layer(module, layer, x.shape[-1])(packed, begin)[0])[0]
        for d, suffix in enumerate(("", "_reverse")[:directions]):
            own, start = y[..., d * size : (d + 1) * size], hidden[rows][d]
            before = torch.cat([start[None], own[:-1]])
            if d == 1:  # each sequence begins at its last step
                before = torch.cat([own[1:], start[None]])
                before[lengths - 1, torch.arange(batch)] = start
            yield f"weight_ih_l{layer}{suffix}", x[inside]
            yield f"weight_hh_l{layer}{suffix}", before[inside]
        x = y


def _time_major(module: nn.LSTM | nn.GRU, given: Any) -> tuple[Tensor, Tensor]:
    """[steps, batch, channels] and the length of each sequence."""
    if isinstance(given, PackedSequence):
        x, lengths = pad_packed_sequence(given)
        return _float(x), lengths
    x = _float(given)
    if x.dim() == 2:
        x = x[:, None]
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, torch.full((x.shape[1],), x.shape[0])


def _initial_state(module: nn.LSTM | nn.GRU, state: Any, batch: int, size: int) -> tuple[Tensor, Tensor | None]:
    """Hidden states [layers * directions, batch, size] and an LSTM's cell states."""
    parts = list(state) if isinstance(state, tuple) else [state, None]
    sizes = (size, module.hidden_size) if isinstance(module, nn.LSTM) else (size,)
    many = module.num_layers * (2 if module.bidirectional else 1)
    full = [
        torch.zeros(many, batch, width, dtype=torch.float32)
        if part is None
        else _float(part).reshape(many, batch, width)
        for width, part in zip(sizes, parts, strict=False)
    ]
    return full[0], full[1] if len(full) > 1 else None


def _one_layer(module: nn.LSTM | nn.GRU, layer: int, width: int) -> nn.Module:
    """One layer of a stack, on its weights."""
    options: dict[str, Any] = {"bias": module.bias, "bidirectional": module.bidirectional}
    if getattr(module, "proj_size", 0):
        options["proj_size"] = module.proj_size
    base: Any = nn.LSTM if isinstance(module, nn.LSTM) else nn.GRU
    one = base(width, module.hidden_size, device="meta", **options)
    for name in list(one._parameters):
        one._parameters[name] = nn.Parameter(_float(getattr(module, name.replace("_l0", f"_l{layer}"))), False)
    one._init_flat_weights()
    return one.eval()
