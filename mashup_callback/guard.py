"""What training starts from: the merge, the best single candidate, or the fresh initialization."""

import logging
from dataclasses import dataclass, replace

from torch import nn

from .config import MashupConfig
from .distributed import failing_together, from_main_process, gather
from .errors import AdapterError, OutOfStepError
from .initialization import Init, InitBuilder
from .model import undisturbed
from .scoring import Metric, RowLosses, SampleRows, Score, paired_gain
from .selection import Selection
from .trainee import Trainee


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Decision:
    """
    What training starts from and why.

    Args:
        name (`str`): `"merged"`, `"single"` or `"scratch"`.
        reason (`str`): The comparison that decided.
        fresh (`RowLosses`): Held-out losses of the fresh initialization.
        merge (`Init`): The merge.
        single (`Init`): The best single candidate.
    """

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
    held_out: SampleRows,
    metric: Metric,
    config: MashupConfig,
) -> Decision:
    """
    Merges the selected candidates and compares the merge with the best single one and with a fresh initialization.

    All three are judged on the held-out rows by their loss (by the user's metric if that is a callable), in the form
    and precision in which the trainee will hold them. What is not better than the fresh initialization by
    `guard_margin` standard errors of the paired differences over the rows counts as no better.

    Where a candidate is gone or has changed since it was scored, the next best takes its place.
    """
    builder = InitBuilder(model, trainee, metric, held_out, config)
    lost: dict[str, str] = {}
    while True:
        try:
            with failing_together():
                decision = _choose(builder, selection)
            break
        except OutOfStepError:
            raise
        except Exception:
            found = gather({score.candidate.name: reason for score in selection.scores if (reason := _gone(score))})
            lost |= {name: reason for names in found for name, reason in names.items()}
            left = selection.without(lost, None if config.top_k == "auto" else config.top_k, config.weights)
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


def _choose(builder: InitBuilder, selection: Selection) -> Decision:
    config = builder.config
    with undisturbed(builder.model):
        fresh = builder.fresh()
        with builder.metric.base(builder.model):
            single = builder.build(selection.first(1), "linear", {})
            merge = builder.grow(selection) if config.top_k == "auto" else builder.best_method(selection)
    if len(merge.selection.scores) == 1:
        # A merge of one is that candidate in another form, and one form stands for both.
        single = merge = builder.better(single, merge) if config.guard else merge
    name = from_main_process(_decide(fresh, merge, single, config))
    if name == "single":
        # Before anything is written into the model: there may be no space for the copy.
        single = replace(single, update=builder.trainee.keep(single.update))
    return Decision(name, _reason(name, fresh, merge, single, config), fresh, merge, single)


def _best(merge: Init, single: Init) -> Init:
    return min(merge, single, key=lambda init: init.loss)


def _decide(fresh: RowLosses, merge: Init, single: Init, config: MashupConfig) -> str:
    merged = "merged" if len(merge.selection.scores) > 1 else "single"
    if not config.guard:
        return merged
    inits = ((merge, merged), (single, "single"))
    better = [(init.loss, name) for init, name in inits if _is_better(init, fresh, config.guard_margin)]
    return min(better, default=(0.0, "scratch"))[1]


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
