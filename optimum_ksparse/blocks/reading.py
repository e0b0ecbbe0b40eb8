"""Linear maps whose weight a model reads by itself, instead of calling them: a sparse module cannot take their places.

Mamba, for one, computes `self.dt_proj.weight @ x`, and in training hands `self.out_proj.weight` to a kernel. The
source of the classes tells what reads a weight on any path: a run takes one path alone.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..nn import is_linear_map
from .find import DecoderBlocks

# What a sparse layer's weight has as a dense one has it, or what nothing is computed with.
_HARMLESS = {"dtype", "device", "requires_grad", "is_meta", "is_cuda", "is_floating_point", "element_size", "layout"}
_HARMLESS |= {"shape", "size", "dim", "ndim", "numel", "get_device", "is_quantized"}
_ASKS = {"isinstance", "type", "hasattr", "id", "to", "type_as", "is_floating_point"}
# Not on the way of any tokens.
_SETTING_UP = {"__init__", "reset_parameters", "_reset_parameters", "_init_weights", "init_weights", "tie_weights"}
_ANY = "*"
# What decides on a way for good: the settings that a module holds. Whether it trains changes.
_STATIC = (ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop, ast.Attribute, ast.Constant)
_Guard = tuple[str, bool]  # an expression of `self`, and its value where the weight is read
_Read = tuple[str, tuple[_Guard, ...]]
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def find_read(decoder_blocks: DecoderBlocks) -> set[str]:
    """Paths in the decoder of the linear maps whose weight the source of a module around them reads, be it in a block
    or the decoder itself."""
    holders: dict[str, nn.Module] = {"": decoder_blocks.decoder}
    linears: list[str] = []
    for index, block in enumerate(decoder_blocks.blocks):
        for name, module in block.named_modules(remove_duplicate=False):
            path = decoder_blocks.name_in_decoder(index, name)
            holders[path] = module
            if is_linear_map(module):
                linears.append(path)
    reads = {path: _reads_of(module) for path, module in holders.items()}
    return {path for path in linears if any(_matches(inner, reads[outer]) for outer, inner in _around(path, reads))}


def _reads_of(module: nn.Module) -> set[str]:
    """Paths in a module whose weight its class reads, but where its settings rule that out."""
    reads: frozenset[_Read] = _weights_read(type(module))  # type: ignore[arg-type]
    return {path for path, guards in reads if all(_may_hold(guard, module) for guard in guards)}


def _may_hold(guard: _Guard, module: nn.Module) -> bool:
    test, wanted = guard
    try:  # the model's own code, of attributes and comparisons alone: see `_Reader._guards`
        return bool(eval(test, {"__builtins__": {}}, {"self": module})) == wanted
    except Exception:  # an attribute that is not there (yet)
        return True


def _around(path: str, reads: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Each module around a path whose class reads weights, and the path in it, without the numbers of lists."""
    parts = path.split(".")
    for depth in range(len(parts)):
        outer = ".".join(parts[:depth])
        if reads.get(outer):
            yield outer, ".".join(part for part in parts[depth:] if not part.isdigit())


def _matches(path: str, read: set[str]) -> bool:
    parent, _, _ = path.rpartition(".")
    return path in read or f"{parent}.{_ANY}".lstrip(".") in read


@functools.cache
def _weights_read(kind: Any) -> frozenset[_Read]:
    """Paths in a module of this class, without the numbers of lists, of the modules whose `weight` its methods read,
    each with what must hold for that; "*" stands for a name that is made when it runs."""
    read: set[_Read] = set()
    for base in kind.__mro__:
        if base in PreTrainedModel.__mro__ or base.__module__.startswith("torch."):
            continue
        tree = _tree_of(base)
        for method in [] if tree is None else _functions(tree.body[0]):
            if method.name not in _SETTING_UP:
                read |= _Reader(method, kind).paths()
    return frozenset(read)


@functools.cache
def _tree_of(source: Any) -> ast.Module | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(source)))
    except (OSError, TypeError, SyntaxError):
        return None


def _functions(node: ast.AST) -> list[_Function]:
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, _Function)]


