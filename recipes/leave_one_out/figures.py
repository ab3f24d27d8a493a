"""The figures, in kind those of the paper, each with its finding as the title; drawn from the tables."""

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from mashup_callback.sharing import style
from mashup_callback.sharing.style import BLUE, GRAY, GREEN, INK, ORANGE, PALE, PURPLE, RED, SKY


# The two that matter are solid; no two arms share color and line.
LOOKS = {
    "scratch": (GRAY, "-"),
    "mashup": (BLUE, "-"),
    "paper": (SKY, "--"),
    "best_single": (ORANGE, "--"),
    "random": (INK, ":"),
    "all": (GREEN, "--"),
    "eva": (PURPLE, "-."),
    "lora_ga": (RED, "-."),
    "oracle": (INK, "--"),
    "format": (RED, ":"),
}
PARITY = {"steps_to_parity": {"color": BLUE}}
PARITY |= {"seconds_to_parity": {"facecolor": "white", "edgecolor": ORANGE, "hatch": "////"}}


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, str, str]]) -> None:
    """Writes the name of each line to the right of the axes, at its last value or as near as the others let it."""
    low, high = axes.get_ylim()
    placed = spread([(value - low) / (high - low) for _, value, _, _ in ends], 0.054)
    over = max(0.0, max(placed) - 1)
    for (name, _, color, line), height in zip(ends, placed, strict=True):
        place = [height - over] * 2
        axes.plot((1.01, 1.06), place, line, color=color, linewidth=2, transform=axes.transAxes, clip_on=False)
        axes.annotate(name, (1.07, place[0]), xycoords="axes fraction", va="center", fontsize=9, color=color)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves places apart until any two have the gap between them, and none further than it must."""
    order = sorted(range(len(places)), key=places.__getitem__)
    found = [places[index] for index in order]
    for _ in range(200):
        for lower in range(len(found) - 1):
            missing = gap - (found[lower + 1] - found[lower])
            if missing > 0:
                found[lower] -= missing / 2
                found[lower + 1] += missing / 2
    return [found[order.index(index)] for index in range(len(places))]


def canvas(title: str, height: float = 4) -> Axes:
    """The axes of a figure whose title is the finding."""
    return style.new_figure(title, (7.5, height))[1][0]


def curves(points: pd.DataFrame, metric: str, up: bool) -> Axes:
    """Mean over tasks and seeds of every arm's curve; the band is that of seeds, for scratch and mashup."""
    seeds = points.groupby(["arm", "seed", "step"], sort=False)["value"].mean().reset_index()
    last = seeds[seeds["step"] == seeds["step"].max()].groupby("arm")["value"].mean()
    arms = list(dict.fromkeys(points["arm"]))
    ends = ", ".join(f"{arm} {last[arm]:.3f}" for arm in ("scratch", "mashup") if arm in last)
    axes = canvas(f"Where training ends, test {metric}: {ends}")
    for arm in arms:
        (color, line), solid = LOOKS[arm], LOOKS[arm][1] == "-"
        grouped = seeds[seeds["arm"] == arm].groupby("step")["value"]
        mean = grouped.mean()
        axes.plot(mean.index, mean, line, color=color, linewidth=2.5 if solid else 1.3, zorder=2 + solid)
        if solid:
            axes.fill_between(mean.index, grouped.min(), grouped.max(), color=color, alpha=0.2, linewidth=0)
    label_ends(axes, [(arm, last[arm], *LOOKS[arm]) for arm in arms])
    axes.set(xlabel="training step (bands: lowest and highest seed)", ylabel=f"test {metric}, mean over tasks")
    return axes


def gains(table: pd.DataFrame, metric: str, up: bool) -> Axes:
    """Gain over scratch of every arm: a dot for each task, a bar for their mean."""
    arms, own = list(dict.fromkeys(table["arm"])), table[table["arm"] == "mashup"]["gain"]
    text = f"{(own > 0).sum()} of {len(own)} tasks, by {own.mean():.3g} on average"
    title = "Gain over scratch" if own.empty else f"mashup ends better than scratch on {text}"
    axes = canvas(title, 1.6 + 0.42 * len(arms))
    for place, arm in enumerate(arms):
        values, color = table[table["arm"] == arm]["gain"], LOOKS[arm][0]
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.45, markersize=5)
        axes.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=color, linewidth=3)
        axes.annotate(f"{values.mean():+.3g}", (1.01, place), xycoords=("axes fraction", "data"), va="center")
    axes.axvline(0, color=GRAY, linewidth=1)
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set_xlabel(f"gain over scratch in final test {metric} (right is better): tasks (dots), mean (bar)")
    return axes


