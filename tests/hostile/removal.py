"""Checks of the package, taken away one at a time: statements that raise, and the conditions that lead to them."""

import ast
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, eq=False)
class Removal:
    """
    A check that is gone.

    Args:
        file (`str`): Where it is.
        first, last (`int`): Lines of the statement that raises because of it.
        what (`str`): What is taken away.
        function (`types.FunctionType`): What it is in.
        code (`types.CodeType`): The function's code without it.
    """

    file: str
    first: int
    last: int
    what: str
    function: types.FunctionType
    code: types.CodeType

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.first} {self.function.__qualname__}: without {self.what}"

    @contextmanager
    def made(self) -> Iterator[None]:
        """Context in which the check is gone, wherever the function was imported to."""
        before = self.function.__code__
        self.function.__code__ = self.code
        try:
            yield
        finally:
            self.function.__code__ = before


def removals(module: types.ModuleType) -> Iterator[Removal]:
    """Yields each statement of a module that raises, each operand of its condition and each error that leads to it."""
    tree = ast.parse(Path(module.__file__).read_text())
    for function, node in _functions(module, tree):
        for raising, what, edit in _edits(node):
            # Changed in place and undone, as the nodes of a copy would have to be found again.
            undo = edit()
            code = _code(compile(ast.fix_missing_locations(copy.deepcopy(tree)), module.__file__, "exec"), function)
            undo()
            yield Removal(module.__file__, raising.lineno, raising.end_lineno, what, function, code)


def _functions(module: types.ModuleType, tree: ast.Module) -> Iterator[tuple[types.FunctionType, ast.FunctionDef]]:
    for node in tree.body:
        prefix, items = ("", [node]) if _is_function(node) else (f"{getattr(node, 'name', '')}.", _body(node))
        for item in filter(_is_function, items):
            name = prefix + item.name
            found = functools.reduce(inspect.getattr_static, name.split("."), module)
            found = getattr(found, "fget", None) or getattr(found, "__func__", found)
            yield inspect.unwrap(found), item


def _body(node: ast.AST) -> list[ast.AST]:
    return node.body if isinstance(node, ast.ClassDef) else []


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef)


def _edits(function: ast.FunctionDef) -> Iterator[tuple[ast.Raise, str, Callable[[], Callable[[], None]]]]:
    """Yields a statement that raises, what is taken away, and what does it and returns what undoes it."""
    for parent in ast.walk(function):
        for _, block in ast.iter_fields(parent):
            for index, item in enumerate(block if isinstance(block, list) else ()):
                if isinstance(item, ast.Raise):
                    yield item, ast.unparse(item)[:70], functools.partial(_put, block, index, ast.Pass())
        own = getattr(parent, "body", ())
        raising = next((item for item in own if isinstance(item, ast.Raise)), None) if isinstance(own, list) else None
        if raising and isinstance(parent, ast.If):
            for operation in (item for item in ast.walk(parent.test) if isinstance(item, ast.BoolOp)):
                neutral = ast.Constant(isinstance(operation.op, ast.And))
                for index, operand in enumerate(operation.values):
                    yield raising, ast.unparse(operand), functools.partial(_put, operation.values, index, neutral)
        if raising and isinstance(parent, ast.ExceptHandler) and isinstance(parent.type, ast.Tuple):
            for index, kind in enumerate(parent.type.elts):
                left = [kind for other, kind in enumerate(parent.type.elts) if other != index]
                yield raising, ast.unparse(kind), functools.partial(_set, parent.type, "elts", left)


def _put(values: list, index: int, value: Any) -> Callable[[], None]:
    before, values[index] = values[index], value
    return functools.partial(values.__setitem__, index, before)


def _set(node: ast.AST, name: str, value: Any) -> Callable[[], None]:
    before = getattr(node, name)
    setattr(node, name, value)
    return functools.partial(setattr, node, name, before)


def _code(module: types.CodeType, function: types.FunctionType) -> types.CodeType:
    waiting = [module]
    while waiting:
        code = waiting.pop()
        if code.co_qualname == function.__code__.co_qualname:
            return code
        waiting += [item for item in code.co_consts if isinstance(item, types.CodeType)]
    raise LookupError(function.__qualname__)
