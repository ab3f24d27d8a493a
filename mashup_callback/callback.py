"""The callback: the stages in their order, and when they run."""

import inspect
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from .candidates import check_specs, find_candidates
from .config import MashupConfig, UsageError
from .distributed import OutOfStepError, agreed, in_turns, is_first_on_machine, is_main_process, joint
from .full_training import handle_models
from .guard import Start, Verdict, choose
from .hub import Hub
from .layers import Trainee, base_model_name, find_trainee, layer_shape, linear_layers
from .model_tensors import FullTrainee
from .provenance import warn_of_same_data
from .publishing import publish
from .racing import rungs
from .report import REPORT_NAME, MashupReport, candidate_rows, environment, merge_info
from .sampling import draw_sample
from .scoring import Score, score_candidates
from .selection import select
from .sharing import describe_on_push, push_mashup
from .swap import swap
from .trainer_loss import ScoreMetric, TrainerLoss
from .workspace import Workspace


if TYPE_CHECKING:
    # The Trainer imports datasets, and importing the callback should not.
    from transformers import Trainer

logger = logging.getLogger(__name__)

# Runs that a race leaves for top_k="auto" to try.
AUTO_RUNS = 5


class MashupCallback(TrainerCallback):
    r"""
    Starts training from a merge of the best of your past adapters instead of from a fresh initialisation.

    At the beginning of training the candidates are scored by their loss on a small sample of the training data, the
    best are merged with mergekit, and the merge is written into the adapter that is being trained, unless a fresh
    initialisation is better on held-out rows. Nothing else changes: with the decision `"scratch"` the run is
    bit-identical to one without the callback. This is the method of "Mashup Learning" (arXiv 2603.10156).

    Args:
        candidates (`str` or `Sequence[str]`):
            Where the candidates are: directories and globs (`runs/*`), Hub repositories (`org/name@revision`),
            searches (`hub:author=acme,limit=50`) and collections (`collection:org/slug`).
        config ([`MashupConfig`], *optional*):
            The settings.
        score (`Callable`, *optional*):
            Ranks and guards in place of `metric`, higher is better: called with the model that has a candidate applied
            and a batch as the collator makes it, returns a number. For trainers that know rewards instead of labels
            (GRPO).
        **settings:
            Fields of [`MashupConfig`], which take precedence over `config`.

    Attributes:
        report ([`MashupReport`], *optional*): What was found, done and why, once training has begun.

    Raises:
        TypeError: A setting is unknown.
        ValueError: A setting or a candidate's form is wrong, or a literal path does not exist.

    Example:

    ```python
    trainer = SFTTrainer(
        model,
        train_dataset=dataset,
        peft_config=LoraConfig(r=16),
        callbacks=[MashupCallback(["runs/*"])],
    )
    trainer.train()
    ```
    """

    def __init__(
        self,
        candidates: str | Sequence[str],
        *,
        config: MashupConfig | None = None,
        score: Callable[[nn.Module, Any], float] | None = None,
        **settings: Any,
    ) -> None:
        if score is not None:
            settings["metric"] = ScoreMetric(score)
        self.config = MashupConfig.from_settings(config, settings)
        self._trainer: "Trainer | None" = None
        self.specs = check_specs(candidates)
        self.report: MashupReport | None = None
        self._done: weakref.ref[nn.Module] | None = None
        self._directory: Path | None = None

    def bind(self, trainer: "Trainer") -> "MashupCallback":
        """
        Makes the callback rank and guard by this trainer's own loss, where a batch alone does not give it.

        Args:
            trainer (`transformers.Trainer`):
                The trainer that the callback was given to: DPO, KTO, reward modelling, sentence-transformers, ...

        Returns:
            `MashupCallback`: The callback itself.
        """
        self._trainer = trainer
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self._is_due(state, model):
            return
        with joint():
            trainee = find_trainee(model, overwrite=self.config.overwrite)
        self._directory = _directory(self.config, args)
        config = self.config
        if self._trainer is not None:
            config = replace(config, metric=TrainerLoss(self._trainer, trainee))
        run = _Run(config, args, model, trainee, processing_class)
        try:
            with joint():
                run.go(self.specs, train_dataloader)
        except UsageError:
            # A user's own mistake would only hide behind a run from scratch.
            raise
        except OutOfStepError:
            # No process can go on with the model, not even from the fresh initialisation.
            raise
        except Exception as error:
            # Whatever a stage raises, the user asked for training first: `on_error` decides.
            if self.config.on_error == "raise":
                raise
            # What was made so far may fill the disk.
            run.workspace.close()
            run.give_up(agreed(f"{type(error).__name__}: {error}"))
        finally:
            run.workspace.close()
        self.report = run.report
        self._done = weakref.ref(model)
        _log(self.report, args, state, control)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        report = self.report
        if report is None and state.global_step > 0 and (_directory(self.config, args) / REPORT_NAME).is_file():
            # The run was resumed: its mashup was made, and reported, by the process that began it.
            report = MashupReport.load(_directory(self.config, args))
        if report is not None and state.is_world_process_zero:
            describe_on_push(report, args.output_dir)

    def push_to_hub(self, repo_id: str, private: bool | None = None, create_pr: bool = False) -> str:
        """
        Pushes the merged adapter to the Hub as a repository of its own, see [`push_mashup`].

        Args:
            repo_id (`str`):
                Repository to push to, `org/name`; created where it is missing.
            private (`bool`, *optional*):
                Whether a new repository is private; by default as its owner's settings say.
            create_pr (`bool`, *optional*, defaults to `False`):
                Open a pull request instead of committing to the main branch.

        Returns:
            `str`: Address of the commit, or of the pull request. Only the main process pushes; on the others, the name
            of the repository.

        Raises:
            ValueError: Training has not begun, or there is no merged adapter to push.
        """
        if self._directory is None:
            raise ValueError("There is no mashup to push yet: it is made when training begins.")
        return push_mashup(self._directory, repo_id, private, create_pr)

    def _is_due(self, state: TrainerState, model: nn.Module) -> bool:
        if state.global_step > 0:
            logger.info("Training resumes at step %d; the mashup is skipped.", state.global_step)
            return False
        if self._done is not None and self._done() is model:
            logger.info("This model already had its mashup; it is skipped.")
            return False
        return True


