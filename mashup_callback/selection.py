"""Which of the scored candidates are merged, and with which weights."""

from collections.abc import Collection, Sequence
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
        ranked (`tuple[Score, ...]`): All scores that they were selected from.
    """

    scores: tuple[Score, ...]
    weights: tuple[float, ...]
    ranked: tuple[Score, ...] = ()

    def first(self, count: int, weights: str | Sequence[float] = "equal") -> "Selection":
        """Returns the best `count` candidates of this selection, weighted anew."""
        return _weighted(self.scores[:count], weights, self.ranked)

    def weight_of(self) -> dict[tuple[str, str | None], float]:
        """Returns the weights by the key of the candidate."""
        keys = [score.candidate.key for score in self.scores]
        return dict(zip(keys, self.weights, strict=True))

    def without(
        self, names: Collection[str], top_k: int | None, weights: str | Sequence[float] = "equal"
    ) -> "Selection":
        """Returns what [`select`] gives without the candidates of these names."""
        return select([score for score in self.ranked if score.candidate.name not in names], top_k, weights)


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
    return _weighted(tuple(best.values())[:top_k], weights, tuple(scores))


def _weighted(scores: tuple[Score, ...], weights: str | Sequence[float], ranked: tuple[Score, ...]) -> Selection:
    if weights == "softmax":
        values = -np.array([score.loss for score in scores], dtype=np.float64)
        shares = np.exp(values - values.max(initial=-np.inf))
        return Selection(scores, tuple((shares / shares.sum()).tolist()), ranked)
    if weights == "equal":
        return Selection(scores, (1 / max(1, len(scores)),) * len(scores), ranked)
    return Selection(scores, tuple(map(float, weights[: len(scores)])), ranked)
