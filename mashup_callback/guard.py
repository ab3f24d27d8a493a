"""What training starts from: the merge, the best single candidate, or the fresh initialisation."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from .adapters import load_factors
from .config import MashupConfig
from .isolation import undisturbed, without_adapters
from .layers import Trainee
from .sampling import Rows
from .scoring import evaluate
from .selection import Selection
from .swap import FittedMerge, fit


if TYPE_CHECKING:
    from .merging import MergedAdapter

logger = logging.getLogger(__name__)

# What merge_method="auto" tries: the mean, its two sparse relatives, and two that keep the norm of the updates.
AUTO_METHODS = {
    "linear": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "karcher": {},
    "model_stock": {},
}


@dataclass(frozen=True, eq=False)
class Start:
    """
    One thing that training could start from.

    Args:
        selection (`Selection`): The candidates in it.
        merged (`MergedAdapter`): Their merge.
        fitted (`FittedMerge`): The merge in the trainee's parameters.
        loss (`float`): Its held-out loss.
    """

    selection: Selection
    merged: "MergedAdapter"
    fitted: FittedMerge
    loss: float


@dataclass(frozen=True, eq=False)
class Verdict:
    """
    What training starts from and why.

    Args:
        decision (`str`): `"merged"`, `"single"` or `"scratch"`.
        reason (`str`): The comparison that decided.
        base_loss (`float`): Held-out loss of the fresh initialisation.
        merge (`Start`): The merge.
        single (`Start`): The best single candidate, at the trainee's rank.
    """

    decision: str
    reason: str
    base_loss: float
    merge: Start
    single: Start

    @property
    def chosen(self) -> Start | None:
        """What is written into the trainee; None for the fresh initialisation."""
        return {"merged": self.merge, "single": self.single}.get(self.decision)


def choose(model: nn.Module, trainee: Trainee, selection: Selection, held_out: Rows, config: MashupConfig) -> Verdict:
    """
    Merges the selected candidates and compares the merge with the best single one and with a fresh initialisation.

    All three are judged on the held-out rows by their loss (by the user's metric if that is a callable), in the form
    and precision in which the trainee will hold them.

    Args:
        model (`torch.nn.Module`):
            The model that is trained.
        trainee (`Trainee`):
            Its adapter.
        selection (`Selection`):
            The candidates to merge, the best first.
        held_out (`Rows`):
            Rows that selected nothing.
        config (`MashupConfig`):
            The settings.
    """
    arms = _Arms(model, trainee, held_out, config)
    with undisturbed(model):
        base_loss = evaluate(model, held_out, arms.metric).mean_loss
        with without_adapters(model):
            single = arms.start(selection.first(1), "linear", {})
            merge = arms.grow(selection) if config.top_k == "auto" else arms.best_method(selection)
    merge = single if merge.loss == single.loss and len(selection.scores) == 1 else merge
    decision = _decide(base_loss, merge, single, config.guard)
    return Verdict(decision, _reason(decision, base_loss, merge, single, config.guard), base_loss, merge, single)


class _Arms:
    """The things that training could start from, made and judged the same way."""

    def __init__(self, model: nn.Module, trainee: Trainee, held_out: Rows, config: MashupConfig) -> None:
        self.model, self.trainee, self.held_out, self.config = model, trainee, held_out, config
        self.metric = config.metric if callable(config.metric) else "loss"

    def start(self, selection: Selection, method: str, parameters: dict) -> Start:
        # Imported here so that importing the callback does not import mergekit.
        from .merging import merge_factors

        inputs = [load_factors(score.adapter) for score in selection.scores]
        merged = merge_factors(
            inputs,
            weights=selection.weights,
            method=method,
            parameters=parameters,
            space=self.config.merge_space,
            ranks=self.trainee.ranks,
            seed=self.config.seed,
        )
        fitted = fit(merged.factors, self.trainee)
        loss = evaluate(self.model, self.held_out, self.metric, fitted.factors).mean_loss
        return Start(selection, merged, fitted, loss)

    def best_method(self, selection: Selection) -> Start:
        if self.config.merge_method != "auto":
            return self.start(selection, self.config.merge_method, self.config.merge_parameters)
        starts = [self.start(selection, method, parameters) for method, parameters in AUTO_METHODS.items()]
        for start in starts:
            logger.info("merge_method=%s: held-out loss %.4f", start.merged.method, start.loss)
        return min(starts, key=_loss)

    def grow(self, selection: Selection) -> Start:
        """Adds the next best candidate for as long as the held-out loss falls."""
        best = None
        for count in range(1, len(selection.scores) + 1):
            start = self.best_method(selection.first(count, self.config.weights))
            if best is not None and not start.loss < best.loss:
                break
            best = start
        return best


def _loss(start: Start) -> float:
    # A merge whose loss is not a number is the worst of all.
    return start.loss if start.loss == start.loss else float("inf")


def _decide(base_loss: float, merge: Start, single: Start, guard: bool) -> str:
    merged = "merged" if len(merge.selection.scores) > 1 else "single"
    if not guard:
        return merged
    best = min((_loss(merge), 0, merged), (_loss(single), 1, "single"))
    return best[2] if best[0] < base_loss else "scratch"


def _reason(decision: str, base_loss: float, merge: Start, single: Start, guard: bool) -> str:
    if not guard:
        return f"guard=False: the merge is used whatever its held-out loss ({merge.loss:.4f}, fresh {base_loss:.4f})"
    losses = (
        f"held-out loss {merge.loss:.4f} of the merge, {single.loss:.4f} of the best single candidate, "
        f"{base_loss:.4f} of a fresh initialisation"
    )
    if decision == "scratch":
        return f"nothing is better than a fresh initialisation: {losses}"
    chosen = merge if decision == "merged" else single
    return f"{base_loss - chosen.loss:.4f} below a fresh initialisation: {losses}"
