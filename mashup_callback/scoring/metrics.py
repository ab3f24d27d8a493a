"""Metrics: how losses on a batch are measured, and how a candidate is applied meanwhile."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UsageError
from ..model import without_adapters
from ..trainee import Trainee, Update
from .losses import IGNORE, RowLosses, language_model_losses


if TYPE_CHECKING:
    # The Trainer imports datasets, and importing the callback should not.
    from transformers import Trainer


class Metric(ABC):
    """What candidates are measured by, lower is better; by default on the base model with a candidate added."""

    # Under which its losses are cached; None where they are measured each time.
    name: str | None = None
    # Whether it is the loss of a language model, which needs rows with labels.
    labeled = False
    # Whether it gives the same numbers twice.
    repeatable = False
    # Whether all processes of a run must measure the same candidate at the same time.
    collective = False

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any, chunks: int | None = None) -> RowLosses:
        """Returns the losses on a batch; with `chunks`, the head of a sharded model is called so many times."""

    def base(self, model: nn.Module) -> AbstractContextManager[None]:
        """Returns the context in which candidates are applied: with the model's own adapters switched off, or not."""
        return without_adapters(model)

    def applied(self, model: nn.Module, update: Update | None) -> AbstractContextManager[None]:
        """Returns a context in which the model is what a candidate makes of it; without one it stays as it is."""
        return nullcontext() if update is None else update.applied(model)

    def compared(self, losses: RowLosses) -> torch.Tensor:
        """Returns what candidates are compared by, row by row; lower is better."""
        return losses.loss


@dataclass(frozen=True)
class LossMetric(Metric):
    """The language model's loss on the labels, or `"token_accuracy"`, which ranks by the share of them predicted."""

    name: str = "loss"
    labeled = repeatable = True

    def losses(self, model: nn.Module, batch: Any, chunks: int | None = None) -> RowLosses:
        return language_model_losses(model, batch, chunks)

    def compared(self, losses: RowLosses) -> torch.Tensor:
        return -losses.correct if self.name == "token_accuracy" else losses.loss


LOSS = LossMetric()


class _SumAndCount(Metric):
    """A metric that is called with the model and a batch, and returns a sum and what to divide it by."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any) -> tuple[float, float]: ...

    def losses(self, model: nn.Module, batch: Any, chunks: int | None = None) -> RowLosses:
        loss, count = (float(value) for value in self(model, batch))
        if not count >= 0:
            raise UsageError(
                f"The metric returned a loss of {loss:g} and the count {count:g}. Expected (loss summed over the "
                "batch, what to divide it by), the count positive, or 0 for a batch that does not count."
            )
        return RowLosses(*torch.tensor([[loss], [0.0], [count]], dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class CallableMetric(_SumAndCount):
    """A user's function that returns a loss summed over the batch and what to divide it by."""

    function: Callable[[nn.Module, Any], tuple[float, float]]

    def __call__(self, model: nn.Module, batch: Any) -> tuple[float, float]:
        return self.function(model, batch)


@dataclass(frozen=True, eq=False)
class ScoreMetric(_SumAndCount):
    """A user's function that returns a score of the batch, higher is better."""

    score: Callable[[nn.Module, Any], float]

    def __call__(self, model: nn.Module, batch: Any) -> tuple[float, float]:
        return -float(self.score(model, batch)), 1.0


@dataclass(frozen=True, eq=False)
class TrainerLoss(_SumAndCount):
    """
    A Trainer's own loss, for trainers whose batches have no labels (DPO, KTO, reward modelling, ...).

    A candidate is judged as what training would start from, written into the trainee's parameters. Hooks would not do:
    these trainers compare the model with itself without its adapter, and hooks would change both.
    """

    trainer: "Trainer"
    trainee: Trainee
    repeatable = collective = True

    def __call__(self, model: nn.Module, batch: Any) -> tuple[float, float]:
        """Returns the batch's mean loss times its rows, and its rows; nothing where none of them has a label."""
        rows, labels = _rows(batch), batch.get("labels") if isinstance(batch, Mapping) else None
        with _trainer_metrics_restored(self.trainer):
            loss = self.trainer.compute_loss(model, batch)
        # The mean of no labels is not a number; all processes compute it, as they may gather something for it.
        unlabeled = isinstance(labels, torch.Tensor) and not (labels != IGNORE).any()
        return (0.0, 0) if unlabeled else (float(loss) * rows, rows)

    def base(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def applied(self, model: nn.Module, update: Update | None) -> AbstractContextManager[None]:
        return nullcontext() if update is None else self.trainee.written(update)


def make_metric(
    value: str | Callable[[nn.Module, Any], tuple[float, float]] | Metric,
    trainer: "Trainer | None" = None,
    trainee: Trainee | None = None,
) -> Metric:
    """Returns what a setting says as a metric, or the loss of a trainer on what it trains."""
    if trainer is not None:
        return TrainerLoss(trainer, trainee)
    if isinstance(value, str):
        return LossMetric(value)
    return value if isinstance(value, Metric) else CallableMetric(value)


@contextmanager
def _trainer_metrics_restored(trainer: "Trainer") -> Iterator[None]:
    # TRL's trainers note metrics and token counts while they compute a loss; the first log would show them.
    before = copy.deepcopy({name: value for name, value in vars(trainer).items() if _is_plain(value)})
    try:
        yield
    finally:
        vars(trainer).update(before)


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
