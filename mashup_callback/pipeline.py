"""One way through the stages: candidates, sample, scoring, selection, merging, guard, swap, report."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from .candidates import Candidate, Hub, find_candidates, fits
from .config import MashupConfig
from .distributed import agreed, decided, is_first_on_machine, is_main_process
from .formats.adapter_writer import save_adapter
from .full.trainee import FittedModel, handle_models
from .guard import Start, Verdict, choose
from .lora.trainee import FittedMerge, swap
from .model.layers import Trainee, base_model_name, layer_shapes
from .model.tensors import FullTrainee
from .provenance import warn_of_same_data
from .report import CandidateRow, MashupReport, MergeInfo, environment
from .scoring.cache import shared_fingerprint
from .scoring.halving import rungs
from .scoring.race import Score, score_candidates
from .scoring.sample import Rows, draw_sample
from .selection import select
from .sharing.save import MERGEKIT_NAME, save_failure, save_mashup
from .storage import Workspace


logger = logging.getLogger(__name__)

# Runs that a race leaves for top_k="auto" to try.
AUTO_RUNS = 5


class MashupRun:
    """One way through the stages, with the time that each took."""

    def __init__(
        self,
        config: MashupConfig,
        args: TrainingArguments,
        model: nn.Module,
        trainee: Trainee | FullTrainee,
        tokenizer: Any = None,
    ) -> None:
        config = config.resolved(args.seed)
        self.config, self.args, self.model, self.trainee = config, args, model, trainee
        self.base_model = config.base_model or base_model_name(model)
        self.directory = mashup_directory(config, args)
        self.workspace = Workspace(self.directory)
        self.models = handle_models(model, trainee, self.workspace, config, tokenizer)
        self.hub = Hub(asks=is_first_on_machine())
        self.timings: dict[str, float] = {}
        self.scores: list[Score] = []
        self.sample: dict[str, int] = {}
        self.base: str | None = None
        self.report: MashupReport | None = None
        # Takes the swap back; None while the model is as it was.
        self.undo: Callable[[], None] | None = None

    def go(self, specs: Sequence[str], dataloader: DataLoader) -> None:
        config = self.config
        with self._timed("candidates"):
            candidates = decided(lambda: self._find(specs))
        with self._timed("sample"):
            sample = draw_sample(
                dataloader,
                config.sample_size,
                batch_size=config.batch_size or self.args.train_batch_size,
                seed=config.seed,
                guard_rows=config.guard_dataset,
                labeled=not callable(config.metric),
            )
            self.sample = sample.counts()
            if not callable(config.metric):
                self.base = shared_fingerprint(self.model)
        with self._timed("scoring"):
            self.scores = warn_of_same_data(self._score(candidates, sample.selection), dataloader.dataset)
        selection = select(self.scores, None if config.top_k == "auto" else config.top_k, config.weights)
        if not selection.scores:
            raise RuntimeError(self._why_none())
        with self._timed("merging"):
            verdict = choose(self.model, self.trainee, selection, sample.held_out, config, self.models.merger)
        self.report = self._outcome(verdict)
        self._swap(verdict.chosen and verdict.chosen.fitted)
        self._check(verdict, sample.held_out)
        shown = verdict.chosen or verdict.merge
        self._finish(lambda: save_mashup(self.directory, self.report, lambda draft: self._save(shown, draft)))

    def give_up(self, reason: str) -> None:
        if self.undo is not None:
            # The report was made before the swap and is true.
            logger.warning("Training starts from the mashup, but something failed after it was written: %s", reason)
            return
        logger.warning("No mashup, training starts from the fresh initialisation: %s", reason)
        self.report = self._report(decision="scratch", reason=reason, candidates=candidate_rows(self.scores, {}))
        self._publish(lambda: save_failure(self.directory, self.report))

    def _find(self, specs: Sequence[str]) -> list[Candidate]:
        config = self.config
        return find_candidates(
            specs,
            self.base_model,
            exclude=[Path(self.args.output_dir), self.directory],
            max_candidates=config.max_candidates,
            max_download_gb=config.max_download_gb,
            allow_licenses=config.allow_licenses,
            allow_authors=config.allow_authors,
            check=fits(layer_shapes(self.model), self.base_model, self.models.check),
            relations=("adapter",) if self.models.merger is None else ("adapter", "finetune"),
            hub=self.hub,
        )

    def _score(self, candidates: Sequence[Candidate], rows: Rows) -> list[Score]:
        config = self.config
        return score_candidates(
            self.model,
            candidates,
            rows,
            config.metric,
            search=config.search,
            keep=AUTO_RUNS if config.top_k == "auto" else config.top_k,
            base_model=self.base_model,
            max_seconds=config.max_seconds,
            hub=self.hub,
            admit_model=self.models.admit,
            learning_rate=self.args.learning_rate,
            fingerprint=self.base,
        )

    def _swap(self, fitted: FittedMerge | FittedModel | None) -> None:
        with self._timed("swap"):
            if fitted is not None and not self.config.dry_run:
                self.undo = swap(self.model, self.trainee, fitted)

    def _check(self, verdict: Verdict, held_out: Rows) -> None:
        """Compares the loss on one held-out batch with what the guard found; much worse, the swap is taken back."""
        if self.undo is None or not verdict.can_be_checked(self.config):
            return
        with self._timed("swap"):
            found = verdict.after_swap(self.model, held_out, self.config)
        self.report = replace(self.report, swapped_loss=_finite(found.loss), expected_loss=_finite(found.expected))
        if not found.differs:
            return
        text = f"after the swap the loss on one held-out batch is {found.loss:.4f}, expected {found.expected:.4f}"
        if self.config.guard and found.is_worse_than_fresh:
            self.undo()
            self.undo = None
            text += f", and {found.fresh:.4f} before it: the swap was taken back"
            self.report = replace(self.report, decision="scratch")
        logger.warning("The model does not compute what the guard judged: %s", text)
        self.report = replace(self.report, reason=f"{self.report.reason}; {text}")

    def _save(self, start: Start, draft: Path) -> None:
        if isinstance(self.trainee, FullTrainee):
            # A candidate that is not used stays where it is; one that is used was copied.
            if start.merged.owned:
                start.merged.move_to(draft)
                if start.merged.recipe:
                    (draft / MERGEKIT_NAME).write_text(start.merged.recipe, encoding="utf-8")
            return
        task_type = getattr(self.trainee.config.task_type, "value", self.trainee.config.task_type)
        save_adapter(draft, start.fitted.factors, base_model=self.report.base_model, task_type=task_type)

    def _finish(self, write: Callable[[], Any]) -> None:
        self.report = agreed(replace(self.report, timings=self._seconds(), hub=self.hub.traffic()))
        self._publish(write)

    def _outcome(self, verdict: Verdict) -> MashupReport:
        shown = verdict.chosen or verdict.merge
        weights = dict(zip(map(id, shown.selection.scores), shown.selection.weights, strict=True))
        return self._report(
            decision=verdict.decision,
            reason=verdict.reason,
            base_loss=_finite(verdict.base_loss),
            merged_loss=_finite(verdict.merge.loss),
            single_loss=_finite(verdict.single.loss),
            gain=_finite(verdict.gain[0]),
            gain_se=_finite(verdict.gain[1]),
            candidates=candidate_rows(self.scores, weights),
            rungs=rungs(self.scores),
            merge=merge_info(shown.merged, shown.fitted.lost_energy, shown.fitted.lost_layers),
        )

    def _report(self, **values: Any) -> MashupReport:
        # Agreed, as each process took its own time and found the candidates at its own paths.
        return agreed(
            MashupReport(
                base_model=self.base_model,
                dry_run=self.config.dry_run,
                timings=self._seconds(),
                config=self.config.to_dict(),
                hub=self.hub.traffic(),
                environment=environment(),
                sample=self.sample,
                **values,
            )
        )

    def _publish(self, write: Callable[[], Any]) -> None:
        if is_main_process():
            self.report.show()
            try:
                write()
            except Exception as error:
                if self.config.on_error == "raise":
                    raise
                # The model is as the report says; only its record on disk is missing.
                logger.warning("The mashup could not be saved in %s: %s", self.directory, error)

    def _seconds(self) -> dict[str, float]:
        return {name: round(seconds, 4) for name, seconds in self.timings.items()}

    def _why_none(self) -> str:
        if not self.scores:
            return "no candidate was found"
        reasons = "; ".join(f"{score.candidate.name}: {score.reason}" for score in self.scores[:3])
        return f"none of the {len(self.scores)} candidates is usable ({reasons})"

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.monotonic() - started


def mashup_directory(config: MashupConfig, args: TrainingArguments) -> Path:
    """Returns where a run's report and merge are written."""
    return Path(config.report_dir or Path(args.output_dir) / "mashup")


