"""What training starts from: the merge, the best single candidate, or the fresh initialisation."""

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from accelerate.state import AcceleratorState
from torch import nn

from .config import MashupConfig
from .distributed import agreed, decided, exchange, joint, place
from .errors import AdapterError, OutOfStepError, UsageError
from .formats.adapter import Adapter, load_factors
from .formats.checkpoint import check_unchanged
from .full.trainee import FittedModel, ModelMerger
from .full.weights import described
from .lora.source import LoraUpdate
from .lora.trainee import FittedMerge, fit
from .model.isolation import undisturbed
from .model.layers import Trainee
from .model.tensors import FullTrainee
from .scoring import RowLosses, Rows, Score, evaluate, make_metric, paired_gain
from .selection import Selection


if TYPE_CHECKING:
    from .full.merge import MergedModel
    from .lora.merge import MergedAdapter

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
        merged (`MergedAdapter` or `MergedModel`): Their merge.
        fitted (`FittedMerge` or `FittedModel`): The merge in the trainee's parameters.
        losses (`RowLosses`): Its held-out losses.
    """

    selection: Selection
    merged: "MergedAdapter | MergedModel"
    fitted: FittedMerge | FittedModel
    losses: RowLosses

    @property
    def loss(self) -> float:
        """Its held-out loss."""
        return self.losses.mean_loss


@dataclass(frozen=True, eq=False)
class Verdict:
    """
    What training starts from and why.

    Args:
        decision (`str`): `"merged"`, `"single"` or `"scratch"`.
        reason (`str`): The comparison that decided.
        base (`RowLosses`): Held-out losses of the fresh initialisation.
        merge (`Start`): The merge.
        single (`Start`): The best single candidate, at the trainee's rank.
    """

    decision: str
    reason: str
    base: RowLosses
    merge: Start
    single: Start

    @property
    def base_loss(self) -> float:
        """Held-out loss of the fresh initialisation."""
        return self.base.mean_loss

    @property
    def chosen(self) -> Start | None:
        """What is written into the trainee; None for the fresh initialisation."""
        return {"merged": self.merge, "single": self.single}.get(self.decision)

    @property
    def gain(self) -> tuple[float, float]:
        """How far below the base what is chosen is, or else the best that was refused, and the standard error."""
        return paired_gain((self.chosen or min(self.merge, self.single, key=_loss)).losses, self.base)

    def can_be_checked(self, config: MashupConfig) -> bool:
        """Whether the metric gives the same number twice: a user's score may draw random numbers."""
        return make_metric(config.metric).repeatable

    def after_swap(self, model: nn.Module, held_out: Rows, config: MashupConfig) -> "AfterSwap":
        """Evaluates the model as it is trained on one held-out batch; every process must call it."""
        metric = make_metric(config.metric)
        with undisturbed(model):
            found = evaluate(model, held_out.first(*place()), metric, share=True)
        seen = found.tokens > 0
        return AfterSwap(*(_mean(losses, seen) for losses in (found, self.chosen.losses, self.base)), model)


@dataclass(frozen=True, eq=False)
class AfterSwap:
    """
    What the swap has come to, on one held-out batch.

    Args:
        loss (`float`): Loss of the model as it is trained.
        expected (`float`): What the guard found for what was written.
        fresh (`float`): What it found for the fresh initialisation.
        model (`torch.nn.Module`): The model, whose precision says what may differ.
    """

    loss: float
    expected: float
    fresh: float
    model: nn.Module

    @property
    def tolerance(self) -> float:
        """Difference that rounding explains: 1% of the loss in float32, 5% with fewer bits or autocast."""
        dtypes = {parameter.dtype for parameter in self.model.parameters()}
        exact = dtypes <= {torch.float32, torch.float64} and AcceleratorState._shared_state.get(
            "_mixed_precision"
        ) in (None, "no")
        return (0.01 if exact else 0.05) * max(1.0, abs(self.expected))

    @property
    def differs(self) -> bool:
        """Whether the model computes something else than the guard judged."""
        return not abs(self.loss - self.expected) <= self.tolerance

    @property
    def is_worse_than_fresh(self) -> bool:
        """Whether it is also clearly worse than the fresh initialisation, and than it should be."""
        return not self.loss <= max(self.expected, self.fresh) + self.tolerance


