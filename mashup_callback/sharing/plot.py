"""The ranking as a picture."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..report import MashupReport

logger = logging.getLogger(__name__)

PLOT_NAME = "ranking.png"
SHOWN = 30


def plot_ranking(report: "MashupReport", path: Path) -> bool:
    """
    Draws the candidates' losses with those of the fresh initialization and the merge, as a PNG.

    Args:
        report (`MashupReport`):
            What to draw; the best 30 candidates are shown.
        path (`Path`):
            Where to.

    Returns:
        `bool`: Whether it was drawn: there is a candidate with a loss, and matplotlib (the extra `plot`) is installed.
    """
    names = dict(zip(map(id, report.candidates), report.shared_names(), strict=True))
    rows = [row for row in report.candidates if row.loss is not None][:SHOWN]
    if not rows:
        return False
    try:
        # Figure, not pyplot: it needs no display and leaves the user's backend alone.
        from matplotlib.figure import Figure
    except ImportError:
        logger.info('No picture of the ranking: matplotlib is missing (pip install "mashup-callback[plot]").')
        return False
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colors = ["tab:blue" if row.weight else "lightgray" for row in rows]
    axes.barh([_label(names[id(row)]) for row in rows], [row.loss for row in rows], color=colors)
    axes.invert_yaxis()
    for loss, color, label in (
        (report.base_loss, "black", "fresh initialization, held out"),
        (report.single_loss, "tab:orange", "best single, held out"),
        (report.merged_loss, "tab:green", "merge, held out"),
    ):
        if loss is not None:
            axes.axvline(loss, color=color, linestyle="--", label=f"{label}: {loss:.3f}")
    axes.set(xlabel="loss per label token [nats]; bars: on the rows each was scored on, blue: merged")
    axes.set_title(f"mashup: {report.decision}", loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def _label(name: str) -> str:
    return name if len(name) <= 40 else "…" + name[-39:]
