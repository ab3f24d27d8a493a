"""Scores candidates on the live model: download, admit, then rounds of ever more rows with a cut after each."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..candidates import Candidate, Hub, arriving, as_candidate
from ..distributed import (
    failing_together,
    from_main_process,
    gather,
    is_first_on_machine,
    on_main_process,
    process_index_and_count,
)
from ..errors import AdapterError
from ..lora import structure_kept
from ..model import is_sharded, undisturbed
from ..progress import stage
from ..trainee import Source, Update, admit_to
from .cache import ScoreCache, base_fingerprint, score_key
from .evaluation import evaluate
from .halving import round_sizes, survivors
from .losses import RowLosses, joined
from .metrics import Metric, make_metric
from .sample import SampleRows, as_rows
from .score import Score


logger = logging.getLogger(__name__)

# What fails with one candidate and must not stop the others.
RECOVERABLE = (AdapterError, OSError, RuntimeError)


def score_candidates(
    model: nn.Module,
    candidates: Sequence[Candidate | str | Path],
    batches: SampleRows | Sequence[Mapping[str, Any]],
    metric: str | Callable | Metric = "loss",
    *,
    search: str = "exhaustive",
    keep: int = 1,
    base_model: str | None = None,
    max_seconds: float | None = None,
    hub: Hub | None = None,
    admit: Callable[[Candidate], Source] | None = None,
) -> list[Score]:
    """
    Scores candidates on batches of the target's data.

    The model computes what its base does, with its own adapters switched off. An adapter is applied by forward hooks
    on the layers it targets: y + s·(x Aᵀ) Bᵀ; a full checkpoint's weights take the place of the model's. No module is
    added, no random number is drawn, and afterwards the model is exactly as it was.

    On an accelerator there are at most two candidates at a time: the one that is scored, and the next one, which is
    read meanwhile. What was read of adapters stays in the memory of the CPU, up to [`KEPT_BYTES`].

    In a distributed run every process calls it with the same candidates and batches, and gets the same scores. Where
    each process holds the whole model, the candidates are split; where the model is sharded, the rows are.

    Args:
        model (`torch.nn.Module`):
            The model that is trained, or a bare model.
        candidates (`Sequence` of `Candidate` or paths):
            What to score.
        batches (`SampleRows` or `Sequence` of mappings):
            Batches as the model takes them, with labels.
        metric (`str`, `Callable` or `Metric`, *optional*, defaults to `"loss"`):
            `"loss"`: negative log-likelihood in nats per label token; `"token_accuracy"`: share of the label tokens
            predicted; or a callable that is given the model with the candidate applied and a batch, and returns a loss
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
        admit (`Callable[[Candidate], Source]`, *optional*):
            What makes of a candidate on disk something to score, or raises an `AdapterError`; by default
            [`admit_to`].

    Returns:
        `list[Score]`: One for each candidate, the best first; those that were not scored to the end come last.
    """
    found = [as_candidate(candidate) for candidate in candidates]
    hub, rows = hub or Hub(asks=is_first_on_machine()), as_rows(batches)
    metric, admit = make_metric(metric), admit or admit_to(model, base_model)
    with (
        failing_together(),
        undisturbed(model),
        metric.base(model),
        structure_kept(model),
        ThreadPoolExecutor(1, thread_name_prefix="mashup-read") as reader,
        arriving(found, hub) as coming,
    ):
        race = _Race(model, metric, max_seconds, hub, reader)
        scores: Iterable[Score] = (_admitted(candidate, admit, metric) for candidate in coming)
        if process_index_and_count()[1] > 1:
            scores = _on_all_processes([*scores])
        elif all(candidate.path is not None for candidate in found):
            scores = [*scores]
        seen = 0
        for size in round_sizes(len(rows), search):
            part = rows.part(seen, size) if size - seen < len(rows) else rows
            scores = race.round(scores, part)
            scores = race.cut(scores, size, keep) if size < len(rows) else scores
            seen = size
        scores = _told_apart([*scores])
    order = {"scored": 0, "eliminated": 1}
    return sorted(scores, key=lambda score: (order.get(score.status, 2), -score.rows, score.value))


def _admitted(candidate: Candidate, admit: Callable[[Candidate], Source], metric: Metric) -> Score:
    # What a full checkpoint changes may be extracted, which all processes do together or none does.
    together = candidate.kind == "model"
    reasons = gather(candidate.reason) if together else [candidate.reason]
    refusing = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
    if refusing is not None:
        reason = candidate.reason or f"process {refusing}: {reasons[refusing]}"
        return Score(candidate, "rejected", reason, metric=metric)
    try:
        with failing_together() if together else nullcontext():
            source = admit(candidate)
    except AdapterError as error:
        return Score(candidate, "rejected", str(error), metric=metric)
    return Score(candidate, source=source, warnings=source.warnings, metric=metric)


def _told_apart(scores: list[Score]) -> list[Score]:
    """Returns the scores, with a warning where no candidate changed any loss in another way than the others."""
    seen = [score.losses.loss for score in scores if score.losses is not None]
    rows = min(map(len, seen), default=0)
    if len(seen) < 2 or any(not torch.equal(losses[:rows], seen[0][:rows]) for losses in seen):
        return scores
    warning = (
        f"all {len(seen)} candidates have the same loss on every row: they are copies of one, or change nothing that "
        "the model computes on these rows"
    )
    return [replace(score, warnings=(*score.warnings, warning)) if score.losses else score for score in scores]


def _on_all_processes(scores: list[Score]) -> list[Score]:
    """Returns the main process's candidates, and rejects those that another process lacks or cannot read."""
    here = {score.candidate.key: score for score in scores}
    everywhere = gather({key: (score.candidate.run, score.reason) for key, score in here.items()})
    # Where a file system is not shared, an adapter's path and what is recorded with it are each process's own.
    found = []
    for key, (run, _) in everywhere[0].items():
        score = here.get(key) or Score(Candidate(name=key[0], revision=key[1]), "rejected")
        score = replace(score, candidate=replace(score.candidate, run=run))
        reasons = [known.get(key, (None, "it is not found there"))[1] for known in everywhere]
        refusing = [rank for rank, reason in enumerate(reasons) if reason is not None]
        if refusing:
            where = "" if len(refusing) == len(reasons) else f"process {refusing[0]}: "
            score = replace(score, status="rejected", reason=f"{where}{reasons[refusing[0]]}")
        found.append(score)
    return found


