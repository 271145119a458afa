"""What the source of a module's class says about the calls of its children: reads code, runs none."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import CodeType, FunctionType, MethodType

from torch import nn

# Methods that a forward does not call.
SETUP = {"__init__", "__setstate__", "__repr__", "extra_repr", "reset_parameters", "_reset_parameters"}
METHODS = (ast.FunctionDef, ast.AsyncFunctionDef)
UNNAMED = {"children", "modules", "_modules", "__dict__", "get_submodule", "__getattr__", "__getattribute__", "apply"}
DECORATORS = ("torch", "transformers", "functools", "contextlib")  # packages and modules
READABLE = {"weight", "bias", "in_features", "out_features"}  # of a quantized layer as of a float one
SIMPLE = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)
# What may not run, or not once, though the statement around it does.
UNCERTAIN = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def calls(holder: nn.Module) -> dict[str, tuple[str, int]]:
    """`a` -> `b` for every `self.b(self.a(...))` of a module whose class names `a` nowhere else, and does nothing with
    itself but read attributes by name; and in how many places it calls `b`. It does nothing with `b` but call it.

    Also as two statements, one after the other: `h = self.a(...)` and `h = self.b(h)`.
    """
    return {a: (b, places) for a, (b, places, _) in _sound(holder, _pairs).items()}


def sums(holder: nn.Module) -> dict[str, tuple[str, int, bool]]:
    """`a` -> `b` for every `self.b(self.a(...) + x)` under the conditions of `calls`, in how many places `b` is called,
    and whether code runs between the call of `a` and the addition that might change what `a` has read.

    Also as statements of a method itself, with others between that go straight on and do not name h:
    `h = self.a(...)`, `h += x` or `h = h + x`, and `h = self.b(h)`, or it returned.
    """
    return _sound(holder, _summed)


def _sound(
    holder: nn.Module, pairs: Callable[[ast.ClassDef], Iterator[tuple[str, str, bool]]]
) -> dict[str, tuple[str, int, bool]]:
    """Those pairs of a child and what is called on its output that the rest of the code leaves alone."""
    classes = _trees(holder)
    # What torch's own transformer layers read by other ways than names is not what they call.
    if any(_hides_reads(tree) for cls, tree in classes.items() if not cls.__module__.startswith("torch.")):
        return {}
    trees = list(classes.values())
    found = {a: (b, later) for tree in trees for a, b, later in pairs(tree)}
    counts = _mentions(trees)
    kept = {name for tree in trees for name in _kept(tree)}
    called = Counter(_called(node) for tree in trees for node in _run(tree))
    sound = {a: b for a, b in found.items() if counts[a] == 1 and counts[b[0]] == called[b[0]] and a not in kept}
    return {a: (b, counts[b], later) for a, (b, later) in sound.items()}


def siblings(holder: nn.Module) -> list[list[str]]:
    """`a`, `b`, ... for calls `self.a(h)`, `self.b(h)`, ... of statements that follow each other, in a module whose
    class names them nowhere else. In the order of the calls.
    """
    trees = list(_trees(holder).values())
    counts = _mentions(trees)
    groups = [[a for a in group if counts[a] == 1] for tree in trees for group in _siblings(tree)]
    return [group for group in groups if len(group) > 1]


def _mentions(trees: list[ast.ClassDef]) -> Counter[str]:
    return Counter(name for tree in trees for name in _names(tree))


def _trees(holder: nn.Module) -> dict[type, ast.ClassDef]:
    """Of the module's class and its bases, without overridden methods; none where what runs is not what can be read."""
    trees: dict[type, ast.ClassDef] = {}
    overridden: set[str] = set()
    if "forward" in holder.__dict__ or any(map(_reads_modules, holder.__dict__.values())):
        return {}  # put there on the instance
    for base in type(holder).__mro__:
        if base in (nn.Module, object) or base.__module__ in ("abc", "typing"):
            continue
        tree = _tree(base)
        if tree is None:
            return {}
        if not any(isinstance(n, ast.Name) and n.id == "super" for t in trees.values() for n in _run(t)):
            tree.body = [n for n in tree.body if getattr(n, "name", None) not in overridden]
        overridden |= {n.name for n in tree.body if isinstance(n, METHODS)}
        trees[base] = tree
    return trees


