"""Losses that a batch alone does not give: a Trainer's own, and the user's score."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..factors import Factors
from ..lora.trainee import held
from ..model.layers import Trainee


if TYPE_CHECKING:
    # The Trainer imports datasets, and importing the callback should not.
    from transformers import Trainer


@dataclass(frozen=True, eq=False)
class TrainerLoss:
    """
    A Trainer's own loss as a metric, for trainers whose batches have no labels (DPO, KTO, reward modelling, ...).

    A candidate is judged as what training would start from: cut to the trainee's rank and layers and written into the
    trainee's parameters, which get back what they held. Hooks would not do: these trainers compare the model with
    itself without its adapter, and hooks would change both.

    Args:
        trainer (`transformers.Trainer`):
            Whose `compute_loss` is used.
        trainee (`Trainee`):
            The adapter that it trains.
    """

    trainer: "Trainer"
    trainee: Trainee

    def __call__(self, model: nn.Module, batch: Any) -> tuple[float, float]:
        """Returns the batch's mean loss times its rows, and its rows."""
        with _books_kept(self.trainer):
            loss = self.trainer.compute_loss(model, batch)
        rows = _rows(batch)
        return float(loss) * rows, rows

    @contextmanager
    def applied(self, model: nn.Module, factors: Factors | None) -> Iterator[None]:
        """Context in which the trainee holds a candidate; without one it stays as it is."""
        if not factors:
            yield
            return
        # Imported here so that importing the callback does not import mergekit.
        from ..lora.merge import merge_factors

        known = {name: update for name, update in factors.items() if name in self.trainee.targets}
        if any(update.rank > self.trainee.ranks[name] for name, update in known.items()):
            known = merge_factors([known], weights=[1.0], ranks=self.trainee.ranks).factors
        with held(model, self.trainee, known):
            yield


@dataclass(frozen=True, eq=False)
class ScoreMetric:
    """
    A user's score, higher is better, as a metric, lower is better.

    Args:
        score (`Callable`):
            Called with the model that has the candidate applied, and a batch; returns a number.
    """

    score: Callable[[nn.Module, Any], float]

    def __call__(self, model: nn.Module, batch: Any) -> tuple[float, float]:
        return -float(self.score(model, batch)), 1.0


@contextmanager
def _books_kept(trainer: "Trainer") -> Iterator[None]:
    # TRL's trainers note metrics and token counts while they compute a loss; the first log would show them.
    books = {name: value for name, value in vars(trainer).items() if _is_plain(value)}
    before = copy.deepcopy(books)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | torch.Tensor) and not isinstance(value, nn.Parameter)


def _rows(batch: Any) -> int:
    tensors = batch.values() if isinstance(batch, Mapping) else [batch]
    sizes = (len(value) for value in tensors if hasattr(value, "__len__") and not isinstance(value, str))
    return next(sizes, 1)
