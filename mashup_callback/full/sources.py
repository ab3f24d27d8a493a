"""Candidates of full fine-tuning, a full checkpoint or an adapter, as inputs of a merge of full models."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..formats import Adapter, Checkpoint, check_unchanged
from .merge import ModelInput
from .weights import FullUpdate


class MergeDirectories(Protocol):
    """Where the base model and adapters that we have checked are on disk, for mergekit to read."""

    def base_directory(self) -> Path:
        """Returns a directory with the model's weights as they are in memory."""

    def adapter_directory(self, adapter: Adapter, load: Callable[[], Any]) -> Path:
        """Returns a directory with a copy of an adapter, whose update `load` reads."""


@dataclass(frozen=True, eq=False)
class CheckpointSource:
    """A full checkpoint that fits the model, with its tensors named as the model names them."""

    checkpoint: Checkpoint
    needs_base: bool = False

    @property
    def rank(self) -> None:
        return None

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.checkpoint.warnings

    def load(self, device: torch.device | str = "cpu") -> FullUpdate:
        check_unchanged(self.checkpoint)
        return FullUpdate(self.checkpoint, frozenset(self.checkpoint.tensors))

    def fingerprint(self) -> str | None:
        return None

    def release(self) -> None:
        """Does nothing: a checkpoint is read a tensor at a time."""

    def alone(self) -> Checkpoint | None:
        """Returns the checkpoint that it is without a merge; None where one has to be made."""
        check_unchanged(self.checkpoint)
        return self.checkpoint

    def merge_input(self, directories: MergeDirectories) -> ModelInput:
        """Returns it as an input for mergekit."""
        check_unchanged(self.checkpoint)
        return ModelInput(Path(self.checkpoint.path))


@dataclass(frozen=True, eq=False)
class AdapterOnBase:
    """An adapter of the model: scored as it is for a LoRA trainee, merged as the base with the adapter in it."""

    adapter: Adapter
    source: Any
    needs_base: bool = True

    @property
    def rank(self) -> int | None:
        return self.source.rank

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.source.warnings

    def load(self, device: torch.device | str = "cpu") -> Any:
        return self.source.load(device)

    def fingerprint(self) -> str | None:
        return self.source.fingerprint()

    def release(self) -> None:
        self.source.release()

    def alone(self) -> Checkpoint | None:
        """Returns None: an adapter is no model without its base."""
        return None

    def merge_input(self, directories: MergeDirectories) -> ModelInput:
        """Returns it as an input for mergekit."""
        return ModelInput(directories.base_directory(), directories.adapter_directory(self.adapter, self.source.load))
