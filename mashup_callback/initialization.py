"""What training could start from: merges of the selected candidates, made and judged the same way."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import MashupConfig
from .distributed import failing_together
from .errors import OutOfStepError, UsageError
from .report import MergeInfo
from .scoring import Metric, RowLosses, SampleRows, evaluate
from .selection import Selection
from .trainee import Trainee, Update


logger = logging.getLogger(__name__)

# What merge_method="auto" tries: the mean, its two sparse relatives, and two that keep the norm of the updates.
AUTO_METHODS: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "karcher": {},
    "model_stock": {},
}
# Runs that a race leaves for top_k="auto" to try.
AUTO_RUNS = 5


def judged(config: MashupConfig) -> int:
    """Returns how many initializations are judged at most: the fresh one, the best single one, and the merges."""
    methods = len(AUTO_METHODS) if config.merge_method == "auto" else 1
    return 2 + methods * (AUTO_RUNS if config.top_k == "auto" else 1)


@dataclass(frozen=True, eq=False)
class Init:
    """
    Something that training could start from.

    Args:
        selection (`Selection`): The candidates in it.
        update (`Update`): What it changes, as the trainee will hold it.
        info (`MergeInfo`): How it was merged.
        losses (`RowLosses`): Its losses on the held-out rows.
    """

    selection: Selection
    update: Update
    info: MergeInfo
    losses: RowLosses

    @property
    def loss(self) -> float:
        """Its held-out loss; a loss that is not a number is the worst of all."""
        loss = self.losses.mean_loss
        return loss if loss == loss else float("inf")


class InitBuilder:
    """Merges selected candidates in the form that the trainee can hold, and evaluates the merges on held-out rows."""

    def __init__(
        self, model: nn.Module, trainee: Trainee, metric: Metric, held_out: SampleRows, config: MashupConfig
    ) -> None:
        self.model, self.trainee, self.metric, self.held_out, self.config = model, trainee, metric, held_out, config

    def fresh(self) -> RowLosses:
        """Returns the losses of the fresh initialization."""
        return evaluate(self.model, self.held_out, self.metric, share=True)

    def build(self, selection: Selection, method: str, parameters: Mapping[str, Any]) -> Init:
        """Merges a selection by one method."""
        sources = [score.source for score in selection.scores if score.source is not None]
        update, info = self.trainee.merge(sources, selection.weights, method, parameters)
        return Init(selection, update, info, evaluate(self.model, self.held_out, self.metric, update, share=True))

    def best_method(self, selection: Selection) -> Init:
        """Merges a selection by the method that is set, or by each of [`AUTO_METHODS`] and returns the best."""
        if self.config.merge_method != "auto":
            return self.build(selection, self.config.merge_method, self.config.merge_parameters)
        best, reasons = None, []
        for method, parameters in AUTO_METHODS.items():
            try:
                with failing_together():
                    init = self.build(selection, method, parameters)
            except (UsageError, OutOfStepError):
                raise
            except Exception as error:
                reasons.append(f"{method}: {type(error).__name__}: {error}")
                logger.warning("merge_method='auto' goes on without a method that failed: %s", reasons[-1])
                continue
            logger.info("merge_method=%s: held-out loss %.4f", init.info.method, init.loss)
            best = init if best is None else self.better(best, init)
        if best is None:
            raise RuntimeError(f"Every method that merge_method='auto' tries failed ({'; '.join(reasons)}).")
        return best

    def grow(self, selection: Selection) -> Init:
        """Adds the next best candidate for as long as the held-out loss falls."""
        best = self.best_method(selection.first(1, self.config.weights))
        for count in range(2, len(selection.scores) + 1):
            init = self.best_method(selection.first(count, self.config.weights))
            if self.better(best, init) is best:
                break
            best = init
        return best

    def better(self, first: Init, second: Init) -> Init:
        """Returns the one with the lower loss, and forgets the other: a merge of full models takes a lot of disk."""
        better, worse = (second, first) if second.loss < first.loss else (first, second)
        self.trainee.discard(worse.update)
        return better