def _tree(cls: type) -> ast.ClassDef | None:
    """The caller's own copy; None where it cannot be read, or has functions from elsewhere."""
    tree = _parsed(cls, tuple(code for member in cls.__dict__.values() for code in _codes(member)))
    return copy.copy(tree)


@functools.lru_cache(maxsize=256)
def _parsed(cls: type, codes: tuple[CodeType, ...]) -> ast.ClassDef | None:
    try:
        lines, first = inspect.getsourcelines(cls)
        (tree,) = ast.parse(textwrap.dedent("".join(lines))).body
    except (OSError, TypeError, SyntaxError):  # made at run time, or nowhere to be read
        return None
    place, end = inspect.getsourcefile(cls), first + len(lines)
    inside = all(code.co_filename == place and first <= code.co_firstlineno < end for code in codes)
    return tree if inside and isinstance(tree, ast.ClassDef) else None


def _codes(member: object) -> Iterator[CodeType]:
    """Of a function, and of what decorators have put around it, where those are not of packages that are known."""
    for function in (member, *(getattr(member, name, None) for name in ("fget", "fset", "__func__"))):
        around = function
        while isinstance(around, FunctionType):
            inside = getattr(around, "__wrapped__", None)
            if inside is None or not _known(around.__code__.co_filename):
                yield around.__code__
            around = inside


def _known(file: str) -> bool:
    """Whether its decorators read no attribute of a module by themselves."""
    found = (sys.modules.get(name) for name in DECORATORS)
    paths = (module.__file__ or "" for module in found if module is not None)
    return any(file.startswith(path.removesuffix("__init__.py")) for path in paths if path)


def _reads_modules(value: object) -> bool:
    """Whether it is a function that may read attributes of a module: those of torch do not."""
    function = value.func if isinstance(value, functools.partial) else value
    own = isinstance(function, (FunctionType, MethodType))
    return own and not (getattr(function, "__module__", None) or "").startswith("torch.")


def _hides_reads(tree: ast.AST) -> bool:
    """Whether code hands `self` on, or reads attributes in ways that name none."""
    named = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in _run(tree):
        if isinstance(node, ast.Name) and node.id == "self" and id(node) not in named:
            return True
        if isinstance(node, ast.Name) and node.id in ("getattr", "vars", "locals", "eval", "exec", "operator"):
            return True
        if isinstance(node, ast.Attribute) and (node.attr in UNNAMED or node.attr.startswith("named_")):
            return True
    return False


