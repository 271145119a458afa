"""What the source of a module's class says about the calls of its children: reads code, runs none."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from torch import nn

# Methods that a forward does not call.
SETUP = {"__init__", "__setstate__", "__repr__", "extra_repr", "reset_parameters", "_reset_parameters"}
METHODS = (ast.FunctionDef, ast.AsyncFunctionDef)
READABLE = {"weight", "bias", "in_features", "out_features"}  # of a quantized layer as of a float one
SIMPLE = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)
# What may not run, or not once, though the statement around it does.
UNCERTAIN = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@functools.cache
def calls(cls: type[nn.Module]) -> dict[str, str]:
    """`a` -> `b` for every `self.b(self.a(...))` of a class whose methods name neither anywhere else.

    Also as two statements, one after the other: `h = self.a(...)` and `h = self.b(h)`.
    """
    trees = _trees(cls)
    found = dict(pair for tree in trees for pair in _pairs(tree))
    counts = _mentions(trees)
    return {a: b for a, b in found.items() if counts[a] == counts[b] == 1}


@functools.cache
def siblings(cls: type[nn.Module]) -> list[list[str]]:
    """`a`, `b`, ... for calls `self.a(h)`, `self.b(h)`, ... that run one after the other, on an h that nothing changes
    meanwhile, in a class whose methods name them nowhere else. In the order of the calls.
    """
    trees = _trees(cls)
    counts = _mentions(trees)
    groups = [[a for a in group if counts[a] == 1] for tree in trees for group in _siblings(tree)]
    return [group for group in groups if len(group) > 1]


def _mentions(trees: list[ast.ClassDef]) -> Counter[str]:
    return Counter(name for tree in trees for name in _names(tree))


def _trees(cls: type[nn.Module]) -> list[ast.ClassDef]:
    """The class and its bases up to nn.Module, without overridden methods; none where one cannot be read."""
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
            return []
        forward = base.__dict__.get("forward")
        if forward is not None and not _written_in(inspect.unwrap(forward), base, first, len(lines)):
            return []
        if not any(isinstance(n, ast.Name) and n.id == "super" for t in trees for n in _run(t)):
            tree.body = [n for n in tree.body if getattr(n, "name", None) not in overridden]
        overridden |= {n.name for n in tree.body if isinstance(n, METHODS)}
        trees.append(tree)
    return trees


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


def _siblings(tree: ast.AST) -> Iterator[list[str]]:
    for node in _run(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                for argument in {a for s in block if isinstance(s, SIMPLE) for _, a, _ in _reads(s)}:
                    yield from _runs(block, argument)


def _runs(block: list[ast.stmt], argument: str) -> Iterator[list[str]]:
    """Calls on `argument` in statements that do nothing else to it."""
    run: list[str] = []
    for statement in block:
        mentions = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == argument]
        reads = [(a, n) for a, h, n in _reads(statement) if h == argument] if isinstance(statement, SIMPLE) else []
        stored = any(isinstance(n.ctx, ast.Store) for n in mentions)
        if len(mentions) - len(reads) > stored or (mentions and not reads):
            yield run
            run = []
            continue
        run = run + [a for a, _ in reads]
        if stored:
            yield run
            run = []
    yield run


def _reads(statement: ast.stmt) -> list[tuple[str, str, ast.Call]]:
    """a, h and the call, of every `self.a(h)` that certainly runs with the statement, in that order."""
    found: list[tuple[str, str, ast.Call]] = []
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        if isinstance(node, UNCERTAIN):
            continue
        a = _called(node)
        if a is not None and isinstance(argument := _alone(node), ast.Name):
            assert isinstance(node, ast.Call)
            found.append((a, argument.id, node))
        waiting += ast.iter_child_nodes(node)
    return sorted(found, key=lambda read: (read[2].lineno, read[2].col_offset))
