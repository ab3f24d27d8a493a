"""What is trained, as the stages see it: the protocols of a trainee, of what a candidate is and of what it changes."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .candidates import Candidate
from .report import MashupReport, MergeInfo


class Update(Protocol):
    """What a candidate or a merge changes in a model."""

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which `model` computes with the update; afterwards every bit is as it was."""


class Source(Protocol):
    """
    A candidate on disk that fits the model.

    Attributes:
        rank (`int`, *optional*): Largest rank over the layers; None for a full checkpoint.
        warnings (`tuple[str, ...]`): What is worth knowing but no reason to reject it.
    """

    rank: int | None
    warnings: tuple[str, ...]

    def load(self, device: torch.device | str = "cpu") -> Update:
        """Returns what it changes; raises `AdapterError` where its files changed or hold unusable values."""

    def fingerprint(self) -> str | None:
        """Returns a hash of what it computes, by which its scores are cached; None where they are not."""

    def release(self) -> None:
        """Forgets what was read and kept in memory; it is read again when it is needed."""


class Trainee(Protocol):
    """
    What is trained: a LoRA adapter, or the model's own weights.

    Every process of a distributed run calls each method at the same point.

    Attributes:
        relations (`tuple[str, ...]`): Relations to the base model that a Hub search lists, `"adapter"` and
            `"finetune"`.
    """

    relations: tuple[str, ...]

    def check(self, candidate: Candidate, description: Any) -> Any:
        """Returns a candidate's description as it fits the model, by its headers alone; raises `AdapterError`."""

    def admit(self, candidate: Candidate) -> Source:
        """Returns a candidate on disk as something that can be scored and merged; raises `AdapterError`."""

    def merge(
        self, sources: Sequence[Source], weights: Sequence[float], method: str, parameters: Mapping[str, Any]
    ) -> tuple[Update, MergeInfo]:
        """Merges candidates in the form that the trainee can hold."""

    def written(self, update: Update) -> AbstractContextManager[None]:
        """Returns a context in which the trainee holds an update, and after which it holds what it held before."""

    def write(self, update: Update) -> None:
        """Fills the trainee's parameters, reads them back, and puts back what they held where that fails."""

    def undo(self) -> None:
        """Gives the trainee what it held before [`Trainee.write`]."""

    def keep(self, update: Update) -> Update:
        """Returns an update whose files are its own: those of a candidate are copied."""

    def discard(self, update: Update) -> None:
        """Forgets an update that was not chosen, with the files that were made for it."""

    def save(self, update: Update, directory: Path, report: MashupReport) -> None:
        """Writes an update as an adapter or a model, with its card."""

    def close(self) -> None:
        """Removes the temporary files of the run."""


@dataclass(frozen=True, eq=False)
class Init:
    """
    Something that training could start from.

    Args:
        sources (`tuple[Source, ...]`): The candidates in it.
        weights (`tuple[float, ...]`): Their weights.
        update (`Update`): What it changes.
        info (`MergeInfo`): How it was merged.
        losses (`RowLosses`): Its losses on the held-out rows.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    update: Update
    info: MergeInfo
    losses: Any
