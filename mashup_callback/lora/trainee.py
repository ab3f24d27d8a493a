"""Writing a merge into the adapter that is being trained, in place."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..distributed import exchange, joint
from ..factors import Factors, LoraFactors
from ..full.weights import replaced_tensors, restore_weights, save_weights
from ..lowrank import trainable
from ..model.layers import Target, Trainee
from ..model.parameters import stream_parameters, write_parameters
from ..model.tensors import FullTrainee


if TYPE_CHECKING:
    from ..full.trainee import FittedModel


@dataclass(frozen=True, eq=False)
class FittedMerge:
    """
    A merge in the form that the trainee has: its ranks, its scaling, its layers and its dtype.

    Args:
        factors (`Mapping[str, LoraFactors]`): What its parameters will hold, by layer.
        lost_energy (`float`): Share of the merge's squared Frobenius norm in layers that the trainee lacks.
        lost_layers (`tuple[str, ...]`): These layers.
    """

    factors: Factors
    lost_energy: float = 0.0
    lost_layers: tuple[str, ...] = ()


@torch.no_grad()
def fit(merged: Factors, trainee: Trainee) -> FittedMerge:
    """
    Expresses a merge in the trainee's parameters.

    The trainee gets the merge's singular vectors, with the roots of the singular values on either side, and A as large
    as the fresh A: how A and B of the candidates were balanced has no effect on training. Ranks that the merge does
    not fill keep the trainee's fresh rows of A and get zero columns of B: with both zero they would never learn.

    Args:
        merged (`Mapping[str, LoraFactors]`):
            The merge, of at most the trainee's rank in each layer.
        trainee (`Trainee`):
            The adapter that is trained.

    Raises:
        ValueError: A layer of the merge has a larger rank than the trainee's.
    """
    energies = {name: update.norm() ** 2 for name, update in merged.items()}
    lost = tuple(name for name in merged if name not in trainee.targets)
    total = sum(energies.values())
    fitted = {name: _fit_layer(merged.get(name), target) for name, target in trainee.targets.items()}
    return FittedMerge(fitted, sum(energies[name] for name in lost) / total if total else 0.0, lost)


def _fit_layer(update: LoraFactors | None, target: Target) -> LoraFactors:
    if update is None:
        return LoraFactors(target.A.clone(), torch.zeros_like(target.B), target.scaling)
    if update.rank > target.rank:
        raise ValueError(
            f"The merge has rank {update.rank} in layer {target.name}, the trainee {target.rank}. Merge with "
            "`ranks=trainee.ranks`."
        )
    return trainable(update, LoraFactors(target.A, target.B, target.scaling))


def swap(model: nn.Module, trainee: Trainee | FullTrainee, fitted: "FittedMerge | FittedModel") -> Callable[[], None]:
    """
    Writes a fitted merge into the trainee's parameters, on every process, and reads it back.

    If the write fails on any process, or what a process reads is not what the others read, all of them write back
    what the trainee held before.

    Args:
        model (`torch.nn.Module`):
            The model that is trained.
        trainee (`Trainee` or `FullTrainee`):
            Its adapter, or its weights.
        fitted (`FittedMerge` or `FittedModel`):
            What was made for it.

    Returns:
        `Callable`: Gives the trainee what it held before; every process must call it, or none.

    Raises:
        ValueError: A value has another shape than its parameter.
        RuntimeError: The parameters do not hold what was written, or differ between processes.
    """
    if isinstance(trainee, FullTrainee):
        # The weights one at a time, and of the old ones this process's share: two copies would not fit.
        values = replaced_tensors(model, fitted.replacement)
        undo = partial(restore_weights, model, save_weights(model, fitted.replacement.names), masters=True)
    else:
        values, before = _values(trainee, fitted.factors), _values(trainee, trainee.targets)
        undo = partial(write_parameters, model, before)
        with joint():
            _check_shapes(values, before)
    try:
        with joint():
            write_parameters(model, values)
            _check_written(stream_parameters(model, values), values)
    except BaseException:
        undo()
        raise
    return undo


@contextmanager
@torch.no_grad()
def held(model: nn.Module, trainee: Trainee, merged: Factors) -> Iterator[None]:
    """
    Context in which the trainee holds a merge, and after which it holds what it held before, to the bit.

    Args:
        model (`torch.nn.Module`):
            The model that is trained.
        trainee (`Trainee`):
            Its adapter.
        merged (`Mapping[str, LoraFactors]`):
            The merge, of at most the trainee's rank in each layer.
    """
    values, before = _values(trainee, fit(merged, trainee).factors), _values(trainee, trainee.targets)
    try:
        # Forward passes read the parameters only; their fp32 masters stay as they are.
        write_parameters(model, values, masters=False)
        yield
    finally:
        write_parameters(model, before, masters=False)


def _values(trainee: Trainee, factors: Mapping[str, LoraFactors | Target]) -> dict[str, torch.Tensor]:
    named = [(trainee.parameter_names(layer), factor) for layer, factor in factors.items()]
    return {name: value for (a, b), factor in named for name, value in ((a, factor.A), (b, factor.B))}


def _check_shapes(values: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        if name not in before or value.shape != before[name].shape:
            expected = tuple(before[name].shape) if name in before else "no such parameter"
            raise ValueError(f"The merge has shape {tuple(value.shape)} for {name}, the trainee {expected}.")


def _check_written(found: Iterable[tuple[str, torch.Tensor]], values: Mapping[str, torch.Tensor]) -> None:
    lost, digest = set(values), hashlib.sha256()
    for name, value in found:
        if torch.equal(value, values[name].to(value)):
            lost.discard(name)
        _digest(digest, name, value)
    if lost:
        raise RuntimeError(
            f"{len(lost)} of {len(values)} parameters do not hold the merge that was written (such as {min(lost)}). "
            "Something else writes to the model at the same time, or keeps its parameters in a way unknown here."
        )
    checksums = exchange(digest.hexdigest())
    if len(set(checksums)) > 1:
        different = [rank for rank, other in enumerate(checksums) if other != checksums[0]]
        raise RuntimeError(
            f"The weights written on the processes {different} differ from those of process 0. The processes must "
            "start from the same fresh adapter: set the same seed on all of them."
        )


def checksum(values: Mapping[str, torch.Tensor]) -> str:
    """Returns a SHA-256 in hex of named tensors, to the bit."""
    digest = hashlib.sha256()
    for name in sorted(values):
        _digest(digest, name, values[name])
    return digest.hexdigest()


def _digest(digest: "hashlib._Hash", name: str, value: torch.Tensor) -> None:
    digest.update(name.encode())
    digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())


class WrittenAdapter:
    """A trainee with its model, as [`TrainerLoss`] takes it."""

    def __init__(self, model: nn.Module, trainee: Trainee) -> None:
        self.model, self.trainee = model, trainee

    @contextmanager
    def written(self, update: Any) -> Iterator[None]:
        """Context in which the trainee holds an update, cut to its ranks and layers."""
        # Imported here so that importing the callback does not import mergekit.
        from .merge import merge_factors

        known = {name: factors for name, factors in update.factors.items() if name in self.trainee.targets}
        if any(factors.rank > self.trainee.ranks[name] for name, factors in known.items()):
            known = merge_factors([known], weights=[1.0], ranks=self.trainee.ranks).factors
        with held(self.model, self.trainee, known):
            yield
