"""The rows that candidates are judged on: a small sample of what the Trainer trains on, in the Trainer's own form."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset

from ..distributed import on_main_process
from ..errors import UsageError
from ..model import random_state
from .content import content_hash, row_kind, row_length
from .losses import IGNORE
from .private_copy import private_copy


logger = logging.getLogger(__name__)

# Tokens of a forward pass without gradients. More make a CPU slower again, as their activations are beyond what the
# allocator reuses; an accelerator needs more to be busy.
CPU_TOKENS, TOKENS = 1024, 8192
# Of long rows, fewer tell as much: so many in each half, if they have so many label tokens.
FEWEST_LONG, ENOUGH_TOKENS = 8, 1024


@dataclass(frozen=True, eq=False)
class SampleRows:
    """
    Rows of a data set with the collator that makes batches of them: of `batch_size` rows, or of more up to so many
    `tokens` with the padding.

    Every batch is collated once and kept, so that a collator that draws random numbers (masked language modelling)
    gives every candidate the same batch.
    """

    rows: Sequence[Any]
    collate: Callable[[list[Any]], Mapping[str, Any]]
    batch_size: int = 1
    tokens: int = 0
    _groups: list[list[int]] = field(default_factory=list, repr=False)
    _batches: dict[tuple[int, ...], Mapping[str, Any]] = field(default_factory=dict, repr=False)
    _shares: dict[tuple[int, int], "SampleRows"] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self._groups:
            self._groups.extend(self._grouped(len(self.rows)))

    def _grouped(self, limit: int) -> list[list[int]]:
        """Returns the indices of the rows by batch, at most `limit` in each."""
        # Rows of similar length share a batch, the longest first: a lack of memory shows at once.
        kinds = [row_kind(row) for row in self.rows]
        order = sorted(range(len(self.rows)), key=lambda index: (-row_length(self.rows[index]), index))
        groups = []
        while order:
            longest = row_length(self.rows[order[0]])
            size = min(limit, max(self.batch_size, self.tokens // longest if longest else 0))
            alike = [index for index in order if kinds[index] == kinds[order[0]]][:size]
            groups.append(alike)
            order = [index for index in order if index not in alike]
        return groups

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> "SampleRows":
        """Returns the rows from `start` to `stop` with the same collator and batch size."""
        return SampleRows(self.rows[start:stop], self.collate, self.batch_size, self.tokens)

    def share(self, index: int, count: int, even: bool = False) -> "SampleRows":
        """
        Returns the rows with the batches of one of several processes, the same number of batches for each; where
        `even`, smaller ones fill up with rows of the others, or their own, so that all are equal.
        """
        if count == 1:
            return self
        if (index, count) not in self._shares:
            groups = self._grouped(max(1, math.ceil(len(self.rows) / count)))
            if even:
                groups = [self._filled(group, groups) for group in groups]
            # Where they do not come out even, the first batch fills up.
            groups += groups[:1] * (-len(groups) % count)
            mine = [list(group) for group in groups[index::count]]
            self._shares[index, count] = SampleRows(self.rows, self.collate, self.batch_size, self.tokens, mine)
        return self._shares[index, count]

    def _filled(self, group: list[int], groups: list[list[int]]) -> list[int]:
        kind, size = row_kind(self.rows[group[0]]), max(map(len, groups))
        others = [index for other in groups if other is not group for index in other]
        alike = [index for index in others if row_kind(self.rows[index]) == kind]
        return (group + alike + group * size)[:size]

    def first(self, index: int, count: int) -> "SampleRows":
        """Returns the same rows with the first batch alone of each of several processes, the very same batches."""
        mine = self.share(index, count)
        single = SampleRows(self.rows, self.collate, self.batch_size, self.tokens, mine._groups[:1], mine._batches)
        single._shares[index, count] = single
        return single

    def batches(self) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
        """Yields each batch with the indices of its rows; follows [`SampleRows.halve`] while it runs."""
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
        return content_hash([batch for _, batch in self.batches()])


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows of the training data that select and others that are held out for the guard, and what was left out."""

    selection: SampleRows
    held_out: SampleRows
    # The other held-out rows, for a guard that cannot decide.
    reserve: SampleRows | None = None
    # Rows that had been drawn before with the same content, and rows without any label.
    duplicates: int = 0
    unlabeled: int = 0

    def parts(self, sizes: Sequence[int]) -> list[SampleRows]:
        """Returns the held-out rows, and those that make them as many as each of `sizes`, where there are so many."""
        ends = [0, *(size - len(self.held_out) for size in sizes)]
        more = [self.reserve.part(*pair) for pair in itertools.pairwise(ends)] if self.reserve else []
        return [self.held_out, *(part for part in more if len(part))]

    def counts(self) -> dict[str, int]:
        """Returns what the report says of it."""
        rows = {"selection": len(self.selection), "held_out": len(self.held_out)}
        return {**rows, "duplicates": self.duplicates, "unlabeled": self.unlabeled}