def choose(
    model: nn.Module,
    trainee: Trainee | FullTrainee,
    selection: Selection,
    held_out: Rows,
    config: MashupConfig,
    merger: ModelMerger | None = None,
) -> Verdict:
    """
    Merges the selected candidates and compares the merge with the best single one and with a fresh initialisation.

    All three are judged on the held-out rows by their loss (by the user's metric if that is a callable), in the form
    and precision in which the trainee will hold them. What is not better than the fresh initialisation by
    `guard_margin` standard errors of the paired differences over the rows counts as no better.

    Where a candidate is gone or has changed since it was scored, the next best takes its place.

    Args:
        model (`torch.nn.Module`):
            The model that is trained.
        trainee (`Trainee` or `FullTrainee`):
            Its adapter, or its weights.
        selection (`Selection`):
            The candidates to merge, the best first.
        held_out (`Rows`):
            Rows that selected nothing.
        config (`MashupConfig`):
            The settings.
        merger (`ModelMerger`, *optional*):
            What merges full models, for a `FullTrainee`.
    """
    arms = _Arms(model, trainee, held_out, config, merger)
    lost: dict[str, str] = {}
    while True:
        try:
            with joint():
                verdict = _choose(arms, selection)
            break
        except OutOfStepError:
            raise
        except Exception:
            found = exchange({score.candidate.name: reason for score in selection.scores if (reason := _gone(score))})
            lost |= {name: reason for names in found for name, reason in names.items()}
            left = selection.without(lost, None if config.top_k == "auto" else config.top_k, config.weights)
            if not any(found) or not left.scores:
                raise
            selection = left
            logger.warning("Candidates were lost after they were scored; the next best are merged: %s", lost)
    names = "; ".join(f"{name} was left out: {reason}" for name, reason in lost.items())
    return replace(verdict, reason=f"{verdict.reason}; {names}") if lost else verdict


def _gone(score: Score) -> str | None:
    """Returns why a candidate cannot be read any more as it was when it was scored."""
    try:
        found = described(score.source)
        load_factors(found) if isinstance(found, Adapter) else check_unchanged(found)
    except (AdapterError, OSError) as error:
        return str(error)
    return None


def _choose(arms: "_Arms", selection: Selection) -> Verdict:
    model, config, merger = arms.model, arms.config, arms.merger
    with undisturbed(model):
        base = evaluate(model, arms.held_out, arms.metric, share=True)
        with arms.metric.base(model):
            single = arms.start(selection.first(1), "linear", {})
            merge = arms.grow(selection) if config.top_k == "auto" else arms.best_method(selection)
    if len(merge.selection.scores) == 1:
        # A merge of one is that candidate in another form, and one form stands for both.
        single = merge = arms.better(single, merge) if config.guard else merge
    decision = agreed(_decide(base, merge, single, config))
    reason = _reason(decision, base, merge, single, config)
    if merger is not None and decision == "single":
        # Before anything is written into the model: there may be no space for it.
        single = replace(single, merged=merger.kept(single.merged))
    return Verdict(decision, reason, base, merge, single)


