"""What a mashup leaves on disk: the report, the picture and the merge, all at once or not at all."""

import shutil
import tempfile
from pathlib import Path

from .adapter_writer import save_adapter
from .guard import Start
from .layers import Trainee
from .plot import PLOT_NAME, plot_ranking
from .report import REPORT_NAME, MashupReport


def publish(directory: Path, report: MashupReport, start: Start | None, trainee: Trainee) -> Path:
    """
    Writes a mashup's directory: `report.json`, `ranking.png` and, where something was merged, a PEFT adapter.

    Everything is written to a temporary directory beside it, which then takes its place; nothing reads half of it.

    Args:
        directory (`Path`):
            Where to; replaced if it exists.
        report (`MashupReport`):
            The report.
        start (`Start`, *optional*):
            What was merged, saved in the trainee's ranks and precision.
        trainee (`Trainee`):
            The adapter that is trained.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        if start is not None:
            task_type = getattr(trainee.config.task_type, "value", trainee.config.task_type)
            save_adapter(draft, start.fitted.factors, base_model=report.base_model, task_type=task_type)
        plot_ranking(report, draft / PLOT_NAME)
        report.save(draft / REPORT_NAME)
        draft.chmod(0o755)
        _take_the_place_of(directory, draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return directory


def _take_the_place_of(directory: Path, draft: Path) -> None:
    old = draft.with_name(draft.name + "-old")
    if directory.exists():
        directory.rename(old)
    draft.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
