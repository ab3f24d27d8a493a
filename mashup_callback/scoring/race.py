"""How good each candidate is on the target's data, measured on the Trainer's own model without touching it."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..candidates import Candidate, Hub, arriving
from ..distributed import agreed, deal, decided, is_first_on_machine, is_main_process, joint, place
from ..errors import AdapterError, BypassedError
from ..formats.adapter import Adapter
from ..formats.checkpoint import Checkpoint
from ..full.weights import admit_checkpoint
from ..model.isolation import undisturbed
from ..model.layers import Trainee, layer_shapes
from ..model.parameters import is_sharded
from .evaluation import Metric, bare, evaluate
from .halving import Score, joined, rung_sizes, survivors
from .losses import RowLosses
from .metrics import TrainerLoss
from .preparing import Preparation, Prepared, PreparedGroup, admitted, admitted_by_all, ahead
from .probe import probe, trained_adapter
from .sample import Rows, as_rows
from .tiling import Tiling, evaluate_together


logger = logging.getLogger(__name__)


def score_candidates(
    model: nn.Module,
    candidates: Sequence[Candidate | Adapter | str | Path],
    batches: Rows | Sequence[Mapping[str, Any]],
    metric: Metric = "loss",
    *,
    search: str = "exhaustive",
    keep: int = 1,
    base_model: str | None = None,
    max_seconds: float | None = None,
    hub: Hub | None = None,
    admit_model: Callable[[Candidate], Adapter | Checkpoint] | None = None,
    learning_rate: float = 1e-4,
    fingerprint: str | None = None,
) -> list[Score]:
    """
    Scores candidate adapters on batches of the target's data.

    The model computes what its base does, with its own adapters switched off, and a candidate is applied by forward
    hooks on the layers it targets: y + s·(x Aᵀ) Bᵀ. No module is added, no random number is drawn, and afterwards the
    model is exactly as it was. Where batches are so small that the device would be idle, up to 16 candidates share a
    forward pass, each on its own copy of the batch, see [`Tiling`]; a candidate's losses do not depend on the others.

    At any time the tensors of at most two such groups are in memory, those of the one that is scored and of the next
    one, which is read meanwhile, and of one more candidate. A group is one candidate, or several whose factors in
    float32 take at most 256 MiB (or a sixteenth of the model, if that is more). The activations are those of the
    batch, or of at most 1,024 tokens on a CPU and 8,192 on an accelerator, halved when memory runs out. A full
    checkpoint's weights take the place of the model's instead, see [`replaced`] for the bound on memory.

    In a distributed run every process calls it with the same candidates and batches, and gets the same scores. Where
    each process holds the whole model, the candidates are dealt out; where the model is sharded, the rows are.

    Args:
        model (`torch.nn.Module`):
            The model that is trained, or a bare model.
        candidates (`Sequence` of `Candidate`, `Adapter` or paths):
            What to score.
        batches (`Rows` or `Sequence` of mappings):
            Batches as the model takes them, with labels.
        metric (`str` or `Callable`, *optional*, defaults to `"loss"`):
            `"loss"`: negative log-likelihood in nats per label token; `"token_accuracy"`: share of the label tokens
            predicted; `"probe"`: the best by loss are ranked by their loss after a few steps of training, see
            [`probe`]; or a callable that is given the model with the candidate applied and a batch, and returns a loss
            summed over the batch and what to divide it by.
        search (`str`, *optional*, defaults to `"exhaustive"`):
            `"exhaustive"`: every candidate sees every row; `"racing"`: successive halving, see [`survivors`].
        keep (`int`, *optional*, defaults to `1`):
            Training runs that racing must leave.
        base_model (`str`, *optional*):
            Name of the base model, to warn about adapters that record another one.
        max_seconds (`float`, *optional*):
            When it is over, no further candidate, or group of them, is scored on further rows.
        hub (`Hub`, *optional*):
            The connection by which candidates are downloaded while others are scored; one of its own by default.
        admit_model (`Callable`, *optional*):
            What makes of a full checkpoint something to score, or raises an `AdapterError`; by default
            [`admit_checkpoint`].
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            What `metric="probe"` trains with; the callback passes the Trainer's.
        fingerprint (`str`, *optional*):
            The model's, from [`shared_fingerprint`], where it is known already.

    Returns:
        `list[Score]`: One for each candidate, the best first; those that were not scored to the end come last.
    """
    hub = hub or Hub(asks=is_first_on_machine())
    race = _Race(model, as_rows(batches), metric, max_seconds, hub, fingerprint)
    shapes = layer_shapes(model)
    admit_model = admit_model or partial(admit_checkpoint, model)
    trainee = trained_adapter(model) if metric == "probe" else None
    with joint(), undisturbed(model), bare(model, metric), arriving(candidates, hub) as coming:
        admissions = (admitted(candidate, shapes, base_model, admit_model) for candidate in coming)
        scores = (replace(score, metric=metric) for score in admissions)
        scores = scores if place()[1] == 1 else admitted_by_all([*scores])
        scores = race.run(scores, rung_sizes(len(race.rows), search), keep, len(candidates))
        if metric == "probe":
            scores = _probed(race, scores, keep, trainee, learning_rate)
    order = {"scored": 0, "eliminated": 1}
    return sorted(scores, key=lambda score: (order.get(score.status, 2), -score.rows, score.value))


def _probed(
    race: "_Race", scores: list[Score], keep: int, trainee: Trainee | None, learning_rate: float
) -> list[Score]:
    if race.sharded:
        logger.warning('metric="probe" needs the whole model on each process; on this sharded one the loss ranks.')
        return scores
    settings = {"trainee": trainee, "learning_rate": learning_rate, "deadline": race.deadline}
    return probe(race.model, scores, race.rows, keep, **settings)


class _Race:
    """The candidates' way through the rungs, one after the other on ever more rows."""

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        metric: Metric,
        max_seconds: float | None,
        hub: Hub,
        fingerprint: str | None = None,
    ) -> None:
        self.model, self.rows, self.metric, self.hub = model, rows, metric, hub
        self.deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        # A trainer gathers its metrics from all processes, so all of them look at the same candidate.
        self.sharded = is_sharded(model) or isinstance(metric, TrainerLoss)
        self.prepare = Preparation(model, metric, fingerprint)
        self.tiling = Tiling(model, enabled=not self.sharded and not callable(metric))

    def run(self, scores: Iterable[Score], sizes: list[int], keep: int, count: int) -> list[Score]:
        start = 0
        for size in sizes:
            part = self.rows.part(start, size) if len(sizes) > 1 else self.rows
            self.prepare.sample(part)
            with tqdm(total=count, desc=f"mashup: {size} rows", disable=not is_main_process()) as bar:
                scores = self._score_all(scores, part, bar)
            if size != sizes[-1]:
                scores = self._cut(scores, size, keep)
            start, count = size, sum(score.status == "scored" for score in scores)
        return scores

    def _score_all(self, scores: Iterable[Score], part: Rows, bar: tqdm) -> list[Score]:
        # In a single process they are scored as they arrive from the Hub.
        if self.sharded or place()[1] == 1:
            return self._scored(scores, part, bar)
        scores = list(scores)
        alive = [index for index, score in enumerate(scores) if score.status == "scored"]
        shares = [alive[rank :: place()[1]] for rank in range(place()[1])]
        results = deal(lambda mine: [_outcome(s) for s in self._scored([scores[i] for i in mine], part, bar)], shares)
        for mine, outcomes in zip(shares, results, strict=True):
            for index, outcome in zip(mine, outcomes, strict=True):
                scores[index] = replace(scores[index], **outcome)
        return scores

    def _scored(self, scores: Iterable[Score], part: Rows, bar: tqdm) -> list[Score]:
        groups = self.tiling.groups(scores, part)
        with ahead(groups, lambda group: self._prepared(group, part)) as coming:
            return [score for group, ready in coming for score in self._score_group(group, part, bar, ready)]

    def _prepared(self, group: list[Score], part: Rows) -> PreparedGroup:
        in_time = self.sharded or time.monotonic() <= self.deadline
        sources = [score.adapter if in_time and score.status == "scored" else None for score in group]
        return self.prepare(sources, part)

    def _score_group(self, group: list[Score], part: Rows, bar: tqdm, ready: PreparedGroup) -> list[Score]:
        members = self._together(part, ready) if ready.stacked else ready.members
        return [
            replace(score, **self._score(score, part, bar, member))
            for score, member in zip(group, members, strict=True)
        ]

    def _together(self, part: Rows, ready: PreparedGroup) -> list[Prepared]:
        """Returns the members of a group with their losses from forward passes that they share."""
        if time.monotonic() > self.deadline:
            return ready.members
        started = time.monotonic()
        try:
            losses = evaluate_together(self.model, part, ready.stacked, self.tiling)
        except BypassedError:
            raise
        except Exception as error:
            # Whose fault it is shows when each is scored alone.
            logger.info("Candidates share no forward pass: %s: %s", type(error).__name__, error)
            self.tiling.stop()
            return ready.members
        return self.prepare.keep_all(ready, losses, (time.monotonic() - started) / len(losses))

    def _score(self, score: Score, part: Rows, bar: tqdm, ready: Prepared) -> dict[str, Any]:
        if score.status != "scored":
            return {}
        result = self._result(score, part, ready)
        bar.update()
        return result

    def _result(self, score: Score, part: Rows, ready: Prepared) -> dict[str, Any]:
        started = time.monotonic()
        if self.sharded:
            # All processes join a forward pass, or none does.
            ready = replace(ready, losses=agreed(ready.losses))
        over = ready.losses is None and started > self.deadline
        if agreed(over) if self.sharded else over:
            # What was scored on fewer rows stays comparable by its mean.
            self.hub.stop("max_seconds was over")
            return {"status": "scored" if score.losses else "eliminated", "reason": "max_seconds was over"}
        try:
            with joint() if self.sharded else nullcontext():
                losses = self._losses(score, part, ready)
        except AdapterError as error:
            return {"status": "rejected", "reason": str(error)}
        except (RuntimeError, OSError) as error:
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        losses = joined([score.losses, losses] if score.losses else [losses])
        seconds = score.seconds + ready.seconds + time.monotonic() - started
        if not math.isfinite(losses.mean_loss):
            return {"status": "failed", "reason": f"its loss is {losses.mean_loss}", "seconds": seconds}
        return {"losses": losses, "seconds": seconds}

    def _losses(self, score: Score, part: Rows, ready: Prepared) -> RowLosses:
        if ready.losses is None and ready.update is None and ready.error is None:
            # The forward pass that it shared failed, or another process does not know its losses.
            ready = self.prepare.alone(score.adapter, part)
        if ready.error is not None:
            raise ready.error
        if ready.losses is not None:
            return ready.losses
        losses = evaluate(self.model, part, self.metric, ready.update, share=self.sharded)
        self.prepare.keep(ready, losses)
        return losses

    def _cut(self, scores: list[Score], size: int, keep: int) -> list[Score]:
        values = {index: score.losses for index, score in enumerate(scores) if score.status == "scored"}
        if len({len(losses.loss) for losses in values.values()}) > 1:
            # Time was over within this rung: there are no rows that all have seen.
            return scores
        runs = {index: scores[index].candidate.run for index in values}
        stay = set(decided(lambda: survivors(values, runs, keep, self.metric)))
        reason = f"behind after {size} rows"
        out = [index for index in values if index not in stay]
        return [
            replace(score, status="eliminated", reason=reason) if index in out else score
            for index, score in enumerate(scores)
        ]


def _outcome(score: Score) -> dict[str, Any]:
    """Returns what scoring changes in a score; the rest stays each process's own."""
    return {name: getattr(score, name) for name in ("status", "reason", "losses", "seconds")}