class _Arms:
    """The things that training could start from, made and judged the same way."""

    def __init__(
        self,
        model: nn.Module,
        trainee: Trainee | FullTrainee,
        held_out: Rows,
        config: MashupConfig,
        merger: ModelMerger | None,
    ) -> None:
        self.model, self.trainee, self.held_out, self.config = model, trainee, held_out, config
        self.merger = merger
        self.metric = make_metric(config.metric)

    def start(self, selection: Selection, method: str, parameters: dict) -> Start:
        if isinstance(self.trainee, FullTrainee):
            merged, fitted = self.merger.merge(selection, method, parameters)
            update = fitted.replacement
        else:
            merged = decided(lambda: self._merged(selection, method, parameters))
            fitted, merged = fit(merged.factors, self.trainee), merged.within(self.trainee.targets)
            update = LoraUpdate(fitted.factors)
        losses = evaluate(self.model, self.held_out, self.metric, update, share=True)
        return Start(selection, merged, fitted, losses)

    def _merged(self, selection: Selection, method: str, parameters: dict) -> "MergedAdapter":
        # Imported here so that importing the callback does not import mergekit.
        from .lora.merge import merge_factors

        return merge_factors(
            [load_factors(score.source.adapter) for score in selection.scores],
            weights=selection.weights,
            method=method,
            parameters=parameters,
            space=self.config.merge_space,
            ranks=self.trainee.ranks,
            seed=self.config.seed,
        )

    def best_method(self, selection: Selection) -> Start:
        if self.config.merge_method != "auto":
            return self.start(selection, self.config.merge_method, self.config.merge_parameters)
        best, reasons = None, []
        for method, parameters in AUTO_METHODS.items():
            try:
                with joint():
                    start = self.start(selection, method, parameters)
            except (UsageError, OutOfStepError):
                raise
            except Exception as error:
                reasons.append(f"{method}: {type(error).__name__}: {error}")
                logger.warning("merge_method='auto' goes on without a method that failed: %s", reasons[-1])
                continue
            logger.info("merge_method=%s: held-out loss %.4f", start.merged.method, start.loss)
            best = start if best is None else self.better(best, start)
        if best is None:
            raise RuntimeError(f"Every method that merge_method='auto' tries failed ({'; '.join(reasons)}).")
        return best

    def grow(self, selection: Selection) -> Start:
        """Adds the next best candidate for as long as the held-out loss falls."""
        best = None
        for count in range(1, len(selection.scores) + 1):
            start = self.best_method(selection.first(count, self.config.weights))
            if best is not None and self.better(best, start) is best:
                break
            best = start
        return best

    def better(self, first: Start, second: Start) -> Start:
        """Returns the one with the lower loss, and forgets the other: a merge of full models takes a lot of disk."""
        better, worse = (second, first) if _loss(second) < _loss(first) else (first, second)
        if self.merger is not None:
            self.merger.discard(worse.merged)
        return better


def _mean(losses: RowLosses, rows: torch.Tensor) -> float:
    return (losses.loss[rows].sum() / losses.tokens[rows].sum().clamp(min=1)).item()


def _loss(start: Start) -> float:
    # A merge whose loss is not a number is the worst of all.
    return start.loss if start.loss == start.loss else float("inf")


def _decide(base: RowLosses, merge: Start, single: Start, config: MashupConfig) -> str:
    merged = "merged" if len(merge.selection.scores) > 1 else "single"
    if not config.guard:
        return merged
    starts = ((merge, merged), (single, "single"))
    better = [(start.loss, name) for start, name in starts if _is_better(start, base, config.guard_margin)]
    return min(better, default=(base.mean_loss, "scratch"))[1]


def _is_better(start: Start, base: RowLosses, margin: float) -> bool:
    gain, error = paired_gain(start.losses, base)
    # Where no error is known, any gain counts.
    return gain > 0 and not gain <= margin * error


def _reason(decision: str, base: RowLosses, merge: Start, single: Start, config: MashupConfig) -> str:
    losses = (
        f"held-out loss {merge.loss:.4f} of the merge, {single.loss:.4f} of the best single candidate, "
        f"{base.mean_loss:.4f} of a fresh initialisation"
    )
    if not config.guard:
        return f"guard=False: the merge is used whatever its loss: {losses}"
    best = {"merged": merge, "single": single}.get(decision) or min(merge, single, key=_loss)
    gain, error = paired_gain(best.losses, base)
    measured = f"{gain:.4f} (standard error {error:.4f})"
    if decision != "scratch":
        return f"{measured} below a fresh initialisation: {losses}"
    wanted = f"by more than {config.guard_margin:g} standard errors" if config.guard_margin else "at all"
    return f"nothing is better than a fresh initialisation {wanted}, the best by {measured}: {losses}"
