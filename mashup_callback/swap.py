"""Writing a merge into the adapter that is being trained, in place."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .factors import Factors, LoraFactors
from .layers import Target, Trainee


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

    With the merge's delta weight s·B·A and the trainee's scaling t, the trainee gets √(s/t)·A and √(s/t)·B, which
    keeps the ratio of their norms. Ranks that the merge does not fill keep the trainee's fresh rows of A and get zero
    columns of B: with both zero they would never learn.

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
    A, B = target.A.detach().clone(), torch.zeros_like(target.B)
    if update is None:
        return LoraFactors(A, B, target.scaling)
    if update.rank > target.rank:
        raise ValueError(
            f"The merge has rank {update.rank} in layer {target.name}, the trainee {target.rank}. Merge with "
            "`ranks=trainee.ranks`."
        )
    ratio = update.scaling / target.scaling
    root = math.sqrt(abs(ratio))
    A[: update.rank] = (root * update.A).to(A)
    B[:, : update.rank] = (math.copysign(root, ratio) * update.B).to(B)
    return LoraFactors(A, B, target.scaling)


@torch.no_grad()
def swap(trainee: Trainee, fitted: FittedMerge) -> None:
    """
    Writes a fitted merge into the trainee's parameters.

    The parameters that the optimizer holds are filled, never replaced. If a write fails, the parameters written so
    far get back what they held.

    Args:
        trainee (`Trainee`):
            The adapter that is trained.
        fitted (`FittedMerge`):
            What [`fit`] made for it.
    """
    values = _values(trainee.targets, fitted.factors)
    before = [(parameter, parameter.detach().clone()) for parameter, _ in values]
    try:
        for parameter, value in values:
            parameter.copy_(value)
    except BaseException:
        for parameter, value in before:
            parameter.copy_(value)
        raise


def _values(targets: Mapping[str, Target], factors: Factors) -> list[tuple[nn.Parameter, torch.Tensor]]:
    pairs = [(targets[name], update) for name, update in factors.items()]
    return [pair for target, update in pairs for pair in ((target.A, update.A), (target.B, update.B))]