def _kept(tree: ast.AST) -> Iterator[str]:
    """What methods that set up read, other than its weight and bias: to keep it elsewhere, for all that is known."""
    for method in ast.walk(tree):
        if isinstance(method, METHODS) and method.name in SETUP:
            loads = [n for n in ast.walk(method) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
            read = {id(n.value) for n in loads if n.attr in READABLE}
            yield from (n.attr for n in loads if id(n) not in read)


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


def _called(node: ast.AST | None) -> str | None:
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


def _pairs(tree: ast.ClassDef) -> Iterator[tuple[str, str, bool]]:
    for node in _run(tree):
        b = _called(node)
        if b is not None and (inner := _alone(node)) is not None and (a := _called(inner)) is not None:
            yield a, b, False
    for block in _blocks(tree):
        yield from ((a, b, False) for a, b in _in_turn(block))


def _in_turn(block: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Of statements that follow each other, the second overwriting what the first set."""
    for first, second in pairwise(block):
        a, b = _assigned(first), _assigned(second)
        if a is None or b is None or a[0] != b[0]:
            continue
        argument = _alone(b[2])
        if isinstance(argument, ast.Name) and argument.id == a[0]:
            yield a[1], b[1]


def _summed(tree: ast.ClassDef) -> Iterator[tuple[str, str, bool]]:
    """One child for each sum: of two, either would wait for the other."""
    found: dict[int, tuple[str, str, bool]] = {}
    for node in _run(tree):
        b = _called(node)
        sides = _sides(_alone(node)) if b is not None else None
        if b is None or sides is None:
            continue
        left, right = map(_called, sides)
        if left is not None:
            found[id(node)] = left, b, not _quiet(sides[1])
        elif right is not None:  # evaluated last
            found[id(node)] = right, b, False
    for method in tree.body:
        if not isinstance(method, ast.FunctionDef) or method.name in SETUP:
            continue
        for i, statement in enumerate(method.body):
            first = _assigned(statement)
            if first is None or _escapes(first[0], method):
                continue
            call, later = _passes(first[0], method.body[i + 1 :])
            if (b := _called(call)) is not None:
                found.setdefault(id(call), (first[1], b, later))
    yield from found.values()


def _passes(h: str, block: list[ast.stmt]) -> tuple[ast.AST | None, bool]:
    """The call, where the statements that name h add something to it once and hand it to self.b(), in its own place;
    and whether other code runs before the addition.
    """
    added = later = False
    for statement in block:
        if not _mentioned(statement, h):
            if not _straight(statement):
                break
            later |= not added and not _names_only(statement)
            continue
        value, b = getattr(statement, "value", None), _called(getattr(statement, "value", None))
        into = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        stored = len(into) == 1 and isinstance(into[0], ast.Name) and into[0].id == h
        returned, more = isinstance(statement, ast.Return), isinstance(statement, ast.AugAssign)
        if not (stored or returned) or not isinstance(value, ast.expr):
            break
        whole = _alone(value) if b is not None else value
        if b is not None and added:
            return (value, later) if isinstance(whole, ast.Name) and whole.id == h and not more else (None, later)
        if isinstance(statement, ast.AugAssign):
            other = value if isinstance(statement.op, ast.Add) and not _mentioned(value, h) else None
        else:
            other = _other(whole, h)
        if added or other is None:
            break
        later |= not _quiet(other)
        if b is not None and not more:
            return value, later
        if returned:
            break
        added = True
    return None, later


def _escapes(h: str, method: ast.FunctionDef) -> bool:
    """Whether more than the statements of a method, in their order, may see its variable."""
    for node in ast.walk(method):
        if isinstance(node, (ast.Yield, ast.YieldFrom)):
            return True
        if isinstance(node, (ast.Global, ast.Nonlocal)) and h in node.names:
            return True
        inner = isinstance(node, (*METHODS, ast.Lambda, ast.ClassDef)) and node is not method
        if inner and _mentioned(node, h):
            return True
    return False


def _straight(statement: ast.stmt) -> bool:
    """Whether what follows it comes next, unless it raises."""
    if isinstance(statement, ast.If):
        return all(map(_straight, (*statement.body, *statement.orelse)))
    return isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Pass))


def _names_only(statement: ast.stmt) -> bool:
    """Whether it gives a name to what another has."""
    if not isinstance(statement, ast.Assign):
        return False
    return all(isinstance(target, ast.Name) for target in statement.targets) and _quiet(statement.value)


def _quiet(node: ast.AST) -> bool:
    """Whether evaluating it changes nothing."""
    return all(isinstance(n, (ast.Name, ast.Attribute, ast.Constant, ast.expr_context)) for n in ast.walk(node))


def _sides(node: ast.AST | None) -> tuple[ast.expr, ast.expr] | None:
    """Of a sum."""
    return (node.left, node.right) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) else None


def _other(node: ast.AST | None, h: str) -> ast.expr | None:
    """x, of h + x or x + h, where x does not name h."""
    sides = _sides(node) or ()
    others = [side for side in sides if not (isinstance(side, ast.Name) and side.id == h)]
    return others[0] if len(others) == 1 and not _mentioned(others[0], h) else None


def _mentioned(node: ast.AST, h: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == h for n in ast.walk(node))


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
    for block in _blocks(tree):
        for argument in {a for s in block if isinstance(s, SIMPLE) for _, a, _ in _reads(s)}:
            yield from _runs(block, argument)


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Statements that follow each other."""
    for node in _run(tree):
        found = (getattr(node, name, None) for name in ("body", "orelse", "finalbody"))
        yield from (block for block in found if isinstance(block, list))


def _runs(block: list[ast.stmt], argument: str) -> Iterator[list[str]]:
    """Calls on `argument` in statements that follow each other and do nothing else to it."""
    run: list[str] = []
    for statement in block:
        mentions = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == argument]
        reads = [a for a, h, _ in _reads(statement) if h == argument] if isinstance(statement, SIMPLE) else []
        stored = [n for n in mentions if isinstance(n.ctx, ast.Store)]
        if not reads or len(mentions) > len(reads) + len(stored):
            yield run
            run = []
            continue
        run = run + reads
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
