"""An adapter on disk as a candidate, and its update as hooks on the live model."""

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..formats import Adapter, adapter_hash, load_factors, read_weights
from ..lowrank import Factors
from ..model import BaseWeights
from .hooks import applied, bypass_warnings


# Bytes that all sources together keep in memory, so that a file is read once.
KEPT_BYTES = 2**32


@dataclass(frozen=True, eq=False)
class LoraUpdate:
    """Low-rank updates by layer, added to the layers' outputs by forward hooks."""

    factors: Factors

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        return applied(model, self.factors)

    def warnings(self, model: nn.Module) -> tuple[str, ...]:
        return bypass_warnings(model, self.factors)


class _Kept:
    """Counts the bytes that the sources of this process keep."""

    def __init__(self) -> None:
        self.bytes, self.lock = 0, threading.Lock()

    def take(self, size: int) -> bool:
        with self.lock:
            fits = self.bytes + size <= KEPT_BYTES
            self.bytes += size if fits else 0
        return fits

    def give_back(self, size: int) -> None:
        with self.lock:
            self.bytes -= size


_KEPT = _Kept()


@dataclass(eq=False)
class AdapterSource:
    """A LoRA adapter that fits the model; what was read of it stays in memory until `release`, within bounds."""

    adapter: Adapter
    weights: BaseWeights = field(repr=False)
    _digest: str | None = field(default=None, init=False, repr=False)
    _data: bytes | None = field(default=None, init=False, repr=False)
    _factors: Factors | None = field(default=None, init=False, repr=False)
    _size: int = field(default=0, init=False, repr=False)

    @property
    def rank(self) -> int:
        return self.adapter.rank

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.adapter.warnings

    def load(self, device: torch.device | str = "cpu") -> LoraUpdate:
        factors = self._factors
        if factors is None:
            factors = load_factors(self.adapter, data=self._data, weight=self.weights)
            self.weights.refuse_huge(factors)
            self.release()
            if self._keep(sum(update.nbytes for update in factors.values())):
                self._factors = factors
        return LoraUpdate({name: update.to(device) for name, update in factors.items()})

    def fingerprint(self) -> str | None:
        if self._digest is None:
            data = read_weights(self.adapter)
            self._digest = adapter_hash(self.adapter, data)
            if self._factors is None and self._keep(len(data)):
                self._data = data
        return self._digest

    def release(self) -> None:
        """Forgets what was read; it is read again when it is needed."""
        self._data = self._factors = None
        _KEPT.give_back(self._size)
        self._size = 0

    def __del__(self) -> None:
        self.release()

    def _keep(self, size: int) -> bool:
        if fits := _KEPT.take(size):
            self._size = size
        return fits
