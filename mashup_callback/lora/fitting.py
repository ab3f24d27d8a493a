"""What the trained adapter can hold of updates: its layers and ranks, and its own balance of A and B."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from ..lowrank import Factors, LoraFactors, trainable
from ..model import with_adapters, write_parameters
from .merge import merge_factors
from .targets import Target, TrainedAdapter, find_adapter


class Holder:
    """The adapter that is trained on a model, as what holds updates of layers whose hooks are never called."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Switched off, an adapter has no gradients and looks as if it were not trained.
        with with_adapters(model):
            self.adapter = find_adapter(model, overwrite=True)

    def held(self, factors: Factors) -> AbstractContextManager[None]:
        """Returns a context in which it holds updates."""
        return held(self.model, self.adapter, factors)

    def lost(self, factors: Factors) -> float:
        """Returns the squared norm of what the adapter's layers and ranks cannot hold of updates."""
        return energy(factors) - energy(cut_to(factors, self.adapter))


def energy(factors: Factors) -> float:
    return sum(update.norm() ** 2 for update in factors.values())


def cut_to(factors: Factors, adapter: TrainedAdapter) -> Factors:
    """Returns the best approximation of updates in the layers and the ranks of the trained adapter."""
    ranks = adapter.ranks
    known = {name: update for name, update in factors.items() if name in ranks}
    if all(update.rank <= ranks[name] for name, update in known.items()):
        return known
    return merge_factors([known], weights=[1.0], ranks=ranks).factors


@contextmanager
@torch.no_grad()
def held(model: nn.Module, adapter: TrainedAdapter, factors: Factors) -> Iterator[None]:
    """Context in which a model computes with updates, cut to what its trained adapter can hold, in that adapter."""
    values = adapter.values(fit(cut_to(factors, adapter), adapter))
    with with_adapters(model):
        try:
            # Forward passes read the parameters only; their fp32 masters stay as they are.
            write_parameters(model, values, masters=False)
            yield
        finally:
            write_parameters(model, adapter.before, masters=False)


@torch.no_grad()
def fit(merged: Factors, adapter: TrainedAdapter) -> dict[str, LoraFactors]:
    """
    Returns what the trained adapter's parameters will hold of a merge of no larger ranks.

    They get the merge's singular vectors, with the roots of the singular values on either side, and A as large as the
    fresh A: how A and B of the candidates were balanced has no effect on training. Ranks that the merge does not fill
    keep the fresh rows of A and get zero columns of B: with both zero they would never learn.

    Raises:
        ValueError: A layer of the merge has a larger rank than the trained adapter's.
    """
    for name, target in adapter.targets.items():
        if name in merged and merged[name].rank > target.rank:
            raise ValueError(
                f"The merge has rank {merged[name].rank} in layer {name}, the trained adapter {target.rank}. Merge "
                "with `ranks=adapter.ranks`."
            )
    wholes = {name: update for name, update in merged.items() if name in adapter.wholes}
    return wholes | {name: _fit_layer(merged.get(name), target) for name, target in adapter.targets.items()}


def _fit_layer(update: LoraFactors | None, target: Target) -> LoraFactors:
    fresh = LoraFactors(target.A, target.B, target.scaling)
    if target.reverse:
        return _transposed(_fit_factors(update and _transposed(update), _transposed(fresh)))
    return _fit_factors(update, fresh)


def _transposed(update: LoraFactors) -> LoraFactors:
    return LoraFactors(update.B.T, update.A.T, update.scaling)


def _fit_factors(update: LoraFactors | None, fresh: LoraFactors) -> LoraFactors:
    if update is None:
        return LoraFactors(fresh.A.clone(), torch.zeros_like(fresh.B), fresh.scaling)
    return trainable(update, fresh)
