"""Which nonlinearity alone reads the output of a linear layer, proven from the code that calls the two."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from ocsquant.nn.fused import FusedNonlinearity, nonlinearity_of
from ocsquant.planning import Target
from ocsquant.transaction import Change, hooked, set_attribute

# Methods that a forward does not call.
SETUP = {"__init__", "__setstate__", "__repr__", "extra_repr", "reset_parameters", "_reset_parameters"}
METHODS = (ast.FunctionDef, ast.AsyncFunctionDef)
READABLE = {"weight", "bias", "in_features", "out_features"}  # of a quantized layer as of a float one


def fuse_nonlinearities(model: nn.Module, targets: list[Target]) -> list[Change]:
    """Let integer linear layers compute the nonlinearity that follows them; changes for the nonlinearities' places."""
    holders: dict[int, dict[tuple[int, str], nn.Module]] = {}
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None:
                holders.setdefault(id(child), {})[id(module), name] = module
    changes: list[Change] = []
    for target in targets:
        recipe, places = target.recipe, holders.get(id(target.module), {})
        integer = target.kind == "linear" and recipe.activations is not None and recipe.weights.bits is not None
        if not integer or len(places) != 1 or target.module._forward_hooks:
            continue
        ((_, name), holder) = next(iter(places.items()))
        place = follower(holder, name)
        if place is None:
            continue
        found = placed(holder, place)
        nonlinearity = nonlinearity_of(found)
        if nonlinearity is None or (isinstance(found, nn.Module) and hooked(found)):
            continue
        target.nonlinearity = nonlinearity
        target.notes.append(f"computes the {nonlinearity} that follows")
        changes.append(replace(holder, place, FusedNonlinearity(nonlinearity)))
    return changes


def placed(holder: nn.Module, name: str) -> object:
    """The submodule or plain attribute of that name."""
    return holder._modules[name] if name in holder._modules else holder.__dict__.get(name)


def replace(holder: nn.Module, name: str, new: FusedNonlinearity) -> Change:
    """Only in this place: the same module may serve in others."""
    if name not in holder._modules:
        return set_attribute(holder, name, new)
    modules, old = holder._modules, holder._modules[name]
    new.train(holder.training)
    return lambda: modules.__setitem__(name, new), lambda: modules.__setitem__(name, old)


def follower(holder: nn.Module, name: str) -> str | None:
    """What `holder` calls on the output of its child `name`, and on nothing else, where its code proves that."""
    if "forward" in holder.__dict__:
        return None
    if type(holder).forward is nn.Sequential.forward:
        names = list(holder._modules)
        return dict(pairwise(names)).get(name)
    return calls(type(holder)).get(name)  # type: ignore[arg-type]  # mypy asks whether its instances have a hash


@functools.cache
def calls(cls: type[nn.Module]) -> dict[str, str]:
    """`a` -> `b` for every `self.b(self.a(...))` of a class whose methods name neither anywhere else.

    Also as two statements, one after the other: `h = self.a(...)` and `h = self.b(h)`.
    """
    trees: list[ast.ClassDef] = []
    overridden: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        if base.__module__ in ("abc", "typing"):
            continue
        try:
            lines, first = inspect.getsourcelines(base)
            (tree,) = ast.parse(textwrap.dedent("".join(lines))).body
            assert isinstance(tree, ast.ClassDef)
        except (OSError, TypeError, SyntaxError):  # made at run time, or nowhere to be read
            return {}
        forward = base.__dict__.get("forward")
        if forward is not None and not _written_in(inspect.unwrap(forward), base, first, len(lines)):
            return {}
        if not any(isinstance(n, ast.Name) and n.id == "super" for t in trees for n in _run(t)):
            tree.body = [n for n in tree.body if getattr(n, "name", None) not in overridden]
        overridden |= {n.name for n in tree.body if isinstance(n, METHODS)}
        trees.append(tree)
    found = dict(pair for tree in trees for pair in _pairs(tree))
    counts: dict[str, int] = {}
    for tree in trees:
        for name in _names(tree):
            counts[name] = counts.get(name, 0) + 1
    return {a: b for a, b in found.items() if counts[a] == counts[b] == 1}


def _written_in(forward: object, cls: type, first: int, count: int) -> bool:
    """Whether a function is the one in a class's source, not put there later."""
    code = getattr(forward, "__code__", None)
    if code is None or code.co_filename != inspect.getsourcefile(cls):
        return False
    return first <= code.co_firstlineno < first + count


def _run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of methods that only set up."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [n for n in ast.iter_child_nodes(node) if not (isinstance(n, METHODS) and n.name in SETUP)]


def _names(tree: ast.AST) -> Iterator[str]:
    """Every mention of an attribute, `self.a.weight` and its like excepted; strings may name one too."""
    nodes = list(_run(tree))
    loads = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    read = {id(n.value) for n in loads if n.attr in READABLE}
    for node in nodes:
        if isinstance(node, ast.Attribute) and id(node) not in read:
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _called(node: ast.AST) -> str | None:
    """a, of `self.a(...)`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "self":
            return node.func.attr
    return None


def _alone(call: ast.AST) -> ast.AST | None:
    """The one argument of a call that has no other."""
    assert isinstance(call, ast.Call)
    return call.args[0] if len(call.args) == 1 and not call.keywords else None


def _pairs(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in _run(tree):
        b = _called(node)
        if b is not None and (inner := _alone(node)) is not None and (a := _called(inner)) is not None:
            yield a, b
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield from _in_turn(block)


def _in_turn(block: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Of statements that follow each other, the second overwriting what the first set."""
    for first, second in pairwise(block):
        a, b = _assigned(first), _assigned(second)
        if a is None or b is None or a[0] != b[0]:
            continue
        argument = _alone(b[2])
        if isinstance(argument, ast.Name) and argument.id == a[0]:
            yield a[1], b[1]


def _assigned(statement: ast.stmt) -> tuple[str, str, ast.Call] | None:
    """h, a and the call, of `h = self.a(...)`."""
    if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
        return None
    target, called = statement.targets[0], _called(statement.value)
    if not isinstance(target, ast.Name) or called is None:
        return None
    assert isinstance(statement.value, ast.Call)
    return target.id, called, statement.value