def as_rows(batches: "SampleRows | Sequence[Mapping[str, Any]]") -> SampleRows:
    """Returns batches that are already made as rows of which each is a batch of its own."""
    return batches if isinstance(batches, SampleRows) else SampleRows(list(batches), lambda rows: rows[0])


def draw_sample(
    dataloader: DataLoader,
    size: int,
    *,
    batch_size: int,
    seed: int = 42,
    guard_rows: Sequence[Any] | None = None,
    labeled: bool = True,
    tokens: int | None = None,
) -> Sample:
    """
    Draws `size` rows, of which one half selects and the other, or the `guard_rows`, is held out for the guard.

    The data loader is never iterated: its sampler would draw random numbers and change the order of training. Rows of
    a map-style data set are drawn at random without replacement, those of an iterable one are its first ones, read
    from a private copy. The main process reads them and every process gets them, so that a data set that is split over
    the processes gives the same sample to all. Rows with the same content are in the same half. The collator is a
    private copy too; the global random number generators start from the same seed at every batch and everywhere.
    Where `labeled`, rows whose labels are all -100 are left out, and short rows share batches of up to so many
    `tokens`, by default [`token_budget`].

    Raises:
        ValueError: The data set has fewer than two different rows, or is a stream that can be read once, or no row has
            a label, or `guard_rows` lacks a column of the training rows.
    """
    with random_state(seed):
        rows = on_main_process(lambda: _read_rows(dataloader.dataset, size, seed))
    if 1 < len(rows) < size:
        logger.info("The training data has %d rows, fewer than sample_size=%d; all are used.", len(rows), size)
    contents = [content_hash(row) for row in rows]
    places = {content: place for place, content in enumerate(dict.fromkeys(contents))}
    needed = 2 if guard_rows is None else 1
    if len(places) < needed:
        raise ValueError(
            f"The training data has {len(rows)} rows, {len(places)} of them different, expected at least {needed} to "
            "select and to guard."
        )
    # Copies of a row go where the first one goes.
    pairs = list(zip(rows, contents, strict=True))
    selection, held_out = ([row for row, content in pairs if places[content] % 2 == half] for half in (0, 1))
    if guard_rows is not None:
        selection, held_out = rows, _check_guard(guard_rows, rows[0])
    # Without a sampler of batches, each row is a batch already.
    ready = getattr(dataloader, "batch_sampler", dataloader) is None
    collate, batch_size = _seeded(private_copy(dataloader.collate_fn)[0], seed, ready), 1 if ready else batch_size
    # What a batch of a callable metric counts as is its own affair, so its size stays.
    budget = (token_budget() if tokens is None else tokens) if labeled and not ready else 0
    parts = [SampleRows(part, collate, batch_size, budget) for part in (selection, held_out)]
    kept = [_labeled(part) for part in parts] if labeled else parts
    unlabeled = sum(map(len, parts)) - sum(map(len, kept))
    return Sample(kept[0], kept[1], duplicates=len(rows) - len(places), unlabeled=unlabeled)


def _seeded(collate: Callable, seed: int, ready: bool) -> Callable:
    def collated(rows: list[Any]) -> Mapping[str, Any]:
        with random_state(seed):
            return collate(rows[0] if ready else rows)

    return collated


