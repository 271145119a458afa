"""How the modules of a model follow each other, where torch.fx can trace it: what a plan may conclude from that."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

# Of whose result nobody can tell how its input lay in memory, but by how the result lies.
PASSING_MODULES = (
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.Identity, nn.Dropout, nn.Dropout2d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Upsample,
)  # fmt: skip
PASSING_FUNCTIONS = {
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.mul, torch.cat,
    torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish,
    F.hardswish, F.hardsigmoid, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
    F.interpolate, F.dropout, F.dropout2d,
}  # fmt: skip
PASSING_METHODS = {"add", "add_", "mul", "mul_", "relu", "relu_", "sigmoid", "tanh", "clone", "detach"}
# Whose result lies as it always does, or is no tensor.
ENDING_MODULES = (nn.Flatten,)
ENDING_FUNCTIONS = {torch.flatten, torch.mean, torch.sum, getattr}
ENDING_METHODS = {"flatten", "reshape", "mean", "sum", "contiguous", "size", "dim"}


@dataclass(frozen=True)
class Graph:
    """The calls of one forward; `path` names modules of the model itself."""

    nodes: tuple[fx.Node, ...]
    modules: dict[str, nn.Module]

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def calls(self) -> Counter[int]:
        """How often each module is called."""
        return Counter(id(module) for node in self.nodes if (module := self.module(node)) is not None)

    def pairs(self) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """Module, and path and module of what takes its output, where nothing else does; each is called once."""
        calls = self.calls()
        for node in self.nodes:
            module, users = self.module(node), list(node.users)
            if module is None or calls[id(module)] > 1 or len(users) != 1:
                continue
            after = self.module(users[0])
            if after is not None and calls[id(after)] == 1 and users[0].args == (node,) and not users[0].kwargs:
                yield module, str(users[0].target), after

    def hides_layout(self, module: nn.Module, anchors: set[int]) -> bool:
        """Whether nothing but `anchors` (modules by id: their output lies as they were told) and what does not care
        sees how the outputs of `module` lie in memory.
        """
        pending, seen = [node for node in self.nodes if self.module(node) is module], set[fx.Node]()
        found = bool(pending)
        while pending:
            for user in pending.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                kind = self._kind(user, anchors)
                if kind is None:
                    return False
                if kind:
                    pending.append(user)
        return found

    def _kind(self, node: fx.Node, anchors: set[int]) -> bool | None:
        """Whether a call hands the layout on; None: it may show it."""
        module = self.module(node)
        if module is not None:
            if id(module) in anchors or type(module) in ENDING_MODULES:
                return False
            return True if type(module) in PASSING_MODULES else None
        if node.op == "call_function":
            passing, ending = node.target in PASSING_FUNCTIONS, node.target in ENDING_FUNCTIONS
        elif node.op == "call_method":
            passing, ending = node.target in PASSING_METHODS, node.target in ENDING_METHODS
        else:
            return None
        return True if passing else False if ending else None


def trace(model: nn.Module) -> tuple[Graph | None, str]:
    """The calls of a forward, or None and why not. The model is not changed: its twin runs, over the same tensors."""
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    try:
        traced = fx.Tracer().trace(copy.deepcopy(model, shared))
    except Exception as error:  # whatever the model's own code raises when it is given a proxy
        return None, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return Graph(tuple(traced.nodes), modules), ""