def parity(table: pd.DataFrame, metric: str, up: bool) -> Axes:
    """Steps and wall-clock to parity of every arm but scratch, which is 100% by definition."""
    shares = 100 * table.set_index("arm")[list(PARITY)]
    most, own = min(160.0, shares.max().max()), shares.reindex(["mashup"]).iloc[0]
    found = f"mashup reaches scratch's final value after {own.iloc[0]:.0f}% of its steps, {own.iloc[1]:.0f}% of its "
    title = "Steps and seconds to scratch's final value" if own.isna().any() else f"{found}seconds"
    axes = canvas(title, 1.6 + 0.42 * len(table))
    for offset, (name, look) in zip((-0.19, 0.19), PARITY.items(), strict=True):
        lengths = shares[name].clip(upper=most)
        bars = axes.barh([place + offset for place in range(len(table))], lengths, 0.34, **look)
        unit = name.split("_")[0]
        notes = [f"{v:.0f}%{'+' * (r < 1)} of the {unit}" for v, r in zip(shares[name], table["reached"], strict=True)]
        axes.bar_label(bars, notes, padding=4, fontsize=8)
    axes.axvline(100, color=GRAY, linestyle=":")
    axes.set_yticks(range(len(table)), table["arm"])
    axes.set_xlim(0, 1.3 * most)
    axes.set_xlabel("% of scratch's until its final value is reached; +: not every run does (these count as 100%)")
    axes.invert_yaxis()
    return axes


def selection_rows(table: pd.DataFrame, metric: str, up: bool) -> Axes:
    """Final value against the number of rows that select; the band is that of tasks."""
    grouped = table.groupby("rows")["final"]
    mean = grouped.mean()
    axes = canvas(f"mashup with {', '.join(f'{rows} rows: {value:.3g}' for rows, value in mean.items())}")
    axes.plot(mean.index, mean, "o-", color=BLUE)
    axes.fill_between(mean.index, grouped.min(), grouped.max(), color=BLUE, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(mean.index, mean.index)
    axes.set(xlabel="rows that select (band: lowest and highest task)", ylabel=f"final test {metric}")
    return axes


def method_ranks(table: pd.DataFrame, metric: str, up: bool) -> Axes:
    """Mean rank of every merge method and k."""
    grid, best = table.pivot(index="method", columns="k", values="mean_rank"), table.loc[table["mean_rank"].idxmin()]
    axes = canvas(f"Best mean rank: {best['method']}, k = {best['k']} ({best['mean_rank']:.1f} of {len(table)})")
    axes.imshow(grid, cmap="Blues_r", aspect="auto", vmin=1, vmax=len(table))
    axes.set_xticks(range(len(grid.columns)), grid.columns)
    axes.set_yticks(range(len(grid)), grid.index)
    for row, column in product(range(len(grid)), range(len(grid.columns))):
        value = grid.iloc[row, column]
        color = "white" if value < 1 + 0.45 * (len(table) - 1) else INK
        text = "" if math.isnan(value) else f"{value:.1f}"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=12)
    axes.set_xlabel(f"k, number of merged candidates; mean rank over tasks, from 1 (best) to {len(table)}")
    return axes


def learning_rates(table: pd.DataFrame, metric: str, up: bool) -> Axes:
    """Final value of the arms with a sweep, at every learning rate."""
    means = {arm: group.groupby("learning_rate")["final"].mean() for arm, group in table.groupby("arm", sort=False)}
    best = {arm: mean.idxmax() if up else mean.idxmin() for arm, mean in means.items()}
    found = (f"{arm} {means[arm][rate]:.3g} at {rate:g}" for arm, rate in best.items())
    axes = canvas(f"Each at its best rate: {', '.join(found)}")
    for arm, mean in means.items():
        axes.plot(mean.index, mean, marker="o", color=LOOKS[arm][0], linestyle=LOOKS[arm][1], linewidth=2)
    label_ends(axes, [(arm, mean.iloc[-1], *LOOKS[arm]) for arm, mean in means.items()])
    axes.set_xscale("log")
    rates = sorted(table["learning_rate"].unique())
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set(xlabel="learning rate", ylabel=f"final test {metric}, mean over tasks")
    return axes


def regret(table: pd.DataFrame, metric: str, up: bool) -> Axes:
    """How much better the best subset in hindsight ends, by task; below zero where the mashup's ends better."""
    mean = table.groupby("task")["regret"].mean().sort_values()
    axes = canvas(f"The best subset in hindsight ends {mean.mean():.3g} better than mashup's on average")
    bars = axes.barh(mean.index, mean, color=[PALE if value < 0 else BLUE for value in mean])
    axes.bar_label(bars, fmt="{:+.3g}", padding=4)
    axes.margins(x=0.15)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel(
        f"final test {metric}: the oracle better than mashup by\n"
        "(below 0: it compares after a short training, so its choice can end worse)"
    )
    return axes


FIGURES = (curves, gains, parity, selection_rows, method_ranks, learning_rates, regret)


def draw_all(made: dict[str, pd.DataFrame], metric: str, up: bool, directory: Path) -> dict[str, Path]:
    """Draws every figure whose table has rows; that of `curves` has the points."""
    reached = made["summary"]["arm"].map(made["by_task"].groupby("arm")["reached"].mean())
    others = {"gains": made["by_task"], "parity": made["summary"].assign(reached=reached)}
    data = {**made, **{name: table[table["arm"] != "scratch"] for name, table in others.items()}}
    return {
        draw.__name__: style.save(draw(data[draw.__name__], metric, up).figure, directory / f"{draw.__name__}.png")
        for draw in FIGURES
        if len(data[draw.__name__])
    }
