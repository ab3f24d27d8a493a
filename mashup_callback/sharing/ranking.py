"""The picture of a mashup: what each candidate's loss was, and what the start was compared with."""

import logging
from pathlib import Path

from ..report import MashupReport
from . import style


logger = logging.getLogger(__name__)

_BARS = 30
_LONGEST = 36


def plot_ranking(report: MashupReport, path: Path) -> bool:
    """Draws the losses of the best candidates, and below those on the held-out rows; False where it cannot."""
    pairs = zip(report.candidates, report.short_names(), strict=True)
    rows = [(row, name) for row, name in pairs if row.loss is not None][:_BARS]
    if not rows:
        return False
    compared = [
        (name, loss, color)
        for name, loss, color in (
            ("fresh initialization", report.base_loss, style.GRAY),
            ("best single candidate", report.single_loss, style.ORANGE),
            ("merge", report.merged_loss, style.BLUE),
        )
        if loss is not None
    ]
    heights = (len(rows) + 1, len(compared) + 1) if compared else (1,)
    try:
        figure, axes = style.new_figure(_finding(report), (8, 1.7 + 0.28 * sum(heights)), heights)
    except ImportError:
        logger.info('No picture of the ranking: matplotlib is missing (the extra "plot" has it).')
        return False
    chosen = style.ORANGE if report.decision == "single" else style.BLUE
    style.bars(
        axes[0],
        [name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for _, name in rows],
        [row.loss for row, _ in rows],
        [chosen if row.weight else style.PALE for row, _ in rows],
        [f"{row.loss:.3f}" + (f", weight {row.weight:.2f}" if row.weight else "") for row, _ in rows],
    )
    left_out = len([row for row in report.candidates if row.loss is not None]) - len(rows)
    axes[0].set_xlabel("candidates: loss on the rows that each was scored on" + f"; {left_out} more" * bool(left_out))
    if compared:
        names, losses, colors = zip(*compared, strict=True)
        style.bars(axes[1], names, losses, colors, [f"{loss:.3f}" for loss in losses])
        axes[1].set_xlabel("starts: loss on the held-out rows (lower is better)")
    style.save(figure, path)
    return True


def _finding(report: MashupReport) -> str:
    chosen = sum(bool(row.weight) for row in report.candidates)
    start, loss = {
        "merged": (f"a merge of {chosen} candidates", report.merged_loss),
        "single": ("one candidate alone", report.single_loss),
    }.get(report.decision, ("scratch", None))
    if loss is None or report.base_loss is None:
        return f"Training starts from {start}"
    return f"Training starts from {start}: held-out loss {loss:.3f} instead of {report.base_loss:.3f}"
