"""How the pictures look: Okabe and Ito's colors, which the color-blind can tell apart, and labels at the data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


INK, GRAY, PALE = "#1a1a1a", "#6b6b6b", "#c9c9c9"
BLUE, ORANGE, GREEN, RED, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"


def new_figure(title: str, size: tuple[float, float], heights: Sequence[float] = (1,)) -> tuple[Any, list[Any]]:
    """Returns a figure whose title is the finding, and its axes, one below the other."""
    # Figure, not pyplot: it needs no display and leaves the user's backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    rows = list(figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0])
    for axes in rows:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    return figure, rows


def save(figure: Any, path: Path) -> Path:
    """Writes the picture."""
    figure.savefig(path, dpi=110)
    return path


def bars(
    axes: Any, names: Sequence[str], values: Sequence[float], colors: Sequence[str], notes: Sequence[str]
) -> None:
    """Draws bars with a note at the end of each; what is far beyond the others is cut off, and says so."""
    ordered = sorted(values)
    most = max(0.0, min(ordered[-1], 3 * max(ordered[len(ordered) // 2], 0.0)))
    least = min(0.0, ordered[0])
    for place, (value, color, note) in enumerate(zip(values, colors, notes, strict=True)):
        cut = value > most > 0
        axes.barh(place, most if cut else value, color=color, height=0.72)
        axes.annotate(
            f"{note} (bar cut off)" if cut else note,
            (most if cut else max(value, 0.0), place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
    # A name is no formula.
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.invert_yaxis()
    # Room for the notes.
    axes.set_xlim(least, 1.35 * most or 1.0)
