"""The figures, in kind those of the paper: curves, parity, selection rows, method and k, learning rates, regret."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .worlds.base import EVERY_ARM


COLOURS = dict(
    zip(
        EVERY_ARM,
        ("#555555", "#d62728", "#ff9896", "#1f77b4", "#7f7f7f", "#2ca02c", "#9467bd", "#c5b0d5", "#e3a008", "#8c564b"),
        strict=True,
    )
)


def draw(path: Path, plot: Callable[[Axes], None], size: tuple[float, float] = (6, 4)) -> Path:
    """Draws one figure with one pair of axes and saves it as PNG."""
    figure = Figure(figsize=size, layout="constrained")
    plot(figure.subplots())
    figure.savefig(path, dpi=120)
    return path


def mean_curves(points: pd.DataFrame, metric: str) -> Callable[[Axes], None]:
    """Mean over tasks and seeds of every arm's curve."""

    def plot(axes: Axes) -> None:
        for arm, group in points.groupby("arm", sort=False):
            mean = group.groupby("step")["value"].mean()
            axes.plot(mean.index, mean, label=arm, color=COLOURS[arm], linewidth=2.5 if arm == "mashup" else 1.2)
        axes.set(xlabel="training step", ylabel=f"test {metric},\nmean over tasks and seeds")
        axes.legend(fontsize=8)

    return plot


def parity(summary: pd.DataFrame) -> Callable[[Axes], None]:
    """Steps and wall-clock to parity of every arm."""

    def plot(axes: Axes) -> None:
        for offset, name in ((-0.2, "steps_to_parity"), (0.2, "seconds_to_parity")):
            axes.barh([i + offset for i in range(len(summary))], 100 * summary[name], 0.4, label=name.split("_")[0])
        axes.axvline(100, color="grey", linestyle=":")
        axes.set_yticks(range(len(summary)), summary["arm"])
        axes.set(xlabel="% of scratch's until its final value is reached (never: 100%)")
        # A search that costs several runs must not squeeze the others.
        axes.set_xlim(0, min(300, 105 * max(1, summary[["steps_to_parity", "seconds_to_parity"]].max().max())))
        axes.invert_yaxis()
        axes.legend()

    return plot


def selection_rows(table: pd.DataFrame, metric: str) -> Callable[[Axes], None]:
    """Final value against the number of rows that select."""

    def plot(axes: Axes) -> None:
        mean = table.groupby("rows")["final"].mean()
        axes.plot(mean.index, mean, marker="o", color=COLOURS["mashup"])
        axes.set_xscale("log", base=2)
        axes.set(xlabel="selection rows", ylabel=f"final test {metric},\nmean over tasks")

    return plot


def method_ranks(table: pd.DataFrame) -> Callable[[Axes], None]:
    """Mean rank of every merge method and k."""

    def plot(axes: Axes) -> None:
        grid = table.pivot(index="method", columns="k", values="mean_rank")
        axes.imshow(grid, cmap="viridis_r", aspect="auto")
        axes.set_xticks(range(len(grid.columns)), grid.columns)
        axes.set_yticks(range(len(grid)), grid.index)
        for row, column in ((r, c) for r in range(len(grid)) for c in range(len(grid.columns))):
            value = grid.iloc[row, column]
            axes.text(column, row, "" if math.isnan(value) else f"{value:.1f}", ha="center", va="center")
        axes.set(xlabel="k, number of merged candidates", title="mean rank over tasks (1 is best)")

    return plot


def learning_rates(table: pd.DataFrame, metric: str) -> Callable[[Axes], None]:
    """Final value of scratch and mashup at every learning rate."""

    def plot(axes: Axes) -> None:
        for arm, group in table.groupby("arm", sort=False):
            mean = group.groupby("learning_rate")["final"].mean()
            axes.plot(mean.index, mean, marker="o", label=arm, color=COLOURS[arm])
        axes.set_xscale("log")
        axes.set(xlabel="learning rate", ylabel=f"final test {metric},\nmean over tasks")
        axes.legend()

    return plot


def regret(table: pd.DataFrame, metric: str) -> Callable[[Axes], None]:
    """Selection regret of every task."""

    def plot(axes: Axes) -> None:
        mean = table.groupby("task")["regret"].mean()
        axes.barh(mean.index, mean, color=COLOURS["oracle"])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel=f"final test {metric}: oracle better than mashup by")

    return plot


def draw_all(points: pd.DataFrame, made: dict[str, pd.DataFrame], metric: str, directory: Path) -> dict[str, Path]:
    """Draws every figure that has data."""
    main = points[points["settings"] == json.dumps({})]
    plots = {
        "curves": (main, mean_curves(main, metric)),
        "parity": (made["summary"], parity(made["summary"])),
        "selection_rows": (made["selection_rows"], selection_rows(made["selection_rows"], metric)),
        "method_ranks": (made["method_ranks"], method_ranks(made["method_ranks"])),
        "learning_rates": (made["learning_rates"], learning_rates(made["learning_rates"], metric)),
        "regret": (made["regret"], regret(made["regret"], metric)),
    }
    return {name: draw(directory / f"{name}.png", plot) for name, (data, plot) in plots.items() if len(data)}
