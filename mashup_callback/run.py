"""One way through the stages: candidates, sample, scoring, selection, merging, guard, swap, report."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
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
from .full_training import FittedModel, handle_models
from .guard import Verdict, choose
from .layers import Trainee, base_model_name, layer_shapes
from .model_tensors import FullTrainee
from .provenance import warn_of_same_data
from .publishing import publish
from .racing import rungs
from .report import REPORT_NAME, MashupReport, candidate_rows, environment, merge_info
from .restart import Earlier, find_earlier, inputs_fingerprint
from .sampling import Rows, draw_sample
from .scoring import Score, score_candidates
from .selection import select
from .swap import FittedMerge, swap
from .workspace import Workspace


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
        self.config, self.args, self.model, self.trainee = config, args, model, trainee
        self.base_model = config.base_model or base_model_name(model)
        self.directory = mashup_directory(config, args)
        self.workspace = Workspace(self.directory)
        self.models = handle_models(model, trainee, self.workspace, config, tokenizer)
        self.hub = Hub(asks=is_first_on_machine())
        self.timings: dict[str, float] = {}
        self.scores: list[Score] = []
        self.inputs: str | None = None
        self.report: MashupReport | None = None

    def go(self, specs: Sequence[str], dataloader: DataLoader) -> None:
        config = self.config
        with self._timed("candidates"):
            candidates = decided(lambda: self._find(specs))
        with self._timed("sample"):
            samples = draw_sample(
                dataloader,
                config.sample_size,
                batch_size=config.batch_size or self.args.train_batch_size,
                seed=config.seed,
                guard_rows=config.guard_dataset,
            )
            self.inputs = inputs_fingerprint(config, self.model, self.trainee, candidates, samples)
            earlier = find_earlier(self.directory, self.inputs, self.trainee, self.models.merger)
        if earlier is not None:
            return self._again(earlier)
        selection_rows, held_out = samples
        with self._timed("scoring"):
            self.scores = warn_of_same_data(self._score(candidates, selection_rows), dataloader.dataset)
        selection = select(self.scores, None if config.top_k == "auto" else config.top_k, config.weights)
        if not selection.scores:
            raise RuntimeError(self._why_none())
        with self._timed("merging"):
            verdict = choose(self.model, self.trainee, selection, held_out, config, self.models.merger)
        self._swap(verdict.chosen and verdict.chosen.fitted)
        self._finish(verdict)

    def give_up(self, reason: str) -> None:
        logger.warning("No mashup, training starts from the fresh initialisation: %s", reason)
        self._report(decision="scratch", reason=reason, candidates=candidate_rows(self.scores, {}))
        self._publish(lambda: publish(self.directory, self.report, None, self.trainee))

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
        )

    def _swap(self, fitted: FittedMerge | FittedModel | None) -> None:
        with self._timed("swap"):
            if fitted is not None and not self.config.dry_run:
                swap(self.model, self.trainee, fitted)

    def _again(self, earlier: Earlier) -> None:
        self._swap(earlier.fitted)
        self.report = agreed(replace(earlier.report, reused=True, timings=self._seconds(), hub=self.hub.traffic()))
        # The merge stays where it is.
        self._publish(lambda: self.report.save(self.directory / REPORT_NAME))

    def _finish(self, verdict: Verdict) -> None:
        shown = verdict.chosen or verdict.merge
        weights = dict(zip(map(id, shown.selection.scores), shown.selection.weights, strict=True))
        self._report(
            decision=verdict.decision,
            reason=verdict.reason,
            base_loss=_finite(verdict.base_loss),
            merged_loss=_finite(verdict.merge.loss),
            single_loss=_finite(verdict.single.loss),
            candidates=candidate_rows(self.scores, weights),
            rungs=rungs(self.scores),
            inputs=self.inputs,
            merge=merge_info(shown),
        )
        self._publish(lambda: publish(self.directory, self.report, shown, self.trainee))

    def _report(self, **values: Any) -> None:
        # Agreed, as each process took its own time and found the candidates at its own paths.
        self.report = agreed(
            MashupReport(
                base_model=self.base_model,
                dry_run=self.config.dry_run,
                timings=self._seconds(),
                config=self.config.to_dict(),
                hub=self.hub.traffic(),
                environment=environment(),
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
