"""How good each candidate is on the target's data, measured on the Trainer's own model without touching it."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from .adapters import Adapter, AdapterError, check_adapter, read_adapter
from .candidates import Candidate
from .checkpoints import Checkpoint, is_checkpoint
from .distributed import agreed, deal, decided, exchange, is_first_on_machine, is_main_process, joint, place
from .evaluation import Metric, bare, evaluate
from .hub import Hub
from .hub_download import arriving
from .isolation import undisturbed
from .layers import Trainee, layer_shapes
from .losses import RowLosses
from .parameters import is_sharded
from .preparing import Preparation, Prepared, ahead
from .probe import probe, trained_adapter
from .racing import joined, ranking_value, rung_sizes, survivors
from .sampling import Rows, as_rows
from .trainer_loss import TrainerLoss
from .weights import admit_checkpoint


logger = logging.getLogger(__name__)


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
    metric: Metric = "loss"
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
) -> list[Score]:
    """
    Scores candidate adapters on batches of the target's data.

    The model computes what its base does, with its own adapters switched off, and a candidate is applied by forward
    hooks on the layers it targets: y + s·(x Aᵀ) Bᵀ. No module is added, no random number is drawn, and afterwards the
    model is exactly as it was. At any time the tensors of at most two candidates are in
    memory: those of the one that is scored, and of the next one, which is read meanwhile. A full checkpoint's weights
    take the place of the model's instead, see [`replaced`] for the bound on memory.

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
            When it is over, no further candidate is scored on further rows.
        hub (`Hub`, *optional*):
            The connection by which candidates are downloaded while others are scored; one of its own by default.
        admit_model (`Callable`, *optional*):
            What makes of a full checkpoint something to score, or raises an `AdapterError`; by default
            [`admit_checkpoint`].
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            What `metric="probe"` trains with; the callback passes the Trainer's.

    Returns:
        `list[Score]`: One for each candidate, the best first; those that were not scored to the end come last.
    """
    hub = hub or Hub(asks=is_first_on_machine())
    race = _Race(model, as_rows(batches), metric, max_seconds, hub)
    shapes = layer_shapes(model)
    admit_model = admit_model or partial(admit_checkpoint, model)
    trainee = trained_adapter(model) if metric == "probe" else None
    with joint(), undisturbed(model), bare(model, metric), arriving(candidates, hub) as coming:
        admitted = (_admitted(candidate, shapes, base_model, admit_model) for candidate in coming)
        scores = (replace(score, metric=metric) for score in admitted)
        scores = scores if place()[1] == 1 else _admitted_by_all([*scores])
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

    def __init__(self, model: nn.Module, rows: Rows, metric: Metric, max_seconds: float | None, hub: Hub) -> None:
        self.model, self.rows, self.metric, self.hub = model, rows, metric, hub
        self.deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        # A trainer gathers its metrics from all processes, so all of them look at the same candidate.
        self.sharded = is_sharded(model) or isinstance(metric, TrainerLoss)
        self.prepare = Preparation(model, metric, self.sharded)

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
            with ahead(scores, lambda score: self._prepared(score, part)) as coming:
                return [replace(score, **self._score(score, part, bar, ready)) for score, ready in coming]
        scores = list(scores)
        alive = [index for index, score in enumerate(scores) if score.status == "scored"]
        results = deal(lambda i: self._score(scores[i], part, bar, self._prepared(scores[i], part)), alive)
        for index, result in zip(alive, results, strict=True):
            scores[index] = replace(scores[index], **result)
        return scores

    def _prepared(self, score: Score, part: Rows) -> Prepared:
        usable = score.status == "scored" and (self.sharded or time.monotonic() <= self.deadline)
        return self.prepare(score.adapter, part) if usable else Prepared()

    def _score(self, score: Score, part: Rows, bar: tqdm, ready: Prepared) -> dict[str, Any]:
        if score.status != "scored":
            return {}
        result = self._result(score, part, ready)
        bar.update()
        return result

    def _result(self, score: Score, part: Rows, ready: Prepared) -> dict[str, Any]:
        started = time.monotonic()
        over = started > self.deadline
        if agreed(over) if self.sharded else over:
            # What was scored on fewer rows stays comparable by its mean.
            self.hub.stop("max_seconds was over")
            return {"status": "scored" if score.losses else "eliminated", "reason": "max_seconds was over"}
        try:
            with joint() if self.sharded else nullcontext():
                losses = self._losses(part, ready)
        except AdapterError as error:
            return {"status": "rejected", "reason": str(error)}
        except (RuntimeError, OSError) as error:
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        losses = joined([score.losses, losses] if score.losses else [losses])
        seconds = score.seconds + time.monotonic() - started
        if not math.isfinite(losses.mean_loss):
            return {"status": "failed", "reason": f"its loss is {losses.mean_loss}", "seconds": seconds}
        return {"losses": losses, "seconds": seconds}

    def _losses(self, part: Rows, ready: Prepared) -> RowLosses:
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


def _admitted(
    candidate: Candidate | Adapter | str | Path,
    shapes: Mapping[str, tuple],
    base_model: str | None,
    admit_model: Callable[[Candidate], Adapter | Checkpoint],
) -> Score:
    if isinstance(candidate, str | Path):
        kind = "model" if is_checkpoint(Path(candidate)) else "adapter"
        candidate = Candidate(name=str(candidate), kind=kind, path=Path(candidate), run=str(candidate))
    found = candidate.candidate if isinstance(candidate, Adapter) else candidate
    if found.reason is not None:
        return Score(found, "rejected", found.reason)
    try:
        if found.kind == "model":
            return Score(found, adapter=admit_model(found))
        adapter = candidate if isinstance(candidate, Adapter) else read_adapter(candidate)
        return Score(found, adapter=check_adapter(adapter, shapes, base_model))
    except AdapterError as error:
        return Score(found, "rejected", str(error))


def _admitted_by_all(scores: list[Score]) -> list[Score]:
    """Returns the main process's candidates, and rejects those that another process lacks or cannot read."""
    everywhere = exchange({score.candidate.name: (score.candidate.run, score.reason) for score in scores})
    here = {score.candidate.name: score for score in scores}
    if len(everywhere) == 1:
        return scores
    # Where a file system is not shared, an adapter's path and what is recorded with it are each process's own.
    found = [here.get(name) or Score(Candidate(name=name), "rejected") for name in everywhere[0]]
    return [_rejected_by_one(score, everywhere) for score in found]


def _rejected_by_one(score: Score, everywhere: Sequence[Mapping[str, tuple[str, str | None]]]) -> Score:
    name = score.candidate.name
    reasons = [found[name][1] if name in found else "it is not found there" for found in everywhere]
    refusing = [rank for rank, reason in enumerate(reasons) if reason is not None]
    score = replace(score, candidate=replace(score.candidate, run=everywhere[0][name][0]))
    if not refusing:
        return score
    where = "" if len(refusing) == len(everywhere) else f"process {refusing[0]}: "
    return replace(score, status="rejected", reason=f"{where}{reasons[refusing[0]]}")
