"""Private copies of collators and streams: using a copy leaves the user's own where it was."""

import copy
import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer


_ATOMS = (str, bytes, int, float, bool, type(None))
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_SHARED = (nn.Module, Optimizer, type, types.ModuleType)
# Tokenizers and trainers, by what they can do, and objects that let go of something outside when they die.
_SHARED_METHODS = ("from_pretrained", "train", "__del__")
# Longer containers hold data: they are copied, and what is in them is shared.
_FEW, _SMALL_BYTES = 1000, 2**20


def private_copy(value: Any) -> tuple[Any, list[Any]]:
    """
    Returns a copy of an object with a state of its own, and the iterators within that cannot be copied.

    Copied are random generators, iterators, small arrays, containers, and the functions, methods and objects that hold
    any of these. Models, optimizers, tokenizers, trainers and what cannot be copied are shared with the original.
    """
    copier = _Copier()
    return copier.copy(value), copier.stuck


class _Copier:
    def __init__(self) -> None:
        self.memo: dict[int, tuple[Any, Any]] = {}
        self.stuck: list[Any] = []

    def copy(self, value: Any) -> Any:
        if isinstance(value, _ATOMS):
            return value
        if id(value) not in self.memo:
            self._note(value, value)
            self._note(value, self._copied(value))
        return self.memo[id(value)][1]

    def _note(self, value: Any, clone: Any) -> None:
        # With the original, as an object that is gone could leave its id to another one.
        self.memo[id(value)] = (value, clone)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, _GENERATORS) or (isinstance(value, Iterator) and not hasattr(value, "__dict__")):
            return self._attempt(copy.deepcopy, value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.copy(value.__self__))
        if isinstance(value, functools.partial):
            words = {name: self.copy(item) for name, item in value.keywords.items()}
            return functools.partial(self.copy(value.func), *map(self.copy, value.args), **words)
        if isinstance(value, torch.Tensor | np.ndarray):
            small = value.nbytes <= _SMALL_BYTES and not getattr(value, "requires_grad", False)
            return copy.deepcopy(value) if small else value
        if type(value) is tuple:
            return tuple(map(self.copy, value))
        if isinstance(value, dict | list | set | deque) or hasattr(value, "__dict__"):
            return self._object(value)
        return value

    def _attempt(self, copied: Callable[[Any], Any], value: Any) -> Any:
        try:
            return copied(value)
        except Exception:
            self.stuck += [value] if isinstance(value, Iterator) else []
            return value

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        # Of its module's variables those count that it names and that have a state.
        named = {name: function.__globals__.get(name) for name in _names(function.__code__)}
        stateful = {name: item for name, item in named.items() if isinstance(item, (*_GENERATORS, Iterator))}
        variables = {**function.__globals__, **{name: self.copy(item) for name, item in stateful.items()}}
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        clone = types.FunctionType(
            function.__code__, variables if stateful else function.__globals__, function.__name__, closure=cells
        )
        self._note(function, clone)
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            if original != types.CellType():
                cell.cell_contents = self.copy(original.cell_contents)
        clone.__defaults__, clone.__kwdefaults__ = self.copy(function.__defaults__), self.copy(function.__kwdefaults__)
        clone.__dict__.update(function.__dict__)
        return clone

    def _object(self, value: Any) -> Any:
        shared = isinstance(value, _SHARED) or any(hasattr(type(value), name) for name in _SHARED_METHODS)
        if shared and isinstance(value, Iterator):
            self.stuck.append(value)
        clone = value if shared else self._attempt(copy.copy, value)
        if clone is value or getattr(clone, "__dict__", clone) is getattr(value, "__dict__", value):
            return value
        self._note(value, clone)
        if isinstance(clone, dict) and len(clone) <= _FEW:
            clone.update({name: self.copy(item) for name, item in value.items()})
        elif isinstance(clone, list) and len(clone) <= _FEW:
            clone[:] = map(self.copy, value)
        if hasattr(clone, "__dict__"):
            vars(clone).update({name: self.copy(item) for name, item in vars(value).items()})
        return clone


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)
