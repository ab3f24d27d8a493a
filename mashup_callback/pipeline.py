"""The stages of a mashup in order: candidates, sample, scoring, selection, guard, report, swap."""

import logging
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from .candidates import Candidate, Hub, find_candidates, same_data, stated_datasets
from .config import MashupConfig
from .distributed import from_main_process, is_first_on_machine, is_main_process, on_main_process
from .errors import NoCandidateError
from .guard import AUTO_RUNS, Decision, choose, judged
from .model import base_model_name
from .progress import stage
from .report import CandidateRow, MashupReport, environment
from .scoring import (
    COMPARED,
    FEWEST,
    Sample,
    SampleRows,
    Score,
    affordable_size,
    doublings,
    draw_sample,
    make_metric,
    race_rounds,
    score_candidates,
    share_of_run,
    shortened,
)
from .selection import Selection, select
from .sharing import save_failure, save_mashup
from .trainee import Trainee
from .verification import check_swap


if TYPE_CHECKING:
    # The Trainer imports datasets, and importing the callback should not.
    from transformers import Trainer

logger = logging.getLogger(__name__)

Key = tuple[str, str | None]
# What is told of the stages; scoring tells its rounds itself.
STAGES = {"candidates": "finding candidates", "sample": "reading the sample", "merging": "merging, and judging merges"}