class _Reader:
    """Finds what one function reads `weight` of.

    Args:
        function: its tree.
        kind: the class in whose file it is.
        inner: whether it is called by another one that is being read, whose calls are not followed any further.
    """

    def __init__(self, function: _Function, kind: type[nn.Module], inner: bool = False) -> None:
        self.function, self.kind, self.inner = function, kind, inner
        self._parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
        self._values: dict[str, list[ast.expr]] = {}  # what a local name is bound to
        for node in ast.walk(function):
            for target, value in _bindings(node):
                self._values.setdefault(target, []).append(value)

    def paths(self) -> set[_Read]:
        """Paths from `self` of the modules whose weight is read, with the guards of each."""
        roots = {(path, self._guards(node)) for node in self._read() for path in self._resolve(node)}
        return {(path.partition(".")[2], guards) for path, guards in roots if path.startswith("self.")}

    def _guards(self, node: ast.AST) -> tuple[_Guard, ...]:
        """The conditions around an expression that settings alone decide on."""
        guards = []
        while node is not self.function:
            child, node = node, self._parents[node]
            if isinstance(node, ast.If | ast.IfExp) and child is not node.test and _is_static(node.test):
                then = node.body if isinstance(node.body, list) else [node.body]
                guards.append((ast.unparse(node.test), child in then))
        return tuple(guards)

    def parameters(self) -> set[str]:
        """Names of the arguments whose own weight is read."""
        names = {a.arg for a in (*self.function.args.posonlyargs, *self.function.args.args)}
        names |= {a.arg for a in self.function.args.kwonlyargs}
        return (names - {"self"}) & {path for node in self._read() for path in self._resolve(node)}

    def _read(self) -> Iterator[ast.expr]:
        """Expressions of the modules whose weight is read."""
        for node in ast.walk(self.function):
            if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
                if not self._is_harmless(node):
                    yield node.value
            elif isinstance(node, ast.Call):
                if _name_of(node.func) == "getattr" and len(node.args) > 1 and _text(node.args[1]) == "weight":
                    if not self._is_harmless(node):
                        yield node.args[0]
                elif not self.inner:
                    yield from self._handed_on(node)

    def _handed_on(self, call: ast.Call) -> Iterator[ast.expr]:
        """The arguments of a call of a method of the class, or of a function of its file, that reads their weight."""
        name, offset = _name_of(call.func), 0
        if isinstance(call.func, ast.Attribute) and _name_of(call.func.value) == "self":
            called, offset = getattr(self.kind, call.func.attr, None), 1
        else:
            called = getattr(sys.modules.get(self.kind.__module__), name or "", None)
        if not inspect.isfunction(called):
            return
        tree = _tree_of(called)
        functions = [] if tree is None else _functions(tree)
        if not functions:
            return
        read = _Reader(functions[0], self.kind, inner=True).parameters()
        names = [a.arg for a in (*functions[0].args.posonlyargs, *functions[0].args.args)][offset:]
        given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
        yield from (given[name] for name in read if name in given)

    def _resolve(self, node: ast.expr, depth: int = 8) -> set[str]:
        """Dotted paths that an expression may be, from a name that is bound outside of the function on."""
        if depth == 0:
            return set()
        if isinstance(node, ast.Attribute):
            return {f"{path}.{node.attr}" for path in self._resolve(node.value, depth - 1)}
        if isinstance(node, ast.Name):
            values = self._values.get(node.id, [])
            return {path for value in values for path in self._resolve(value, depth - 1)} if values else {node.id}
        if isinstance(node, ast.Call) and _name_of(node.func) == "getattr" and len(node.args) > 1:
            name = _text(node.args[1]) or _ANY
            return {f"{path}.{name}" for path in self._resolve(node.args[0], depth - 1)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # such as self.projections.values()
            return self._resolve(node.func.value, depth - 1)
        parts = node.args if isinstance(node, ast.Call) else list(ast.iter_child_nodes(node))
        parts = [node.value] if isinstance(node, ast.Subscript) else parts
        return {path for part in parts if isinstance(part, ast.expr) for path in self._resolve(part, depth - 1)}

    def _is_harmless(self, weight: ast.expr, depth: int = 8) -> bool:
        """Whether nothing is computed with the weight that an expression is."""
        parent = self._parents[weight]
        if isinstance(parent, ast.Attribute):
            return parent.attr in _HARMLESS
        if isinstance(parent, ast.Compare):
            return all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
        if isinstance(parent, ast.Call) and parent.func is not weight:
            return _name_of(parent.func) in _ASKS
        if isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
            name = parent.targets[0].id
            uses = (node for node in ast.walk(self.function) if isinstance(node, ast.Name) and node.id == name)
            return depth > 0 and all(self._is_harmless(u, depth - 1) for u in uses if isinstance(u.ctx, ast.Load))
        return False


def _is_static(test: ast.expr) -> bool:
    inner = [node for node in ast.walk(test) if not isinstance(node, ast.expr_context)]
    names = [node.id for node in inner if isinstance(node, ast.Name)]
    plain = all(isinstance(node, (*_STATIC, ast.Name)) for node in inner)
    trains = any(isinstance(node, ast.Attribute) and node.attr == "training" for node in inner)
    return plain and not trains and names != [] and set(names) == {"self"}


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The names that a statement binds, each with what it may be bound to."""
    pairs: list[tuple[ast.expr, ast.expr]] = []
    if isinstance(node, ast.Assign):
        pairs = [(target, node.value) for target in node.targets]
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        pairs = [(node.target, node.value)]
    elif isinstance(node, ast.For | ast.comprehension):
        pairs = [(node.target, node.iter)]
    for target, value in pairs:
        for inner in ast.walk(target):
            if isinstance(inner, ast.Name):
                yield inner.id, value


def _name_of(node: ast.expr) -> str | None:
    """The last part of a name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