def _read_rows(dataset: Any, size: int, seed: int) -> list[Any]:
    if isinstance(dataset, IterableDatasetShard):
        # Each process would skip the rows of the others.
        dataset = dataset.dataset
    # torch's iterable data sets inherit a `__getitem__`, and some know their length.
    streamed = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    if streamed or not hasattr(dataset, "__len__"):
        return list(itertools.islice(_from_the_start(dataset), size))
    return [dataset[index] for index in _drawn(len(dataset), size, torch.Generator().manual_seed(seed))]


def _from_the_start(dataset: Any) -> Iterator[Any]:
    dataset, stuck = private_copy(dataset)
    if stuck:
        raise ValueError(
            f"The training data is a stream that can be read once: it holds a {type(stuck[0]).__name__}, and the rows "
            "of the sample would be lost to training. Expected a data set that starts over each time it is iterated."
        )
    return iter(dataset)


def _drawn(count: int, size: int, generator: torch.Generator) -> list[int]:
    """Returns the first numbers of a random permutation, as `torch.randperm` gives them, without the others."""
    drawn: list[int] = []
    moved: dict[int, int] = {}
    for place in range(min(size, count)):
        other = place + int(torch.randint(count - place, (), generator=generator))
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return drawn


def token_budget() -> int:
    """Returns the tokens up to which a batch has more rows than asked for, on the device that training uses."""
    return CPU_TOKENS if PartialState().device.type == "cpu" else TOKENS


def _label_counts(rows: SampleRows) -> dict[int, int] | None:
    """Returns the label tokens of each row; None where a batch has none, or is one row itself (padding-free)."""
    counts: dict[int, int] = {}
    for indices, batch in rows.batches():
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or len(labels) != len(indices):
            return None
        counts.update(zip(indices, (labels != IGNORE).sum(1).tolist(), strict=True))
    return counts


def _labeled(rows: SampleRows) -> SampleRows:
    """Returns the rows that have a label, the same object if all have one."""
    counts = _label_counts(rows)
    if counts is None:
        # A batch that is one row is one difference of the guard's, and many small ones tell more.
        return _labeled(SampleRows(rows.rows, rows.collate, rows.batch_size)) if rows.tokens else rows
    if not any(counts.values()):
        raise ValueError(
            f"None of the {len(rows)} rows looked at has a label: all `labels` of all batches are {IGNORE}, so there "
            "is no loss. Look at a batch of `trainer.get_train_dataloader()`: either truncation (`max_length`) cuts "
            "off what is to be learned, or the masks of prompts or turns cover everything, or the response template "
            "was not found."
        )
    left = [row for index, row in enumerate(rows.rows) if counts[index]]
    return rows if len(left) == len(rows) else SampleRows(left, rows.collate, rows.batch_size, rows.tokens)


def shortened(sample: Sample, rows: int, few: bool, held_out: bool = True) -> Sample:
    """Returns a sample of `rows` in each half, or if `few`, of as few long ones as have 1,024 label tokens."""

    def cut(half: SampleRows) -> SampleRows:
        return _enough(half.part(0, rows)) if few else half.part(0, rows)

    selection = cut(sample.selection)
    if not held_out:
        return replace(sample, selection=selection)
    kept = cut(sample.held_out)
    reserve = sample.held_out.part(len(kept), len(sample.held_out))
    return replace(sample, selection=selection, held_out=kept, reserve=reserve)


def _enough(rows: SampleRows) -> SampleRows:
    counts = _label_counts(rows) or {}
    for size in range(FEWEST_LONG, len(counts) + 1):
        if sum(counts[index] for index in range(size)) >= ENOUGH_TOKENS:
            return rows.part(0, size)
    return rows


def _check_guard(rows: Sequence[Any], example: Any) -> list[Any]:
    rows = [rows[index] for index in range(len(rows))]
    if not rows:
        raise UsageError("`guard_dataset` is empty, expected rows in the form of the training rows.")
    if not isinstance(example, Mapping) or not isinstance(rows[0], Mapping):
        return rows
    if missing := set(example) - set(rows[0]):
        raise UsageError(
            f"The rows of `guard_dataset` have the columns {sorted(rows[0])} and lack {sorted(missing)}. They must be "
            "in the form of the Trainer's own training rows: take them from `trainer.train_dataset` or from "
            "`trainer.eval_dataset`, after the Trainer has prepared it."
        )
    # The Trainer drops the columns that the model does not take in its data loader only.
    return [{name: row[name] for name in example} for row in rows]
