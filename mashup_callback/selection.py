"""Which of the scored candidates are merged, and with which weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scoring import Score


@dataclass(frozen=True, eq=False)
class Selection:
    """
    The candidates to merge.

    Args:
        scores (`tuple[Score, ...]`): Their scores, the best first; from each training run at most one.
        weights (`tuple[float, ...]`): Their weights, which sum to one unless the user gave numbers.
    """

    scores: tuple[Score, ...]
    weights: tuple[float, ...]

    def first(self, count: int, weights: str | Sequence[float] = "equal") -> "Selection":
        """Returns the best `count` candidates of this selection, weighted anew."""
        return _weighted(self.scores[:count], weights)


def select(scores: Sequence[Score], top_k: int | None, weights: str | Sequence[float] = "equal") -> Selection:
    """
    Selects the best candidates, at most one checkpoint of a training run.

    Args:
        scores (`Sequence[Score]`):
            All scores.
        top_k (`int`, *optional*):
            How many to select; fewer candidates are all selected, and `None` selects one of every run.
        weights (`str` or `Sequence[float]`, *optional*, defaults to `"equal"`):
            `"equal"`, `"softmax"` of minus the loss (in nats per token), or numbers, best first.
    """
    best: dict[str, Score] = {}
    for score in sorted((score for score in scores if score.status == "scored"), key=lambda score: score.value):
        best.setdefault(score.candidate.run or score.candidate.name, score)
    return _weighted(tuple(best.values())[:top_k], weights)


def _weighted(scores: tuple[Score, ...], weights: str | Sequence[float]) -> Selection:
    if weights == "softmax":
        values = np.array([-score.loss for score in scores], dtype=np.float64)
        shares = np.exp(values - values.max(initial=-np.inf))
        return Selection(scores, tuple((shares / shares.sum()).tolist()))
    if weights == "equal":
        return Selection(scores, (1 / max(1, len(scores)),) * len(scores))
    return Selection(scores, tuple(weights[: len(scores)]))
