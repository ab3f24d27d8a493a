"""A checkpoint's weights in the place of the live model's: for a while, or for good."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..candidates import Candidate
from ..errors import CheckpointError
from ..factors import Factors
from ..formats.adapter import Adapter, load_factors
from ..formats.checkpoint import Checkpoint, check_checkpoint, read_checkpoint, read_tensor
from ..formats.vocabulary import Vocabulary
from ..lora.hooks import applied
from ..model.parameters import (
    clean_name,
    fill_master,
    local_part,
    read_parameters,
    regather,
    reshard,
    write_parameters,
)
from ..model.tensors import describe_model


@dataclass(frozen=True, eq=False)
class FullUpdate:
    """
    Weights of a checkpoint that take the place of the model's.

    Args:
        checkpoint (`Checkpoint`): From [`check_checkpoint`].
        names (`frozenset[str]`): Parameters that are replaced; the others stay what they are.
    """

    checkpoint: Checkpoint
    names: frozenset[str]

    @classmethod
    def whole(cls, checkpoint: Checkpoint) -> "FullUpdate":
        """Returns a replacement of every weight."""
        return cls(checkpoint, frozenset(checkpoint.tensors))

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which the model has these weights."""
        return replaced(model, self)


@dataclass(frozen=True, eq=False)
class CheckpointSource:
    """A full checkpoint that fits the model, with its tensors named as the model names them."""

    checkpoint: Checkpoint
    rank: None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.checkpoint.warnings

    def load(self, device: torch.device | str = "cpu") -> FullUpdate:
        return FullUpdate.whole(self.checkpoint)

    def fingerprint(self) -> str | None:
        return None

    def release(self) -> None:
        """Nothing is kept: tensors are read one at a time."""


def described(source: Any) -> Adapter | Checkpoint:
    """Returns the description in a source."""
    return source.checkpoint if isinstance(source, CheckpointSource) else source.adapter


@contextmanager
def replaced(model: nn.Module, replacement: FullUpdate) -> Iterator[None]:
    """
    Context in which the model has a checkpoint's weights; afterwards every bit is as it was.

    Beside the model there are in memory at most one copy of what is replaced (this process's share of it, on the CPU)
    and one tensor of the checkpoint, from a memory-mapped shard. Tied weights stay tied, buffers are left alone.

    Args:
        model (`torch.nn.Module`):
            The model, in any launch mode.
        replacement (`FullUpdate`):
            What to put in its place.
    """
    values = replaced_tensors(model, replacement)
    saved = save_weights(model, replacement.names)
    try:
        write_parameters(model, values, masters=False)
        yield
    finally:
        restore_weights(model, saved)


class ReplacedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a replacement, each read when it is asked for and kept by nobody."""

    def __init__(self, replacement: FullUpdate, tails: Mapping[str, tuple[int, torch.Tensor]]) -> None:
        self._replacement, self._tails = replacement, tails

    def __getitem__(self, name: str) -> torch.Tensor:
        value = read_tensor(self._replacement.checkpoint, name)
        if name not in self._tails:
            return value
        rows, tail = self._tails[name]
        return torch.cat([value[:rows].to(tail.dtype), tail])

    def __contains__(self, name: object) -> bool:
        return name in self._replacement.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._replacement.names)

    def __len__(self) -> int:
        return len(self._replacement.names)


def replaced_tensors(model: nn.Module, replacement: FullUpdate) -> ReplacedTensors:
    """Returns the tensors in the model's shapes: rows of tokens that the checkpoint lacks stay the model's own."""
    checkpoint = replacement.checkpoint
    resized = [name for name in checkpoint.resized if name in replacement.names]
    own = read_parameters(model, resized) if resized else {}
    rows = {name: min(len(own[name]), checkpoint.tensors[name].info.shape[0]) for name in resized}
    return ReplacedTensors(replacement, {name: (rows[name], own[name][rows[name] :].cpu()) for name in resized})


def save_weights(model: nn.Module, names: frozenset[str]) -> dict[str, torch.Tensor]:
    """Returns copies on the CPU of what this process holds of parameters."""
    return {
        name: local_part(parameter).to("cpu", copy=True)
        for name, parameter in _named(model).items()
        # FSDP1 keeps many parameters in a flat one.
        if clean_name(name) in names or "_flat_param" in name
    }


@torch.no_grad()
def restore_weights(model: nn.Module, saved: Mapping[str, torch.Tensor], masters: bool = False) -> None:
    """Puts back what [`save_weights`] returned, and into the fp32 masters that ZeRO keeps if they were written too."""
    named = _named(model)
    for name, value in saved.items():
        local_part(named[name]).copy_(value)
        if hasattr(named[name], "ds_tensor"):
            regather(named[name])
        if masters:
            fill_master(named[name])


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    reshard(model)
    return dict(model.named_parameters())


def applied_to(model: nn.Module, update: Factors | FullUpdate) -> AbstractContextManager[None]:
    """
    Returns a context in which the model is what a candidate makes of it.

    Args:
        model (`torch.nn.Module`):
            The model.
        update (`Factors` or `FullUpdate`):
            Low-rank updates, added by hooks, or weights, put in the place of the model's.
    """
    return replaced(model, update) if isinstance(update, FullUpdate) else applied(model, update)


def load_update(source: Adapter | Checkpoint) -> Factors | FullUpdate:
    """
    Returns what a candidate changes in a model: the factors of an adapter, which are read, or a checkpoint's weights.

    Args:
        source (`Adapter` or `Checkpoint`):
            The candidate, checked.
    """
    return FullUpdate.whole(source) if isinstance(source, Checkpoint) else load_factors(source)


def admit_checkpoint(model: nn.Module, candidate: Candidate, vocabulary: Vocabulary | None = None) -> Checkpoint:
    """
    Reads a candidate's description and checks that its weights can take the place of the model's.

    Args:
        model (`torch.nn.Module`):
            The model.
        candidate (`Candidate`):
            A full checkpoint on disk.
        vocabulary (`Mapping[str, int]`, *optional*):
            Tokens of the tokenizer that training uses.

    Raises:
        CheckpointError: The reason why not.
    """
    return fit_checkpoint(model, read_checkpoint(candidate), vocabulary)


def fit_checkpoint(model: nn.Module, checkpoint: Checkpoint, vocabulary: Vocabulary | None = None) -> Checkpoint:
    """
    Checks that a checkpoint's weights can take the place of the model's.

    Args:
        model (`torch.nn.Module`):
            The model.
        checkpoint (`Checkpoint`):
            Its description.
        vocabulary (`Mapping[str, int]`, *optional*):
            Tokens of the tokenizer that training uses.

    Raises:
        CheckpointError: The reason why not.
    """
    try:
        tensors = describe_model(model)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return check_checkpoint(checkpoint, tensors, vocabulary)