class _Race:
    """The rounds of a race; a thread reads the tensors of the next candidate while one is scored."""

    def __init__(
        self, model: nn.Module, metric: Metric, max_seconds: float | None, hub: Hub, reader: ThreadPoolExecutor
    ) -> None:
        self.model, self.metric, self.hub, self.reader = model, metric, hub, reader
        self.device = next(model.parameters()).device
        self.deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        self.in_step = is_sharded(model) or metric.collective
        self.cache, self.base = ScoreCache(), None
        self.cached = metric.name is not None and self.cache.directory is not None
        if self.in_step:
            # All processes hash a sharded model, or none does.
            self.cached = all(gather(self.cached))
        self.rows_hash = ""

    def round(self, scores: Iterable[Score], rows: SampleRows) -> list[Score]:
        """Returns the scores after one more part of the sample, of which every candidate sees the same rows."""
        if self.cached:
            # While the batches are whole: they may be halved when memory runs out.
            self.rows_hash = rows.fingerprint()
        rank, count = process_index_and_count()
        if self.in_step or count == 1:
            return self._scored_here(scores, rows)
        scores = list(scores)
        alive = [index for index, score in enumerate(scores) if score.status == "scored"]
        mine = self._scored_here([scores[index] for index in alive[rank::count]], rows)
        kept = ("status", "reason", "losses", "seconds", "warnings")
        found = gather([{name: getattr(score, name) for name in kept} for score in mine])
        for other, outcomes in enumerate(found):
            for index, outcome in zip(alive[other::count], outcomes, strict=True):
                scores[index] = replace(scores[index], **outcome)
        return scores

    def cut(self, scores: list[Score], size: int, keep: int) -> list[Score]:
        """Returns the scores with those eliminated that are behind after `size` rows."""
        values = {index: score.losses for index, score in enumerate(scores) if score.status == "scored"}
        if len({len(losses.loss) for losses in values.values()}) > 1:
            # Time was over within this round: there are no rows that all have seen.
            return scores
        runs = {index: scores[index].candidate.run for index in values}
        for index in values.keys() - on_main_process(lambda: survivors(values, runs, keep, self.metric)):
            scores[index].source.release()
            scores[index] = replace(scores[index], status="eliminated", reason=f"behind after {size} rows")
        return scores

    def _scored_here(self, scores: Iterable[Score], rows: SampleRows) -> list[Score]:
        done, scored = [], 0
        count = sum(score.status == "scored" for score in scores) if isinstance(scores, list) else None
        name = f"scoring {'' if count is None else f'{count} '}candidates, {len(rows)} rows each"
        with stage(name, None if count is None else count * len(rows)) as shown:
            for score, reading in self._read_ahead(scores, rows):
                done.append(self._scored(score, rows, reading) if score.status == "scored" else score)
                scored += score.status == "scored"
                # Also where its losses were known, or it failed.
                shown.reach(scored * len(rows))
                # Let go of its tensors before the ones after the next are read.
                del reading
        return done

    def _read_ahead(self, scores: Iterable[Score], rows: SampleRows) -> Iterator[tuple[Score, Future | None]]:
        # Candidates that arrive from the Hub come one by one: the one that is here does not wait for a download.
        waiting: deque[tuple[Score, Future | None]] = deque()
        ahead = isinstance(scores, list)
        for score in scores:
            reading = None
            if score.status == "scored" and (self.in_step or time.monotonic() <= self.deadline):
                self._hash_base(score.source)
                reading = self.reader.submit(self._read, score.source, rows)
            waiting.append((score, reading))
            del reading
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _hash_base(self, source: Source) -> None:
        """Takes the hash of the base model when the first candidate comes whose scores are cached."""
        if not self.cached or self.base is not None:
            return
        try:
            needed = source.fingerprint() is not None
        except RECOVERABLE:
            needed = False
        if any(gather(needed)) if self.in_step else needed:
            self.base = base_fingerprint(self.model)

    def _read(self, source: Source, rows: SampleRows) -> tuple[str | None, RowLosses | None, Update | None]:
        """Returns a candidate's key in the cache, with the losses that are known or else its update."""
        key = losses = None
        if self.base is not None and (candidate := source.fingerprint()) is not None:
            key = score_key(candidate, self.base, self.rows_hash, self.metric.name)
            losses = self.cache.get(key, len(rows))
        return key, losses, source.load(self.device) if losses is None else None

    def _scored(self, score: Score, rows: SampleRows, reading: Future | None) -> Score:
        started = time.monotonic()
        try:
            with failing_together() if self.in_step else nullcontext():
                losses, warnings = self._losses(score.source, rows, reading)
        except AdapterError as error:
            return replace(score, status="rejected", reason=str(error))
        except (RuntimeError, OSError) as error:
            return replace(score, status="failed", reason=f"{type(error).__name__}: {error}")
        if losses is None:
            self.hub.stop("max_seconds was over")
            # What was scored on fewer rows stays comparable by its mean.
            return replace(score, status="scored" if score.losses else "eliminated", reason="max_seconds was over")
        losses = joined([score.losses, losses] if score.losses else [losses])
        warnings = tuple(dict.fromkeys((*score.warnings, *warnings)))
        score = replace(score, seconds=score.seconds + time.monotonic() - started, warnings=warnings)
        if not math.isfinite(losses.mean_loss):
            return replace(score, status="failed", reason=f"its loss is {losses.mean_loss}")
        return replace(score, losses=losses)

    def _losses(
        self, source: Source, rows: SampleRows, reading: Future | None
    ) -> tuple[RowLosses | None, tuple[str, ...]]:
        """Returns a candidate's losses from the cache or the model, None where the time is over, and what is lost."""
        key, losses, update = (None, None, None) if reading is None else reading.result()
        over = time.monotonic() > self.deadline
        if self.in_step:
            # All processes join a forward pass, or none does.
            losses, over = from_main_process((losses, over))
        if losses is None and not over:
            update = source.load(self.device) if update is None else update
            losses = evaluate(self.model, rows, self.metric, update, share=self.in_step)
            warnings = update.warnings(self.model)
            # What a trainee's ranks lost is no property of the candidate.
            if key is not None and not warnings:
                self.cache.put(key, losses)
            return losses, warnings
        return losses, ()
