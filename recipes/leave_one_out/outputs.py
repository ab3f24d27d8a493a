"""What a run of the recipe leaves: CSV, Markdown and PNG, and one HTML page that holds them all."""

import base64
import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from . import figures, sweep, tables
from .worlds import World
from .worlds.base import EVERY_ARM


TITLES = {
    "summary": "Results: mean over tasks, standard deviation over seeds",
    "shared_rate": "Results at one shared learning rate, on the seeds of the sweep",
    "above_chance": "Scratch's accuracy above chance: only tasks that count are in the tables above",
    "gains": "Gain over scratch",
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
    "for EVA and LoRA-GA: the initialization) and leave out evaluations. {rates} The oracle "
    "searches every candidate alone and every triple of the best four, each trained for "
    "{oracle} steps and compared on the test rows. The metric is {metric} ({direction} is better)."
)

RATES = {
    False: "All arms use learning rate {rate:g} in the main table.",
    True: "In the main table each arm has the learning rate that is best for it on validation rows, by the mean over "
    "tasks and the seeds of the sweep, and is compared with scratch at scratch's own best.",
}
POINTS = "results.csv"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}"
)


def write_outputs(results: list[dict], world: World, directory: Path) -> list[Path]:
    """
    Writes `results.csv` (every point of every curve), the tables, the figures, `report.md` and `report.html`; without
    results, the figures and the report anew from the CSV files that an earlier run left.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = make_tables(tables.curves(results), world) if results else read_tables(directory, world)
    if not len(made["summary"]):
        raise ValueError(f"No results in {directory}: run without --report-only first.")
    if results:
        tables.curves(results).round(5).to_csv(directory / POINTS, index=False)
        for name in made.keys() - {"curves"}:
            made[name].round(6).to_csv(directory / f"{name}.csv", index=False)
    drawn = figures.draw_all(made, world.metric, world.higher_is_better, directory)
    (directory / "report.md").write_text(markdown(made, drawn, world), encoding="utf-8")
    (directory / "report.html").write_text(page(made, drawn, world), encoding="utf-8")
    return [directory / name for name in (POINTS, "summary.csv", "report.md", "report.html")]


def make_tables(points: pd.DataFrame, world: World) -> dict[str, pd.DataFrame]:
    """Makes every table from the tidy one."""
    up, budget = world.higher_is_better, world.budget
    runs = tables.runs(points, up)
    chosen = tables.main_runs(points, sweep.chosen(runs, budget, up))
    main = tables.runs(chosen, up, same_rate=False)
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
        "curves": chosen[chosen["seed"].isin(budget.seeds)],
        "learning_rates": tables.learning_rates(runs, budget.sweep_seeds),
        "selection_rows": tables.selection_rows(runs),
        "method_ranks": tables.method_ranks(runs, up),
        "regret": tables.regret(main, up),
    }


def read_tables(directory: Path, world: World) -> dict[str, pd.DataFrame]:
    """Makes the tables of the points that an earlier run wrote; without points, reads those tables that are there."""
    if (directory / POINTS).is_file():
        points = pd.read_csv(directory / POINTS).fillna({"decision": "", "chosen": ""})
        return make_tables(points, world)
    paths = {name: directory / f"{name}.csv" for name in TITLES}
    return {name: pd.read_csv(path) if path.is_file() else pd.DataFrame() for name, path in paths.items()}


def shown(name: str, made: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A table as a reader wants it: rounded, parity in percent with a plus where a run never reached it."""
    table = made[name].copy()
    if name in ("summary", "by_task"):
        reached = made["by_task"].groupby("arm")["reached"].mean()
        share = table["arm"].map(reached) if name == "summary" else table.pop("reached")
        for column in tables.PARITY:
            pairs = zip(table[column], share, strict=True)
            table[column] = [f"{value:.0%}" + "+" * (part < 1) for value, part in pairs]
    return table.map(lambda value: number(value) if isinstance(value, float) else value)


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


def sections(
    made: dict[str, pd.DataFrame], drawn: dict[str, Path]
) -> Iterator[tuple[str, Path | None, pd.DataFrame | None]]:
    """Yields title, picture and table of each section that has one of them; a curve's points are a picture only."""
    for name, title in TITLES.items():
        table = shown(name, made) if name != "curves" and len(made.get(name, ())) else None
        if table is not None or name in drawn:
            yield title, drawn.get(name), table


def markdown(made: dict[str, pd.DataFrame], drawn: dict[str, Path], world: World) -> str:
    """The report as Markdown, beside its figures."""
    parts = [f"# Leave one out: {world.name}", notes(world)]
    for title, picture, table in sections(made, drawn):
        parts.append(f"## {title}")
        parts += [f"![{title}]({picture.name})"] if picture else []
        parts += [] if table is None else [pipe_table(table)]
    return "\n\n".join(parts) + "\n"


def pipe_table(table: pd.DataFrame) -> str:
    """A data frame as a Markdown table."""
    rows = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    rows += [[str(cell).replace("|", "\\|") for cell in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(made: dict[str, pd.DataFrame], drawn: dict[str, Path], world: World) -> str:
    """The report as one HTML page with everything inside."""
    heading = f"Leave one out: {world.name}"
    parts = [f"<h1>{heading}</h1>", f"<p>{notes(world)}</p>"]
    for title, picture, table in sections(made, drawn):
        parts.append(f"<h2>{title}</h2>")
        if picture:
            data = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<img alt="{title}" src="data:image/png;base64,{data}">')
        parts += [] if table is None else [table.to_html(index=False, border=0)]
    head = f'<meta charset="utf-8"><title>{heading}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