class MashupRun:
    """One way through the stages, with the time that each took."""

    def __init__(
        self,
        config: MashupConfig,
        args: TrainingArguments,
        model: nn.Module,
        trainee: Trainee,
        max_steps: int,
        trainer: "Trainer | None" = None,
    ) -> None:
        self.config, self.args, self.model, self.trainee = config, args, model, trainee
        rows_of_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        # Where batches are not evened out, processes may count different steps.
        self.trained_rows = from_main_process(max(1, max_steps)) * rows_of_a_step
        self.keep = AUTO_RUNS if config.top_k == "auto" else config.top_k
        self.base_model = config.base_model or base_model_name(model)
        self.directory = mashup_directory(config, args)
        self.metric = make_metric(config.metric, trainer, trainee)
        # A trainer's own loss may be of anything.
        self.settings = config.to_dict() | ({"metric": f"loss of {type(trainer).__name__}"} if trainer else {})
        self.hub = Hub(asks=is_first_on_machine())
        self.timings: dict[str, float] = {}
        self.scores: list[Score] = []
        self.sample: dict[str, int] = {}
        self.report: MashupReport | None = None
        self.swapped = False

    def run(self, specs: Sequence[str | PathLike[str]], dataloader: DataLoader) -> None:
        config = self.config
        with self._timed("candidates"):
            candidates = on_main_process(lambda: self._find(specs))
        with self._timed("sample"):
            sample = self._draw(dataloader, len(candidates))
            self.sample = sample.counts()
        with self._timed("scoring"):
            self.scores = _warned(self._score(candidates, sample.selection), dataloader.dataset)
        selection = select(self.scores, config.top_k, config.weights)
        if not selection.scores:
            raise NoCandidateError(self._why_none(specs))
        with self._timed("merging"):
            decision = self._judge(selection, sample)
        # Before the swap, so that a failure after it cannot call a merged run "scratch".
        report = self.report = self._outcome(decision, len(sample.held_out))
        with self._timed("swap"):
            report = self.report = replace(report, **self._swap(decision, sample.held_out))
        report = self.report = from_main_process(replace(report, timings=self.timings, hub=self.hub.traffic()))
        update = (decision.init or decision.merge).update
        write = partial(self.trainee.save, update, base_model=self.base_model)
        self._save(report, lambda: save_mashup(self.directory, report, write))

    def give_up(self, reason: str, first: bool = False) -> None:
        """Reports why there is no mashup: as scratch, unless the merge is in the model by now."""
        if self.swapped:
            logger.warning("Training starts from the mashup, but something failed after it was written: %s", reason)
            return
        rows = candidate_rows(self.scores, {})
        report = self.report = self._report(decision="scratch", reason=reason, candidates=rows)
        if not first:
            logger.warning("No mashup. %s", report.summary())
        self._save(report, lambda: save_failure(self.directory, report))

    def _find(self, specs: Sequence[str | PathLike[str]]) -> list[Candidate]:
        config = self.config
        return find_candidates(
            specs,
            self.base_model,
            exclude=[Path(self.args.output_dir), self.directory],
            max_candidates=config.max_candidates,
            max_download_gb=config.max_download_gb,
            allow_licenses=config.allow_licenses,
            allow_authors=config.allow_authors,
            check=self.trainee.check,
            relations=self.trainee.relations,
            hub=self.hub,
        )

    def _score(self, candidates: Sequence[Candidate], rows: SampleRows) -> list[Score]:
        config = self.config
        return score_candidates(
            self.model,
            candidates,
            rows,
            self.metric,
            search=config.search,
            keep=self.keep,
            base_model=self.base_model,
            max_seconds=config.max_seconds,
            hub=self.hub,
            admit=self.trainee.admit,
        )

    def _draw(self, dataloader: DataLoader, candidates: int) -> Sample:
        config, size = self.config, self.config.sample_size
        if size == "auto":
            size = affordable_size(self.trained_rows, candidates, judged(config), config.search, self.keep)
        halved = config.guard_dataset is None
        grows = config.sample_size == "auto" and config.guard and halved
        most = [size, *(2 * rows for rows in doublings(size // 2, self.trained_rows) if grows)][-1]
        sample = draw_sample(
            dataloader,
            most,
            batch_size=config.batch_size or self.args.train_batch_size,
            seed=self.args.seed if config.seed is None else config.seed,
            guard_rows=config.guard_dataset,
            labeled=self.metric.labeled,
            # A batch size that was asked for is a bound.
            tokens=0 if config.batch_size else None,
        )
        if config.sample_size != "auto":
            return sample
        few = size == FEWEST and self.metric.labeled
        return shortened(sample, size // 2 if halved else size, few, halved)

    def _judge(self, selection: Selection, sample: Sample) -> Decision:
        parts = sample.parts(doublings(len(sample.held_out), self.trained_rows, self._scored))
        return choose(self.model, self.trainee, selection, parts, self.metric, self.config)

    def _swap(self, decision: Decision, held_out: SampleRows) -> dict[str, Any]:
        """Writes what was chosen, takes it back where the model is clearly worse, returns the report's changes."""
        if decision.init is None or self.config.dry_run:
            return {}
        self.trainee.write(decision.init.update)
        self.swapped = True
        if not self.metric.repeatable:
            return {}
        found = check_swap(self.model, decision, held_out, self.metric)
        changes: dict[str, Any] = {"swapped_loss": _finite(found.loss), "expected_loss": _finite(found.expected)}
        if found.differs:
            text = str(found)
            if self.config.guard and found.is_worse_than_fresh:
                self.trainee.undo()
                self.swapped = False
                text += f", and {found.fresh:.4f} before it: the swap was taken back"
                changes["decision"] = "scratch"
            logger.warning("The model does not compute what the guard judged: %s", text)
            changes["reason"] = f"{decision.reason}; {text}"
        return changes

    @property
    def _scored(self) -> int:
        """Forward passes of a row in scoring."""
        return sum(score.rows for score in self.scores)

    def _outcome(self, decision: Decision, first: int) -> MashupReport:
        """Returns the report of a decision that was sought on the `first` held-out rows, and on more if need be."""
        shown = decision.init or decision.merge
        gain, error = decision.gain
        seen = self.sample["held_out"] = len(decision.fresh.tokens)
        passes = self._scored + judged(self.config) * first + COMPARED * (seen - first)
        return self._report(
            decision=decision.name,
            reason=decision.reason,
            base_loss=_finite(decision.fresh.mean_loss),
            merged_loss=_finite(decision.merge.loss),
            single_loss=_finite(decision.single.loss),
            gain=_finite(gain),
            gain_se=_finite(error),
            candidates=candidate_rows(self.scores, shown.selection.weight_of(), decision.merge.selection.weight_of()),
            rounds=race_rounds(self.scores),
            merge=shown.info,
            share=share_of_run(passes, self.trained_rows),
        )

    def _report(self, **values: Any) -> MashupReport:
        # Agreed, as each process took its own time and found the candidates at its own paths.
        return from_main_process(
            MashupReport(
                base_model=self.base_model,
                dry_run=self.config.dry_run,
                timings={**self.timings},
                config=self.settings,
                hub=self.hub.traffic(),
                environment=environment(),
                sample=self.sample,
                **values,
            )
        )

    def _save(self, report: MashupReport, write: Callable[[], Any]) -> None:
        if not is_main_process():
            return
        for do, what in ((report.show, "shown"), (write, f"saved in {self.directory}")):
            try:
                do()
            except Exception as error:
                if self.config.on_error == "raise":
                    raise
                # The model is as the report says; only what tells of it is missing.
                logger.warning("The mashup could not be %s: %s", what, error)

    def _why_none(self, specs: Sequence[str | PathLike[str]]) -> str:
        if not self.scores:
            return f"no candidate was found in {', '.join(map(str, specs))}, as it is for a first run"
        reasons = "; ".join(f"{score.candidate.name}: {score.reason}" for score in self.scores[:3])
        return f"none of the {len(self.scores)} candidates is usable ({reasons})"

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            with stage(STAGES[name]) if name in STAGES else nullcontext():
                yield
        finally:
            self.timings[name] = round(time.monotonic() - started, 4)


def mashup_directory(config: MashupConfig, args: TrainingArguments) -> Path:
    """Returns where a run's report and merge are written."""
    return Path(config.report_dir or Path(args.output_dir) / "mashup").expanduser()


def candidate_rows(
    scores: Sequence[Score], weights: Mapping[Key, float], merged: Container[Key] = ()
) -> tuple[CandidateRow, ...]:
    """Returns the report's rows; `weights` of the start by the key of the candidate, and what is `merged`, by key."""
    return tuple(
        CandidateRow(
            name=score.candidate.name,
            status=score.status,
            revision=score.candidate.revision,
            reason=score.reason,
            loss=score.loss,
            accuracy=None if score.losses is None else score.losses.accuracy,
            rows=score.rows,
            tokens=score.tokens,
            weight=weights.get(score.candidate.key),
            rank=None if score.source is None else score.source.rank,
            license=score.candidate.license,
            bytes=score.candidate.bytes,
            seconds=round(score.seconds, 4),
            warnings=score.warnings,
            repo_id=score.candidate.repo_id,
            in_merge=score.candidate.key in merged,
            datasets=stated_datasets(score.candidate) if score.source else (),
            kind=score.candidate.kind,
        )
        for score in scores
    )


def _warned(scores: Sequence[Score], dataset: Any) -> list[Score]:
    """Returns the scores with a warning on each candidate whose model card names the data that is trained on."""
    shared = [same_data(score.candidate, dataset) if score.source else None for score in scores]
    return [
        replace(score, warnings=(*score.warnings, warning)) if warning else score
        for score, warning in zip(scores, shared, strict=True)
    ]


def _finite(loss: float) -> float | None:
    # JSON has no numbers for these.
    return loss if math.isfinite(loss) else None
