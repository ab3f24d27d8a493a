"""A checkpoint's weights in the place of the live model's: for a while, or for good."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .adapters import Adapter, load_factors
from .candidates.candidate import Candidate
from .checkpoints import Checkpoint, check_checkpoint, read_checkpoint, read_tensor
from .distributed import joint
from .errors import CheckpointError
from .factors import Factors
from .hooks import applied
from .model_tensors import describe_model
from .parameters import clean_name, local_part, read_parameters, regather, reshard, write_parameters
from .vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Replacement:
    """
    Weights of a checkpoint that take the place of the model's.

    Args:
        checkpoint (`Checkpoint`): From [`check_checkpoint`].
        names (`frozenset[str]`): Parameters that are replaced; the others stay what they are.
    """

    checkpoint: Checkpoint
    names: frozenset[str]

    @classmethod
    def whole(cls, checkpoint: Checkpoint) -> "Replacement":
        """Returns a replacement of every weight."""
        return cls(checkpoint, frozenset(checkpoint.tensors))


@contextmanager
def replaced(model: nn.Module, replacement: Replacement) -> Iterator[None]:
    """
    Context in which the model has a checkpoint's weights; afterwards every bit is as it was.

    Beside the model there are in memory at most one copy of what is replaced (this process's share of it, on the CPU)
    and one tensor of the checkpoint, from a memory-mapped shard. Tied weights stay tied, buffers are left alone.

    Args:
        model (`torch.nn.Module`):
            The model, in any launch mode.
        replacement (`Replacement`):
            What to put in its place.
    """
    values = _values(model, replacement)
    saved = _save(model, replacement.names)
    try:
        write_parameters(model, values, masters=False)
        yield
    finally:
        _restore(model, saved)


def replace_weights(model: nn.Module, replacement: Replacement) -> None:
    """
    Gives the model a checkpoint's weights for good, tensor by tensor; if that fails, what it had before.

    The parameters that the optimizer holds are filled, never replaced, and the fp32 masters that ZeRO keeps with them.

    Args:
        model (`torch.nn.Module`):
            The model, in any launch mode; every process must call it.
        replacement (`Replacement`):
            What to put in its place.
    """
    values = _values(model, replacement)
    saved = _save(model, replacement.names)
    try:
        with joint():
            write_parameters(model, values)
    except BaseException:
        _restore(model, saved)
        raise


class _Values(Mapping[str, torch.Tensor]):
    """The tensors of a replacement, each read when it is asked for and kept by nobody."""

    def __init__(self, replacement: Replacement, tails: Mapping[str, tuple[int, torch.Tensor]]) -> None:
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


def _values(model: nn.Module, replacement: Replacement) -> _Values:
    """Returns the tensors in the model's shapes: rows of tokens that the checkpoint lacks stay the model's own."""
    checkpoint = replacement.checkpoint
    resized = [name for name in checkpoint.resized if name in replacement.names]
    own = read_parameters(model, resized) if resized else {}
    rows = {name: min(len(own[name]), checkpoint.tensors[name].info.shape[0]) for name in resized}
    return _Values(replacement, {name: (rows[name], own[name][rows[name] :].cpu()) for name in resized})


def _save(model: nn.Module, names: frozenset[str]) -> dict[str, torch.Tensor]:
    return {
        name: local_part(parameter).to("cpu", copy=True)
        for name, parameter in _named(model).items()
        # FSDP1 keeps many parameters in a flat one.
        if clean_name(name) in names or "_flat_param" in name
    }


@torch.no_grad()
def _restore(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    named = _named(model)
    for name, value in saved.items():
        local_part(named[name]).copy_(value)
        if hasattr(named[name], "ds_tensor"):
            regather(named[name])


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    reshard(model)
    return dict(model.named_parameters())


def applied_to(model: nn.Module, update: Factors | Replacement) -> AbstractContextManager[None]:
    """
    Returns a context in which the model is what a candidate makes of it.

    Args:
        model (`torch.nn.Module`):
            The model.
        update (`Factors` or `Replacement`):
            Low-rank updates, added by hooks, or weights, put in the place of the model's.
    """
    return replaced(model, update) if isinstance(update, Replacement) else applied(model, update)


def load_update(source: Adapter | Checkpoint) -> Factors | Replacement:
    """
    Returns what a candidate changes in a model: the factors of an adapter, which are read, or a checkpoint's weights.

    Args:
        source (`Adapter` or `Checkpoint`):
            The candidate, checked.
    """
    return Replacement.whole(source) if isinstance(source, Checkpoint) else load_factors(source)


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
