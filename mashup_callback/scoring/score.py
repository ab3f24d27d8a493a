"""What scoring found out about a candidate."""

import math
from dataclasses import dataclass

from ..candidates import Candidate
from ..trainee import Source
from .losses import RowLosses
from .metrics import LOSS, Metric


@dataclass(frozen=True, eq=False)
class Score:
    """
    What scoring found out about one candidate.

    Args:
        candidate (`Candidate`): The candidate.
        status (`str`): `"scored"`, `"eliminated"` in an early round, `"rejected"` as unfit or `"failed"` while scored.
        reason (`str`, *optional*): Why it was not scored to the end.
        losses (`RowLosses`, *optional*): Its losses on the rows it was scored on.
        seconds (`float`): Time spent on it.
        source (`Source`, *optional*): The candidate as it fits the model.
        warnings (`tuple[str, ...]`): What is odd about it.
        metric (`Metric`): What it is ranked by.
    """

    candidate: Candidate
    status: str = "scored"
    reason: str | None = None
    losses: RowLosses | None = None
    seconds: float = 0.0
    source: Source | None = None
    warnings: tuple[str, ...] = ()
    metric: Metric = LOSS

    @property
    def loss(self) -> float | None:
        """Loss per label token in nats, or what a callable metric returned; None if never scored."""
        return None if self.losses is None else self.losses.mean_loss

    @property
    def value(self) -> float:
        """What candidates are ranked by; lower is better, and infinite if never scored."""
        return math.inf if self.losses is None else self.losses.mean(self.metric.compared(self.losses))

    @property
    def rows(self) -> int:
        """Rows it was scored on."""
        return 0 if self.losses is None else len(self.losses.loss)

    @property
    def tokens(self) -> int:
        """Label tokens it was scored on."""
        return 0 if self.losses is None else int(self.losses.tokens.sum())
