"""What a run of the recipe leaves: CSV, Markdown and PNG, and one HTML page that holds them all."""

import base64
import html
import math
from pathlib import Path

import pandas as pd

from . import figures, sweep, tables
from .worlds import World
from .worlds.base import EVERY_ARM


TITLES = {
    "summary": "Results: mean over tasks, standard deviation over seeds",
    "shared_rate": "Results at one shared learning rate, on the seeds of the sweep",
    "above_chance": "Scratch's accuracy above chance: only tasks that count are in the tables above",
    "by_task": "Results for each task",
    "wall_clock": "At equal wall-clock: the value when scratch ends, overhead charged",
    "curves": "Learning curves",
    "parity": "Steps and wall-clock to parity",
    "selection_rows": "Accuracy against number of selection rows",
    "method_ranks": "Mean rank of merge method and k",
    "learning_rates": "Learning-rate sensitivity",
    "regret": "Selection regret: the best subset in hindsight against the mashup's",
}
NOTES = (
    "Parity: the first step at which the arm reaches the final value of scratch on the same task and seed, on "
    "straight lines between evaluations every {every} steps; a run that never reaches it counts as 100%, so a mean "
    "with a + is a lower bound. Scratch's own row says how early its own curve first touches its final value. "
    "Seconds include finding, downloading, scoring all candidates, merging and swapping (for the oracle: its search; "
    "for EVA and LoRA-GA: the initialisation) and leave out evaluations. {rates} The oracle "
    "searches every candidate alone and every triple of the best four, each trained for "
    "{oracle} steps and compared on the test rows. The metric is {metric} ({direction} is better)."
)

RATES = {
    False: "All arms use learning rate {rate:g} in the main table.",
    True: "In the main table each arm has the learning rate that is best for it on validation rows, by the mean over "
    "tasks and the seeds of the sweep, and is compared with scratch at scratch's own best.",
}


def write_outputs(results: list[dict], world: World, directory: Path) -> list[Path]:
    """
    Writes `results.csv`, a CSV for each table, the figures, `report.md` and `report.html`.

    Args:
        results (`list[dict]`):
            Results of jobs.
        world (`World`):
            The world they are from.
        directory (`Path`):
            Where to write.

    Raises:
        ValueError: There are no results.
    """
    points = tables.curves(results)
    if points.empty:
        raise ValueError(f"No results in {directory}: run without --report-only first.")
    directory.mkdir(parents=True, exist_ok=True)
    made = make_tables(points, world)
    points.round(5).to_csv(directory / "results.csv", index=False)
    for name, table in made.items():
        table.round(6).to_csv(directory / f"{name}.csv", index=False)
    rates = dict(zip(made["summary"]["arm"], made["summary"]["learning_rate"], strict=True))
    drawn = figures.draw_all(tables.main_runs(points, rates), made, world.metric, directory)
    (directory / "report.md").write_text(markdown(made, drawn, world), encoding="utf-8")
    (directory / "report.html").write_text(page(made, drawn, world), encoding="utf-8")
    return [directory / name for name in ("results.csv", "summary.csv", "report.md", "report.html")]


def make_tables(points: pd.DataFrame, world: World) -> dict[str, pd.DataFrame]:
    """Makes every table from the tidy one."""
    up, budget = world.higher_is_better, world.budget
    runs = tables.runs(points, up)
    main = tables.runs(tables.main_runs(points, sweep.chosen(runs, budget, up)), up, same_rate=False)
    main = main[main["seed"].isin(budget.seeds)]
    learned = tables.above_chance(main)
    by_task = tables.by_task(main, EVERY_ARM)
    shared = tables.main_runs(runs, budget.learning_rate)
    shared = shared[shared["seed"].isin(budget.sweep_seeds if budget.tuned else ())]
    # What scratch does not learn within the budget says nothing about its start.
    unlearned = learned["task"][~learned["counts"]]
    main, shared = (table[~table["task"].isin(unlearned)] for table in (main, shared))
    return {
        "summary": tables.summary(main, EVERY_ARM),
        "shared_rate": tables.summary(shared, EVERY_ARM),
        "above_chance": learned,
        "by_task": by_task.drop(columns="equal_seconds"),
        "wall_clock": by_task.pivot(index="task", columns="arm", values="equal_seconds").reset_index(),
        "learning_rates": tables.learning_rates(runs, budget.sweep_seeds),
        "selection_rows": tables.selection_rows(runs),
        "method_ranks": tables.method_ranks(runs, up),
        "regret": tables.regret(main, up),
    }


def shown(name: str, made: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A table as a reader wants it: rounded, parity in percent with a plus where a run never reached it."""
    table = made[name].copy()
    if name in ("summary", "by_task"):
        reached = made["by_task"].groupby("arm")["reached"].mean() if name == "summary" else None
        share = table["arm"].map(reached) if name == "summary" else table.pop("reached")
        for column in ("steps_to_parity", "seconds_to_parity"):
            table[column] = [percent(value, part) for value, part in zip(table[column], share, strict=True)]
    return table.map(lambda value: number(value) if isinstance(value, float) else value)


def percent(parity: float, reached: float) -> str:
    """Parity in percent, with a plus where not every run reached it."""
    return f"{parity:.0%}" + "+" * (reached < 1)


def number(value: float) -> str:
    """Four significant digits; nothing for a missing value."""
    return "" if math.isnan(value) else f"{value:.4g}"


def notes(world: World) -> str:
    """How the numbers are meant."""
    budget = world.budget
    return NOTES.format(
        every=budget.eval_every,
        rates=RATES[bool(budget.tuned)].format(rate=budget.learning_rate),
        oracle=budget.oracle_steps,
        metric=world.metric,
        direction="higher" if world.higher_is_better else "lower",
    )


def markdown(made: dict[str, pd.DataFrame], drawn: dict[str, Path], world: World) -> str:
    """The report as Markdown, beside its figures."""
    parts = [f"# Leave one out: {world.name}", notes(world)]
    for name, title in TITLES.items():
        if (name in made and len(made[name])) or name in drawn:
            parts.append(f"## {title}")
        if name in drawn:
            parts.append(f"![{title}]({drawn[name].name})")
        if name in made and len(made[name]):
            parts.append(pipe_table(shown(name, made)))
    return "\n\n".join(parts) + "\n"


def pipe_table(table: pd.DataFrame) -> str:
    """A data frame as a Markdown table."""
    rows = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    rows += [[str(cell).replace("|", "\\|") for cell in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(made: dict[str, pd.DataFrame], drawn: dict[str, Path], world: World) -> str:
    """The report as one HTML page with everything inside."""
    parts = [f"<h1>Leave one out: {html.escape(world.name)}</h1>", f"<p>{html.escape(notes(world))}</p>"]
    for name, title in TITLES.items():
        if (name in made and len(made[name])) or name in drawn:
            parts.append(f"<h2>{html.escape(title)}</h2>")
        if name in drawn:
            data = base64.b64encode(drawn[name].read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
        if name in made and len(made[name]):
            parts.append(shown(name, made).to_html(index=False, border=0))
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        "th,td{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}"
        "th:first-child,td:first-child{text-align:left}img{max-width:100%}"
    )
    head = f'<meta charset="utf-8"><title>Leave one out: {html.escape(world.name)}</title><style>{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
