"""Which of the scored candidates are merged, and with which weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scoring import Score


@dataclass(frozen=True, eq=False)
class Selection:
    """The candidates to merge, the best first, at most one of a run, with their weights; and all that were scored."""

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


def select(scores: Sequence[Score], top_k: int | str, weights: str | Sequence[float] = "equal") -> Selection:
    """Selects the best `top_k` candidates, or with "auto" all, at most one checkpoint of a training run."""
    best: dict[str, Score] = {}
    for score in sorted((score for score in scores if score.status == "scored"), key=lambda score: score.value):
        best.setdefault(score.candidate.run or score.candidate.name, score)
    return _weighted(tuple(best.values())[: None if top_k == "auto" else int(top_k)], weights, tuple(scores))


def _weighted(scores: tuple[Score, ...], weights: str | Sequence[float], ranked: tuple[Score, ...]) -> Selection:
    if weights == "softmax":
        values = -np.array([score.loss for score in scores], dtype=np.float64)
        shares = np.exp(values - values.max(initial=-np.inf))
        return Selection(scores, tuple((shares / shares.sum()).tolist()), ranked)
    if weights == "equal":
        return Selection(scores, (1 / max(1, len(scores)),) * len(scores), ranked)
    return Selection(scores, tuple(map(float, weights[: len(scores)])), ranked)
