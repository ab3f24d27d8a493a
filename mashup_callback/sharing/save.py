"""What a mashup leaves on disk: the report, the picture and the merge, all at once or not at all."""

import logging
from pathlib import Path

from ..formats.adapter_writer import save_adapter
from ..guard import Start
from ..model.layers import Trainee
from ..model.tensors import FullTrainee
from ..report import FAILED_NAME, REPORT_NAME, MashupReport
from ..storage import replacing
from .card import CARD_NAME, mashup_card
from .plot import PLOT_NAME, plot_ranking
from .recipe import MERGEKIT_NAME, mergekit_config


logger = logging.getLogger(__name__)


def publish(directory: Path, report: MashupReport, start: Start | None, trainee: Trainee | FullTrainee) -> Path:
    """
    Writes a mashup's directory: `report.json`, `ranking.png` and, where something was merged, a PEFT adapter with its
    model card and mergekit's configuration of the merge.

    Everything is written to a temporary directory beside it, which then takes its place; nothing reads half of it.

    Args:
        directory (`Path`):
            Where to; an earlier mashup there is replaced.
        report (`MashupReport`):
            The report.
        start (`Start`, *optional*):
            What was merged, saved in the trainee's ranks and precision.
        trainee (`Trainee` or `FullTrainee`):
            The adapter that is trained, or the weights: then what is written is a full model.
    """
    with replacing(directory) as draft:
        if start is not None:
            _save(draft, report, start, trainee)
        plot_ranking(report, draft / PLOT_NAME)
        report.save(draft / REPORT_NAME)
    return directory


def publish_failure(directory: Path, report: MashupReport, trainee: Trainee | FullTrainee) -> None:
    """Writes the report of a mashup that failed; beside an earlier merge, which is kept, as `failed.json`."""
    if not any(directory.glob("*.safetensors")):
        publish(directory, report, None, trainee)
        return
    logger.warning("The earlier merge in %s is kept; the report of this failure is %s there.", directory, FAILED_NAME)
    report.save(directory / FAILED_NAME)


def _save(draft: Path, report: MashupReport, start: Start, trainee: Trainee | FullTrainee) -> None:
    if isinstance(trainee, FullTrainee):
        if not start.merged.owned:
            # A candidate that is not used stays where it is; one that is used was copied.
            return
        start.merged.move_to(draft)
        if start.merged.recipe:
            (draft / MERGEKIT_NAME).write_text(start.merged.recipe, encoding="utf-8")
        (draft / CARD_NAME).write_text(mashup_card(report), encoding="utf-8")
        return
    task_type = getattr(trainee.config.task_type, "value", trainee.config.task_type)
    save_adapter(draft, start.fitted.factors, base_model=report.base_model, task_type=task_type)
    describe(draft, report, task_type)


def describe(directory: Path, report: MashupReport, task_type: str | None = None) -> None:
    """Writes the model card of a merged adapter and mergekit's configuration of the merge."""
    (directory / CARD_NAME).write_text(mashup_card(report, task_type), encoding="utf-8")
    recipe = mergekit_config(report)
    if recipe is not None:
        (directory / MERGEKIT_NAME).write_text(recipe, encoding="utf-8")