class _Run:
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
        self.directory = _directory(config, args)
        self.workspace = Workspace(self.directory)
        self.merger, self.admit_model = handle_models(model, trainee, self.workspace, config, tokenizer)
        self.hub = Hub(asks=is_first_on_machine())
        self.timings: dict[str, float] = {}
        self.scores: list[Score] = []
        self.report: MashupReport | None = None

    def go(self, specs: Sequence[str], dataloader: DataLoader) -> None:
        config = self.config
        with self._timed("candidates"):
            exclude = [Path(self.args.output_dir), self.directory]
            candidates = in_turns(
                lambda: find_candidates(
                    specs,
                    self.base_model,
                    exclude=exclude,
                    max_candidates=config.max_candidates,
                    max_download_gb=config.max_download_gb,
                    allow_licenses=config.allow_licenses,
                    allow_authors=config.allow_authors,
                    layers={name: layer_shape(layer) for name, layer in linear_layers(self.model).items()},
                    hub=self.hub,
                )
            )
        with self._timed("sample"):
            batch_size = config.batch_size or self.args.train_batch_size
            selection_rows, held_out = draw_sample(
                dataloader,
                config.sample_size,
                batch_size=batch_size,
                seed=config.seed,
                guard_rows=config.guard_dataset,
            )
        with self._timed("scoring"):
            self.scores = score_candidates(
                self.model,
                candidates,
                selection_rows,
                config.metric,
                search=config.search,
                keep=AUTO_RUNS if config.top_k == "auto" else config.top_k,
                base_model=self.base_model,
                max_seconds=config.max_seconds,
                hub=self.hub,
                admit_model=self.admit_model,
                learning_rate=self.args.learning_rate,
            )
            self.scores = warn_of_same_data(self.scores, dataloader.dataset)
        selection = select(self.scores, None if config.top_k == "auto" else config.top_k, config.weights)
        if not selection.scores:
            raise RuntimeError(self._why_none())
        with self._timed("merging"):
            verdict = choose(self.model, self.trainee, selection, held_out, config, self.merger)
        with self._timed("swap"):
            if verdict.chosen is not None and not config.dry_run:
                swap(self.model, self.trainee, verdict.chosen.fitted)
        self._finish(verdict)

    def give_up(self, reason: str) -> None:
        logger.warning("No mashup, training starts from the fresh initialisation: %s", reason)
        self._report(decision="scratch", reason=reason, candidates=candidate_rows(self.scores, {}))
        self._publish(None)

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
            merge=merge_info(shown),
        )
        self._publish(shown)

    def _report(self, **values: Any) -> None:
        # Agreed, as each process took its own time and found the candidates at its own paths.
        self.report = agreed(
            MashupReport(
                base_model=self.base_model,
                dry_run=self.config.dry_run,
                timings={name: round(seconds, 4) for name, seconds in self.timings.items()},
                config=self.config.to_dict(),
                hub=self.hub.traffic(),
                environment=environment(),
                **values,
            )
        )

    def _publish(self, start: Start | None) -> None:
        if is_main_process():
            self.report.show()
            try:
                publish(self.directory, self.report, start, self.trainee)
            except OSError as error:
                if self.config.on_error == "raise":
                    raise
                # The model is as the report says; only its record on disk is missing.
                logger.warning("The mashup could not be saved in %s: %s", self.directory, error)

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


def _directory(config: MashupConfig, args: TrainingArguments) -> Path:
    return Path(config.report_dir or Path(args.output_dir) / "mashup")


def _finite(loss: float) -> float | None:
    # JSON has no numbers for these.
    return loss if math.isfinite(loss) else None


def _log(report: MashupReport, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
    state.log_history.append({**report.logs(), "step": state.global_step})
    handler = _calling_handler()
    if handler is not None:
        handler.on_log(args, state, control, report.logs())


def _calling_handler() -> CallbackHandler | None:
    # A callback is given everything but the handler, and only the handler knows the trackers.
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), CallbackHandler):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None
