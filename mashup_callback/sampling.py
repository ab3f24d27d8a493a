"""The rows that candidates are judged on: a small sample of what the Trainer trains on, in the Trainer's own form."""

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader

from .config import UsageError
from .distributed import decided
from .isolation import random_state


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Rows:
    """
    Rows of a data set with the collator that makes batches of them.

    Every batch is collated once and kept, so that a collator that draws random numbers (masked language modelling)
    gives every candidate the same batch.

    Args:
        rows (`Sequence`):
            What the collator takes a list of.
        collate (`Callable`):
            Makes a batch (a mapping of tensors) from a list of rows.
        batch_size (`int`, *optional*, defaults to `1`):
            Rows in a batch.
    """

    rows: Sequence[Any]
    collate: Callable[[list[Any]], Mapping[str, Any]]
    batch_size: int = 1
    _groups: list[list[int]] = field(default_factory=list, repr=False)
    _batches: dict[tuple[int, ...], Mapping[str, Any]] = field(default_factory=dict, repr=False)
    _shares: dict[tuple[int, int], "Rows"] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self._groups:
            self._groups.extend(self._grouped(self.batch_size))

    def _grouped(self, size: int) -> list[list[int]]:
        # Rows of similar length share a batch, the longest first: a lack of memory shows at once.
        order = sorted(range(len(self.rows)), key=lambda index: (-_length(self.rows[index]), index))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> "Rows":
        """Returns the rows from `start` to `stop` with the same collator and batch size."""
        return Rows(self.rows[start:stop], self.collate, self.batch_size)

    def share(self, index: int, count: int) -> "Rows":
        """
        Returns the same rows with the batches that one of several processes looks at.

        Every share has the same number of batches: where they do not come out even, the first batch fills up.

        Args:
            index (`int`):
                Which process.
            count (`int`):
                How many there are.
        """
        if count == 1:
            return self
        if (index, count) not in self._shares:
            groups = self._grouped(min(self.batch_size, max(1, math.ceil(len(self.rows) / count))))
            groups += groups[:1] * (-len(groups) % count)
            mine = [list(group) for group in groups[index::count]]
            self._shares[index, count] = Rows(self.rows, self.collate, self.batch_size, mine)
        return self._shares[index, count]

    def first(self, index: int, count: int) -> "Rows":
        """Returns the same rows with the first batch alone of each of several processes, the very same batches."""
        mine = self.share(index, count)
        single = Rows(self.rows, self.collate, self.batch_size, mine._groups[:1], mine._batches)
        single._shares[index, count] = single
        return single

    def batches(self) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
        """Yields each batch with the indices of its rows; follows [`Rows.halve`] while it runs."""
        position = 0
        while position < len(self._groups):
            indices = self._groups[position]
            if tuple(indices) not in self._batches:
                self._batches[tuple(indices)] = self.collate([self.rows[index] for index in indices])
            yield indices, self._batches[tuple(indices)]
            # A batch that was halved meanwhile is not finished: its halves stand in its place.
            position += self._groups[position] is indices

    def halve(self, indices: list[int]) -> bool:
        """Splits a batch in two for good; returns whether it had more than one row."""
        middle = (len(indices) + 1) // 2
        if middle < len(indices):
            position = next(place for place, group in enumerate(self._groups) if group is indices)
            self._groups[position : position + 1] = [indices[:middle], indices[middle:]]
            del self._batches[tuple(indices)]
        return middle < len(indices)

    def fingerprint(self) -> str:
        """Returns a sha256 of the batches, to tell whether two samples are the same."""
        digest = hashlib.sha256()
        for _, batch in self.batches():
            if not isinstance(batch, Mapping):
                digest.update(repr(batch).encode())
                continue
            for name, value in sorted(batch.items()):
                digest.update(name.encode())
                if isinstance(value, torch.Tensor):
                    digest.update(repr((value.dtype, tuple(value.shape))).encode())
                    digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
                else:
                    digest.update(repr(value).encode())
        return digest.hexdigest()