def _finite(loss: float) -> float | None:
    # JSON has no numbers for these.
    return loss if math.isfinite(loss) else None


def candidate_rows(scores: Sequence[Score], weights: Mapping[int, float]) -> tuple[CandidateRow, ...]:
    """Returns the report's rows; `weights` has the weights in the merge by `id` of the score."""
    return tuple(
        CandidateRow(
            name=score.candidate.name,
            status=score.status,
            revision=score.candidate.revision,
            reason=score.reason,
            loss=score.loss,
            accuracy=None if score.losses is None else score.losses.accuracy,
            probe_loss=score.probe_loss,
            rows=score.rows,
            tokens=score.tokens,
            weight=weights.get(id(score)),
            rank=None if score.adapter is None else score.adapter.rank,
            license=score.candidate.license,
            bytes=score.candidate.bytes,
            seconds=round(score.seconds, 4),
            warnings=() if score.adapter is None else score.adapter.warnings,
            repo_id=score.candidate.repo_id,
        )
        for score in scores
    )


def merge_info(merged: Any, lost_energy: float = 0.0, lost_layers: tuple[str, ...] = ()) -> MergeInfo:
    """Returns what the report says about a merge, and of what the trainee cannot hold of it."""
    return MergeInfo(
        method=merged.method,
        space=merged.space,
        parameters=dict(merged.parameters),
        rank=merged.rank,
        kept_energy=merged.total_kept_energy,
        kept_energy_by_module=dict(merged.kept_energy),
        lost_energy=lost_energy,
        lost_layers=lost_layers,
        mergekit_version=merged.mergekit_version,
    )
