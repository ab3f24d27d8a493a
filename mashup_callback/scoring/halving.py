"""What is known of a candidate, and successive halving: which candidates are worth more rows."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..candidates.candidate import Candidate
from ..formats.adapter import Adapter
from ..formats.checkpoint import Checkpoint
from ..report import Rung
from .losses import RowLosses, sum_error


FIRST_RUNG = 16
# Of many candidates a third goes on; so few go on anyway, unless the sample already tells them apart.
REDUCTION, FEW = 3, 10
# A candidate counts as worse when its paired difference exceeds so many of its standard errors.
CERTAIN = 2.0


@dataclass(frozen=True, eq=False)
class Score:
    """
    What scoring found out about one candidate.

    Args:
        candidate (`Candidate`): The candidate.
        status (`str`): `"scored"`, `"eliminated"` in an early rung, `"rejected"` as unfit or `"failed"` while scored.
        reason (`str`, *optional*): Why it was not scored to the end.
        losses (`RowLosses`, *optional*): Its losses on the rows it was scored on.
        seconds (`float`): Time spent on it.
        adapter (`Adapter` or `Checkpoint`, *optional*): Its adapter or full checkpoint, with names as in the model.
        metric (`str` or `Callable`): What it is ranked by.
        probe_loss (`float`, *optional*): Loss per label token after a few steps of training, see [`probe`].
    """

    candidate: Candidate
    status: str = "scored"
    reason: str | None = None
    losses: RowLosses | None = None
    seconds: float = 0.0
    adapter: Adapter | Checkpoint | None = None
    metric: str | Callable = "loss"
    probe_loss: float | None = None

    @property
    def loss(self) -> float | None:
        """Loss per label token in nats, or what a callable metric returned; None if never scored."""
        return None if self.losses is None else self.losses.mean_loss

    @property
    def value(self) -> float:
        """What candidates are ranked by; lower is better, and infinite if never scored."""
        if self.probe_loss is not None:
            return self.probe_loss
        return math.inf if self.losses is None else ranking_value(self.losses, self.metric)

    @property
    def rows(self) -> int:
        """Rows it was scored on."""
        return 0 if self.losses is None else len(self.losses.loss)

    @property
    def tokens(self) -> int:
        """Label tokens it was scored on."""
        return 0 if self.losses is None else int(self.losses.tokens.sum())


def rung_sizes(rows: int, search: str) -> list[int]:
    """
    Returns the nested sample sizes at which candidates are compared; the last one is all `rows`.

    Args:
        rows (`int`):
            Selection rows.
        search (`str`):
            `"exhaustive"` has one rung, `"racing"` starts with 16 rows and doubles.
    """
    sizes = [rows]
    while search == "racing" and sizes[0] >= 2 * FIRST_RUNG:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def rungs(scores: Iterable[Score]) -> tuple[Rung, ...]:
    """Returns the rungs of the race that gave these scores, the first one first."""
    raced = [score for score in scores if score.rows]
    sizes = sorted({score.rows for score in raced})
    if len(sizes) > 1:
        # Where all went on, nobody's rows tell of the rung.
        sizes = sorted({*sizes, *rung_sizes(sizes[-1], "racing")})
    entered = {size: [score for score in raced if score.rows >= size] for size in sizes}
    return tuple(
        Rung(size, len(among), sum(score.rows > size or score.status == "scored" for score in among))
        for size, among in entered.items()
    )


def survivors(values: Mapping[Any, RowLosses], runs: Mapping[Any, str], keep: int, metric: Any) -> list[Any]:
    """
    Returns the keys of the candidates that go on: the best of `keep` different runs, and those that the sample cannot
    tell from the last of these.

    Every candidate has seen the same rows, so two are told apart by their paired difference, row by row: one is worse
    where it exceeds two standard errors. Of many candidates that cannot be told apart, the best third goes on.
    At least `keep` runs go on, and successive halving (Jamieson and Talwalkar, arXiv 1502.07943) with the factor 3
    bounds the cost: 64 candidates that all tie take 29% of the forward passes of an exhaustive search on 128 rows.

    Args:
        values (`Mapping`):
            Losses of each candidate on the same rows.
        runs (`Mapping`):
            The training run of each candidate; one run enters a merge once.
        keep (`int`):
            Runs that must remain.
        metric (`str` or `Callable`):
            What ranks the candidates.
    """
    order = sorted(values, key=lambda key: ranking_value(values[key], metric))
    seen: dict[str, int] = {}
    for place, key in enumerate(order):
        seen.setdefault(runs[key], place)
    needed = sorted(seen.values())[:keep]
    if not needed:
        return []
    bar, limit = needed[-1], max(FEW, math.ceil(len(order) / REDUCTION))
    near = [place for place, key in enumerate(order) if not _worse(values[key], values[order[bar]], metric)]
    return [order[place] for place in sorted({*needed, *near[:limit]})]


def ranking_value(losses: RowLosses, metric: Any) -> float:
    """Returns what candidates are ranked by, lower is better: the loss, or minus the token accuracy."""
    return -losses.accuracy if metric == "token_accuracy" else losses.mean_loss


def _worse(losses: RowLosses, other: RowLosses, metric: Any) -> bool:
    sums = (-losses.correct, -other.correct) if metric == "token_accuracy" else (losses.loss, other.loss)
    difference = sums[0] - sums[1]
    if len(difference) < 2:
        return bool(difference.sum() > 0)
    return bool(difference.sum() > CERTAIN * sum_error(difference))


def joined(parts: Sequence[RowLosses]) -> RowLosses:
    """Returns the losses on several parts of a sample as one."""
    return RowLosses(*(torch.cat([getattr(part, name) for part in parts]) for name in ("loss", "correct", "tokens")))
