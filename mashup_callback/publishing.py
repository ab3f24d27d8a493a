"""What a mashup leaves on disk: the report, the picture and the merge, all at once or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .adapter_writer import save_adapter
from .card import CARD_NAME, mashup_card
from .errors import UsageError
from .guard import Start
from .layers import Trainee
from .mergekit_config import MERGEKIT_NAME, mergekit_config
from .model_tensors import FullTrainee
from .plot import PLOT_NAME, plot_ranking
from .report import REPORT_NAME, MashupReport


def publish(directory: Path, report: MashupReport, start: Start | None, trainee: Trainee | FullTrainee) -> Path:
    """
    Writes a mashup's directory: `report.json`, `ranking.png` and, where something was merged, a PEFT adapter with its
    model card and mergekit's configuration of the merge.

    Everything is written to a temporary directory beside it, which then takes its place; nothing reads half of it.

    Args:
        directory (`Path`):
            Where to; replaced if it exists.
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


def _save(draft: Path, report: MashupReport, start: Start, trainee: Trainee | FullTrainee) -> None:
    if isinstance(trainee, FullTrainee):
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


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Gives an empty directory to write to, which takes the place of `directory` unless the block raises."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield draft
        draft.chmod(0o755)
        _take_the_place_of(directory, draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_foreign(directory: Path) -> None:
    """
    Refuses a directory whose place a mashup would take although it holds something else.

    Args:
        directory (`Path`):
            Where a mashup is going to be written.

    Raises:
        UsageError: The directory is not empty and no earlier mashup's.
    """
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    foreign = names and REPORT_NAME not in names
    if directory.is_file() or foreign or any(name.startswith("checkpoint-") for name in names):
        raise UsageError(
            f"`report_dir` {directory} holds {min(names, default='a file')} and would be replaced. Choose a directory "
            "of its own, such as <output_dir>/mashup."
        )


def _take_the_place_of(directory: Path, draft: Path) -> None:
    old = draft.with_name(draft.name + "-old")
    if directory.exists():
        directory.rename(old)
    draft.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