def as_rows(batches: "Rows | Sequence[Mapping[str, Any]]") -> Rows:
    """Returns batches that are already made as rows of which each is a batch of its own."""
    return batches if isinstance(batches, Rows) else Rows(list(batches), lambda rows: rows[0])


def draw_sample(
    dataloader: DataLoader, size: int, *, batch_size: int, seed: int = 42, guard_rows: Sequence[Any] | None = None
) -> tuple[Rows, Rows]:
    """
    Draws the rows that select and the rows that are held out for the guard.

    The data loader is never iterated: its sampler would draw random numbers and change the order of training. Rows of
    a map-style data set are drawn at random without replacement, those of an iterable one are its first ones. The main
    process reads them and every process gets them, so that a data set that is split over the processes gives the
    same sample to all. The collator starts from the same seed at every batch and everywhere.

    Args:
        dataloader (`DataLoader`):
            The Trainer's own; its data set and collator are used.
        size (`int`):
            Rows in all; one half selects, the other is held out.
        batch_size (`int`):
            Rows in a forward pass.
        seed (`int`, *optional*, defaults to `42`):
            Seed of a private generator.
        guard_rows (`Sequence`, *optional*):
            Rows to hold out instead; then all `size` rows select.

    Returns:
        `tuple[Rows, Rows]`: The selection rows and the held-out rows, which are disjoint.

    Raises:
        ValueError: The data set has fewer than two rows, or `guard_rows` lacks a column of the training rows.
    """
    with random_state(seed):
        rows = decided(lambda: _read_rows(dataloader.dataset, size, seed))
    needed = 2 if guard_rows is None else 1
    if len(rows) < needed:
        raise ValueError(f"The training data has {len(rows)} rows, expected at least {needed} to select and to guard.")
    if len(rows) < size:
        logger.info("The training data has %d rows, fewer than sample_size=%d; all are used.", len(rows), size)
    selection = rows[::2] if guard_rows is None else rows
    held_out = rows[1::2] if guard_rows is None else _check_guard(guard_rows, rows[0])
    collate = _seeded(dataloader.collate_fn, seed)
    return Rows(selection, collate, batch_size), Rows(held_out, collate, batch_size)


def _seeded(collate: Callable, seed: int) -> Callable:
    def collated(rows: list[Any]) -> Mapping[str, Any]:
        with random_state(seed):
            return collate(rows)

    return collated


def _read_rows(dataset: Any, size: int, seed: int) -> list[Any]:
    if isinstance(dataset, IterableDatasetShard):
        # Each process would skip the rows of the others.
        dataset = dataset.dataset
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return list(itertools.islice(iter(dataset), size))
    generator = torch.Generator().manual_seed(seed)
    return [dataset[index] for index in torch.randperm(len(dataset), generator=generator)[:size].tolist()]


def _check_guard(rows: Sequence[Any], example: Any) -> list[Any]:
    rows = [rows[index] for index in range(len(rows))]
    if not rows:
        raise UsageError("`guard_dataset` is empty, expected rows in the form of the training rows.")
    missing = set(example) - set(rows[0]) if isinstance(example, Mapping) and isinstance(rows[0], Mapping) else set()
    if missing:
        raise UsageError(
            f"The rows of `guard_dataset` have the columns {sorted(rows[0])} and lack {sorted(missing)}. They must be "
            "in the form of the Trainer's own training rows: take them from `trainer.train_dataset` or from "
            "`trainer.eval_dataset`, after the Trainer has prepared it."
        )
    if isinstance(example, Mapping) and isinstance(rows[0], Mapping):
        # The Trainer drops the columns that the model does not take in its data loader only.
        rows = [{name: row[name] for name in example} for row in rows]
    return rows


def _length(row: Any) -> int:
    tokens = row.get("input_ids") if isinstance(row, Mapping) else None
    return len(tokens) if hasattr(tokens, "__len__") else 0
