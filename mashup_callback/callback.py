"""The callback: when a mashup is made, and what the Trainer hears of it."""

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .candidates import check_specs
from .config import MashupConfig
from .distributed import failing_together, from_main_process
from .errors import NoCandidateError, OutOfStepError, UsageError, why
from .model import is_sharded
from .pipeline import MashupRun, mashup_directory
from .report import REPORT_NAME, MashupReport
from .scoring import ScoreMetric
from .sharing import PICTURE_NAME, push_mashup, share
from .storage import StorageError, prepare, unwound_by_sigterm
from .trainee import find_trainee


if TYPE_CHECKING:
    # The Trainer imports datasets, and importing the callback should not.
    from transformers import Trainer

logger = logging.getLogger(__name__)


class MashupCallback(TrainerCallback):
    r"""
    Starts training from a merge of the best of your past adapters instead of from a fresh initialization.

    At the beginning of training the candidates are scored by their loss on a small sample of the training data, the
    best are merged with mergekit, and the merge is written into the adapter that is being trained, unless a fresh
    initialization is better on held-out rows. Nothing else changes: with the decision `"scratch"` the run is
    bit-identical to one without the callback. This is the method of "Mashup Learning" (arXiv 2603.10156).

    Args:
        candidates (`str`, `Path` or a list of them):
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
        TypeError: A setting is unknown, or both `score` and `metric` are given.
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
        candidates: str | PathLike | Sequence[str | PathLike],
        *,
        config: MashupConfig | None = None,
        score: Callable[[nn.Module, Any], float] | None = None,
        **settings: Any,
    ) -> None:
        if score is not None:
            if "metric" in settings or (config is not None and config.metric != "loss"):
                raise TypeError("`score` and `metric` were both given, and each ranks the candidates. Give one.")
            settings["metric"] = ScoreMetric(score)
        self.config = MashupConfig.from_settings(config, settings)
        self._trainer: Trainer | None = None
        self.specs = check_specs(candidates)
        self.report: MashupReport | None = None
        self._done: weakref.ref[nn.Module] | None = None
        self._directory: Path | None = None

    def bind(self, trainer: "Trainer") -> "MashupCallback":
        """
        Makes the callback rank and guard by this trainer's own loss, where a batch alone does not give it, and lets it
        log to the trainer's trackers.

        Args:
            trainer (`transformers.Trainer`):
                The trainer that the callback was given to: DPO, KTO, reward modelling, sentence-transformers, ...

        Returns:
            `MashupCallback`: The callback itself.

        Raises:
            ValueError: The callback was made with a `metric` or a `score`.
        """
        if self.config.metric != "loss":
            raise ValueError(
                "`bind` ranks the candidates by the trainer's own loss, and the callback has a `metric` or `score` of "
                "its own. Leave one of them out."
            )
        self._trainer = trainer
        return self

    @unwound_by_sigterm()
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
        self._directory = mashup_directory(self.config, args)
        if not self._is_due(state, model):
            return
        config = self.config.resolved(args.seed)
        with failing_together():
            trainee = find_trainee(model, config, self._directory)
            _refuse_idle(model, kwargs.get("optimizer"))
            self._check_directory(self._directory)
        run = MashupRun(config, args, model, trainee, state.max_steps, self._trainer)
        try:
            with failing_together():
                run.run(self.specs, train_dataloader)
        except (UsageError, OutOfStepError):
            # A user's own mistake would only hide behind a run from scratch; and out of step, no process can go on
            # with the model, not even from the fresh initialization.
            raise
        except Exception as error:
            # Whatever a stage raises, the user asked for training first: `on_error` decides.
            if self.config.on_error == "raise":
                raise
            # What was made so far may fill the disk.
            trainee.close()
            run.give_up(*from_main_process((why(error), isinstance(error, NoCandidateError) and not run.scores)))
        finally:
            trainee.close()
        self.report = run.report
        self._done = weakref.ref(model)
        self._tell(state, model)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        directory = mashup_directory(self.config, args)
        if not state.is_world_process_zero or not (directory / REPORT_NAME).is_file():
            return
        try:
            share(directory)
        except (OSError, ValueError) as error:
            logger.warning("The files in %s are pushed as they are: %s", directory, error)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, create_pr: bool = False, license: str | None = None
    ) -> str:
        """
        Pushes the merged adapter to the Hub as a repository of its own, see [`push_mashup`].

        Args:
            repo_id (`str`):
                Repository to push to, `org/name`; created where it is missing.
            private (`bool`, *optional*):
                Whether a new repository is private; by default as its owner's settings say.
            create_pr (`bool`, *optional*, defaults to `False`):
                Open a pull request instead of committing to the main branch.
            license (`str`, *optional*):
                License for the model card; by default the one that the sources share.

        Returns:
            `str`: Address of the repository, or of the pull request. Only the main process pushes; on the others, the
            name of the repository.

        Raises:
            ValueError: Training has not begun, or there is no merged adapter to push.
        """
        if self._directory is None:
            raise ValueError("There is no mashup to push yet: it is made when training begins.")
        return push_mashup(self._directory, repo_id, private, create_pr, license=license)

    def _tell(self, state: TrainerState, model: nn.Module) -> None:
        if self.report.decision != "scratch" and not self.report.dry_run and hasattr(model, "add_model_tags"):
            model.add_model_tags(["mashup"])
            # TRL's cards have the tags of the trainer instead of those of the model.
            if hasattr(self._trainer, "_tag_names"):
                self._trainer._tag_names = [*self._trainer._tag_names, "mashup"]
        if self._trainer is None:
            # Only a Trainer knows its trackers.
            state.log_history.append({**self.report.logs(), "step": state.global_step})
        else:
            self._trainer.log(self.report.logs())
            if state.is_world_process_zero:
                self._show_picture(self._trainer.callback_handler.callbacks, state.global_step)

    def _show_picture(self, reporters: Sequence[Any], step: int) -> None:
        """Gives the picture of the ranking to the Trainer's trackers that take one."""
        picture = self._directory / PICTURE_NAME
        if not picture.is_file():
            return
        for reporter in reporters:
            try:
                # As transformers names them: TensorBoard's writer, and the modules of W&B and Trackio.
                if writer := getattr(reporter, "tb_writer", None):
                    from matplotlib.image import imread

                    writer.add_image("mashup/ranking", imread(picture), step, dataformats="HWC")
                for name in ("_wandb", "_trackio"):
                    if module := getattr(reporter, name, None):
                        module.log({"mashup/ranking": module.Image(str(picture))})
            except Exception as error:
                # A tracker of another version must not stop a run for a picture.
                logger.warning("%s did not take the picture of the ranking: %s", type(reporter).__name__, error)

    def _check_directory(self, directory: Path) -> None:
        for spec in self.specs:
            if os.path.realpath(os.path.expanduser(spec)) == os.path.realpath(directory):
                raise StorageError(
                    f"The mashup would be written to the candidate {spec} and replace it. Set `report_dir` to a "
                    "directory of its own."
                )
        prepare(directory)

    def _is_due(self, state: TrainerState, model: nn.Module) -> bool:
        if state.global_step > 0:
            logger.info("Training resumes at step %d; the mashup is skipped.", state.global_step)
            return False
        if self._done is not None and self._done() is model:
            logger.info("This model already had its mashup; it is skipped.")
            return False
        return True


def _refuse_idle(model: nn.Module, optimizer: Any) -> None:
    # ZeRO-3 gives its optimizer parameters for the time of a step only.
    groups = [] if is_sharded(model) else getattr(optimizer, "param_groups", [])
    # A layerwise optimizer stands for one for each parameter, and holds none itself.
    groups = [] if hasattr(getattr(optimizer, "optimizer", optimizer), "optimizer_dict") else groups
    if groups and not any(parameter.requires_grad for group in groups for parameter in group["params"]):
        raise ValueError(
            "The optimizer holds none of the parameters that are trained, so nothing would be: expected those that "
            "require a gradient. Make it after the adapter is added, or let the Trainer make it."
        )
