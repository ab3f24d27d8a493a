"""What training starts from: a merge, the best single candidate or the fresh initialization, judged the same way."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .config import MashupConfig
from .distributed import failing_together, from_main_process, gather
from .errors import AdapterError, OutOfStepError, UsageError
from .model import undisturbed
from .report import MergeInfo
from .scoring import Metric, RowLosses, SampleRows, Score, evaluate, joined, paired_gain
from .selection import Selection, select
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
    """Something that training could start from: an update as the trainee will hold it, and its held-out losses."""

    selection: Selection
    update: Update
    info: MergeInfo
    losses: RowLosses

    @property
    def loss(self) -> float:
        """Its held-out loss; a loss that is not a number is the worst of all."""
        loss = self.losses.mean_loss
        return loss if loss == loss else float("inf")


@dataclass(frozen=True, eq=False)
class Decision:
    """What training starts from, `"merged"`, `"single"` or `"scratch"`, and what it was compared with."""

    name: str
    reason: str
    fresh: RowLosses
    merge: Init
    single: Init

    @property
    def init(self) -> Init | None:
        """What is written into the trainee; None for the fresh initialization."""
        return {"merged": self.merge, "single": self.single}.get(self.name)

    @property
    def gain(self) -> tuple[float, float]:
        """How far below the fresh loss what is chosen is, or the best that was refused, and the standard error."""
        return paired_gain((self.init or _best(self.merge, self.single)).losses, self.fresh)


def choose(
    model: nn.Module,
    trainee: Trainee,
    selection: Selection,
    held_out: Sequence[SampleRows],
    metric: Metric,
    config: MashupConfig,
) -> Decision:
    """
    Merges the selected candidates and compares the merge with the best single one and with a fresh initialization.

    All three are judged on the held-out rows by their loss (by the user's metric if that is a callable), in the form
    and precision in which the trainee will hold them. What is not better than the fresh initialization by
    `guard_margin` standard errors of the paired differences over the rows counts as no better. Where the best one is
    not worse by so much either, the next part of the held-out rows is added.

    Where a candidate is gone or has changed since it was scored, the next best takes its place.
    """
    builder = _Builder(model, trainee, metric, held_out, config)
    lost: dict[str, str] = {}
    while True:
        try:
            with failing_together():
                decision = builder.decide(selection)
            break
        except OutOfStepError:
            raise
        except Exception:
            found = gather({score.candidate.name: reason for score in selection.scores if (reason := _gone(score))})
            lost |= {name: reason for names in found for name, reason in names.items()}
            here = [score for score in selection.ranked if score.candidate.name not in lost]
            left = select(here, config.top_k, config.weights)
            if not any(found) or not left.scores:
                raise
            selection = left
            logger.warning("Candidates were lost after they were scored; the next best are merged: %s", lost)
    names = "; ".join(f"{name} was left out: {reason}" for name, reason in lost.items())
    return replace(decision, reason=f"{decision.reason}; {names}") if lost else decision


def _gone(score: Score) -> str | None:
    """Returns why a candidate cannot be read any more as it was when it was scored."""
    try:
        if score.source is not None:
            score.source.load()
    except (AdapterError, OSError) as error:
        return str(error)
    return None


@dataclass(frozen=True)
class _Builder:
    """Merges selected candidates in the form that the trainee can hold, and evaluates the merges on held-out rows."""

    model: nn.Module
    trainee: Trainee
    metric: Metric
    held_out: Sequence[SampleRows]
    config: MashupConfig

    def decide(self, selection: Selection) -> Decision:
        """Judges the fresh initialization, the best single candidate and the merge."""
        config = self.config
        with undisturbed(self.model):
            fresh = self.losses(self.held_out[0])
            with self.metric.base(self.model):
                single = self.build(selection.first(1), "linear", {})
                merge = self.grow(selection) if config.top_k == "auto" else self.best_method(selection)
            if len(merge.selection.scores) == 1:
                # A merge of one is that candidate in another form, and one form stands for both.
                single = merge = self.better(single, merge) if config.guard else merge
            for rows in self.held_out[1:]:
                if not from_main_process(_is_undecided(fresh, merge, single, config)):
                    break
                fresh = joined([fresh, self.losses(rows)])
                with self.metric.base(self.model):
                    again = self.again(merge, rows)
                    single, merge = again if single is merge else self.again(single, rows), again
        name = from_main_process(_decide(fresh, merge, single, config))
        if name == "single":
            # Before anything is written into the model: there may be no space for the copy.
            single = replace(single, update=self.trainee.keep(single.update))
        return Decision(name, _reason(name, fresh, merge, single, config), fresh, merge, single)

    def build(self, selection: Selection, method: str, parameters: Mapping[str, Any]) -> Init:
        """Merges a selection by one method."""
        sources = [score.source for score in selection.scores if score.source is not None]
        update, info = self.trainee.merge(sources, selection.weights, method, parameters)
        return Init(selection, update, info, self.losses(self.held_out[0], update))

    def again(self, init: Init, rows: SampleRows) -> Init:
        """Returns an initialization with its losses on more rows."""
        return replace(init, losses=joined([init.losses, self.losses(rows, init.update)]))

    def losses(self, rows: SampleRows, update: Update | None = None) -> RowLosses:
        """Returns the losses of an update, or of the fresh initialization, which all processes compute together."""
        return evaluate(self.model, rows, self.metric, update, share=True)

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


def _best(merge: Init, single: Init) -> Init:
    return min(merge, single, key=lambda init: init.loss)


def _decide(fresh: RowLosses, merge: Init, single: Init, config: MashupConfig) -> str:
    merged = "merged" if len(merge.selection.scores) > 1 else "single"
    if not config.guard:
        return merged
    inits = ((merge, merged), (single, "single"))
    better = [(init.loss, name) for init, name in inits if _is_better(init, fresh, config.guard_margin)]
    return min(better, default=(0.0, "scratch"))[1]


def _is_undecided(fresh: RowLosses, merge: Init, single: Init, config: MashupConfig) -> bool:
    gain, error = paired_gain(_best(merge, single).losses, fresh)
    return config.guard and -config.guard_margin * error < gain <= config.guard_margin * error


def _is_better(init: Init, fresh: RowLosses, margin: float) -> bool:
    gain, error = paired_gain(init.losses, fresh)
    # Where no error is known, any gain counts.
    return gain > 0 and not gain <= margin * error


def _reason(name: str, fresh: RowLosses, merge: Init, single: Init, config: MashupConfig) -> str:
    losses = (
        f"held-out loss {merge.loss:.4f} of the merge, {single.loss:.4f} of the best single candidate, "
        f"{fresh.mean_loss:.4f} of a fresh initialization"
    )
    if not config.guard:
        return f"guard=False: the merge is used whatever its loss: {losses}"
    best = {"merged": merge, "single": single}.get(name) or _best(merge, single)
    gain, error = paired_gain(best.losses, fresh)
    measured = f"{gain:.4f} (standard error {error:.4f})"
    if name != "scratch":
        return f"{measured} below a fresh initialization: {losses}"
    wanted = f"by more than {config.guard_margin:g} standard errors" if config.guard_margin else "at all"
    return f"nothing is better than a fresh initialization {wanted}, the best by {measured}: {losses}"
