"""A checkpoint's weights in the place of the live model's: for a while, or for good."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..formats import Checkpoint, check_unchanged, read_tensor
from ..model import clean_name, fill_master, local_part, regather, reshard, write_parameters


@dataclass(frozen=True, eq=False)
class FullUpdate:
    """
    Weights of a checkpoint that take the place of the model's parameters called `names`; others stay what they are.

    `recipe` is mergekit's configuration of the merge, if it is one. Files that were made in this run are `owned`.
    """

    checkpoint: Checkpoint
    names: frozenset[str]
    recipe: str = ""
    owned: bool = False

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """
        Context in which the model has these weights; afterwards every bit is as it was.

        Beside the model there are in memory at most one copy of what is replaced (this process's share of it, on the
        CPU) and one tensor of the checkpoint, from a memory-mapped shard.
        """
        saved = save_weights(model, self.names)
        try:
            write_parameters(model, CheckpointTensors(self), masters=False)
            yield
        finally:
            restore_weights(model, saved)

    def warnings(self, model: nn.Module) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, eq=False)
class CheckpointSource:
    """A full checkpoint that fits the model, with its tensors named as the model names them."""

    checkpoint: Checkpoint

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


class CheckpointTensors(Mapping[str, torch.Tensor]):
    """The tensors of an update, each read when it is asked for and kept by nobody."""

    def __init__(self, update: FullUpdate) -> None:
        self._update = update

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._update.checkpoint, name)

    def __contains__(self, name: object) -> bool:
        return name in self._update.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._update.names)

    def __len__(self) -> int:
        return len(self._update.names)


def find_trained_weights(model: nn.Module) -> frozenset[str]:
    """Returns the names of the weights that are trained; none where an adapter of any kind is on the model."""
    bare = extract_model_from_parallel(model)
    if getattr(bare, "peft_config", None):
        return frozenset()
    return frozenset(clean_name(name) for name, parameter in bare.named_parameters() if parameter.requires_grad)


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
