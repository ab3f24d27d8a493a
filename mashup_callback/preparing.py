"""What a candidate needs before it can be scored, made by a thread while another candidate is scored."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .adapters import Adapter, AdapterError
from .cache import ScoreCache, base_fingerprint, score_key
from .factors import Factors, LoraFactors
from .losses import RowLosses
from .sampling import Rows
from .weights import load_update


Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Prepared:
    """
    A candidate that is ready to be scored.

    Args:
        update (`Mapping[str, LoraFactors]` or `Replacement`, *optional*): What it changes, on the model's device.
        losses (`RowLosses`, *optional*): Its losses, where they are known from an earlier run.
        key (`str`, *optional*): Under which they are kept.
        error (`Exception`, *optional*): Why it could not be read.
    """

    update: Any = None
    losses: RowLosses | None = None
    key: str | None = None
    error: Exception | None = None


class Preparation:
    """
    Reads candidates: their scores from the cache, else their tensors from the disk to the model's device.

    What a callable metric measures is not known, and of a sharded model no process sees enough, so neither is cached.

    Args:
        model (`torch.nn.Module`):
            The model that they are scored on.
        metric (`str` or `Callable`):
            What is measured.
        sharded (`bool`):
            Whether no process holds the whole model.
    """

    def __init__(self, model: nn.Module, metric: Any, sharded: bool) -> None:
        self.device = next(model.parameters()).device
        # A probe begins with the loss, and is not kept itself: it depends on the trainee.
        self.metric, self.cache = "loss" if metric == "probe" else metric, ScoreCache()
        cached = not sharded and not callable(metric) and self.cache.directory is not None
        self.base = base_fingerprint(model) if cached else None
        self._fingerprints: dict[int, str] = {}

    def sample(self, part: Rows) -> None:
        """Takes the fingerprint of rows; to be called before they are scored, while their batches are whole."""
        if self.base is not None:
            self._fingerprints[id(part)] = part.fingerprint()

    def __call__(self, source: Adapter | Any, part: Rows) -> Prepared:
        try:
            key = self._key(source, part)
            losses = self.cache.get(key, len(part)) if key else None
            return Prepared(None if losses else _to(load_update(source), self.device), losses, key)
        except (AdapterError, OSError, RuntimeError) as error:
            return Prepared(error=error)

    def keep(self, prepared: Prepared, losses: RowLosses) -> None:
        """Keeps what was measured for the next run."""
        if prepared.key is not None and prepared.losses is None:
            self.cache.put(prepared.key, losses)

    def _key(self, source: Any, part: Rows) -> str | None:
        if self.base is None or not isinstance(source, Adapter):
            return None
        return score_key(source, self.base, self._fingerprints[id(part)], self.metric)


@contextmanager
def ahead(items: Iterable[Item], prepare: Callable[[Item], Result]) -> Iterator[Iterator[tuple[Item, Result]]]:
    """
    Context with an iterator over the items, each with what `prepare` makes of it, one ahead of who uses it.

    Args:
        items (`Iterable`):
            Taken from the same thread that prepares them.
        prepare (`Callable`):
            Called in the order of the items.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="mashup-prepare") as pool:
        yield _ahead(iter(items), prepare, pool)


def _ahead(
    items: Iterator[Item], prepare: Callable[[Item], Result], pool: ThreadPoolExecutor
) -> Iterator[tuple[Item, Result]]:
    def following() -> tuple[Item, Result] | None:
        for item in items:
            return item, prepare(item)
        return None

    coming = pool.submit(following)
    while (pair := coming.result()) is not None:
        coming = pool.submit(following)
        yield pair


def _to(update: Any, device: torch.device) -> Factors | Any:
    if device.type == "cpu" or not isinstance(update, dict):
        return update
    return {
        name: LoraFactors(factors.A.to(device), factors.B.to(device), factors.scaling)
        for name, factors in update.items()
    }
