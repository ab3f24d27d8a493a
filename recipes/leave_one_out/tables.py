"""The tables: pure functions from the results of jobs to data frames."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from .protocol import LIBRARY


FINAL = ["validation", "accuracy", "chance", "rows"]
ABOVE_CHANCE = 3.0
DETAILS = ["decision", "chosen", "overhead", *FINAL]
RUN = ["world", "task", "arm", "seed", "learning_rate", "steps", "settings"]
PARITY = ["steps_to_parity", "seconds_to_parity"]
SUMMARY = ["arm", "learning_rate", "mean", "std", "gain", "gain_se", "worse", *PARITY, "tasks", "seeds"]


def curves(results: Iterable[dict]) -> pd.DataFrame:
    """
    Returns the tidy table: one row for each point of each curve.

    `seconds` counts from the start of the run, the arm's `overhead` included and evaluations left out.
    """
    rows = [
        {name: job[name] for name in RUN[:-1]}
        | {"settings": json.dumps(dict(job["settings"]), sort_keys=True)}
        | {"decision": result["decision"], "chosen": ";".join(result["chosen"]), "overhead": result["overhead"]}
        | {name: result.get("final", {}).get(name, math.nan) for name in FINAL}
        | {"step": point["step"], "seconds": result["overhead"] + point["seconds"], "value": point["value"]}
        for result in results
        for job in [result["job"]]
        for point in result["curve"]
        if job["arm"] != LIBRARY
    ]
    return pd.DataFrame(rows, columns=[*RUN, *DETAILS, "step", "seconds", "value"])


def first_reach(x: Sequence[float], values: Sequence[float], goal: float, higher_is_better: bool = True) -> float:
    """
    Returns where a curve first reaches a goal, on straight lines between its points; infinity if it never does.
    """
    sign = 1 if higher_is_better else -1
    for index, value in enumerate(values):
        if sign * value >= sign * goal:
            if index == 0:
                return float(x[0])
            share = (goal - values[index - 1]) / (value - values[index - 1])
            return x[index - 1] + share * (x[index] - x[index - 1])
    return math.inf


def runs(points: pd.DataFrame, higher_is_better: bool = True, same_rate: bool = True) -> pd.DataFrame:
    """
    Returns one row for each run, compared with scratch on the same task, seed and learning rate.

    Columns: `final` (value at the last step); `gain` (over scratch's final value, positive is better);
    `steps_to_parity` and `seconds_to_parity` (where the curve first reaches scratch's final value, as a fraction of
    scratch's steps and seconds; the overhead counts; `inf` if never); `seconds` (of scratch: its own, else the run's);
    `equal_seconds` (value at the moment at which scratch ends, NaN where the overhead alone takes longer).
    """
    groups = {key: group.sort_values("step") for key, group in points.groupby(RUN, sort=False)}
    compared = [RUN.index(name) for name in ("task", "seed", *["learning_rate"] * same_rate)]
    scratch = {tuple(key[i] for i in compared): group for key, group in groups.items() if key[2] == "scratch"}
    rows = []
    for key, group in groups.items():
        row = dict(zip(RUN, key, strict=True)) | group.iloc[0][DETAILS].to_dict()
        row |= {"final": group["value"].iloc[-1], "seconds": group["seconds"].iloc[-1]}
        reference = scratch.get(tuple(key[i] for i in compared))
        rows.append(row | ({} if reference is None else _compare(group, reference, higher_is_better)))
    return pd.DataFrame(rows, columns=[*RUN, *DETAILS, "final", "seconds", "gain", *PARITY, "equal_seconds"])


def _compare(run: pd.DataFrame, scratch: pd.DataFrame, higher_is_better: bool) -> dict[str, float]:
    goal, steps, seconds = (scratch[name].iloc[-1] for name in ("value", "step", "seconds"))
    values, clock = run["value"].tolist(), run["seconds"].tolist()
    difference = values[-1] - goal
    return {
        "gain": difference if higher_is_better else -difference,
        "steps_to_parity": first_reach(run["step"].tolist(), values, goal, higher_is_better) / steps,
        "seconds_to_parity": first_reach(clock, values, goal, higher_is_better) / seconds,
        "equal_seconds": np.interp(seconds, clock, values, left=math.nan),
    }


def counted(table: pd.DataFrame) -> pd.DataFrame:
    """Counts what was never reached as 100%: a lower bound, marked with a plus where it is shown."""
    reached = table["steps_to_parity"] < math.inf
    return table.assign(reached=reached, **{name: table[name].replace(math.inf, 1.0) for name in PARITY})


def main_runs(table: pd.DataFrame, learning_rate: float | Mapping[str, float]) -> pd.DataFrame:
    """The runs, or points, of the main table: the arms as they are, at one learning rate or each at its own."""
    rate = table["arm"].map(learning_rate) if isinstance(learning_rate, Mapping) else learning_rate
    return table[(table["learning_rate"] == rate) & (table["settings"] == "{}")]


def summary(table: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """
    Returns one row for each arm: the mean over tasks of the final value, with its standard deviation over seeds; the
    mean gain over scratch, with its standard error over tasks and seeds, and the number of runs that end worse than
    scratch.
    """
    grouped, seeds = counted(table).assign(worse=table["gain"] < 0).groupby("arm"), table.groupby(["arm", "seed"])
    columns = {"learning_rate": ("learning_rate", "first"), "gain": ("gain", "mean"), "gain_se": ("gain", "sem")}
    columns |= {"worse": ("worse", "sum")} | {name: (name, "mean") for name in PARITY}
    made = grouped.agg(**columns, tasks=("task", "nunique"), seeds=("seed", "nunique"))
    values = seeds["final"].mean().groupby("arm")
    made = made.assign(mean=values.mean(), std=values.std())
    return made.reindex([arm for arm in arms if arm in made.index]).reset_index()[SUMMARY]


def by_task(table: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Returns one row for each task and arm, means over seeds; `reached` is the share of runs that reach parity."""
    columns = {name: (name, "mean") for name in ("gain", *PARITY, "reached")} | {"gain_se": ("gain", "sem")}
    columns |= {"equal_seconds": ("equal_seconds", "mean"), "overhead": ("overhead", "mean")}
    grouped = counted(table).groupby(["task", "arm"]).agg(mean=("final", "mean"), std=("final", "std"), **columns)
    order = {arm: index for index, arm in enumerate(arms)}
    return grouped.reset_index().sort_values(["task", "arm"], key=lambda c: c.map(order) if c.name == "arm" else c)


def learning_rates(table: pd.DataFrame, seeds: Sequence[int]) -> pd.DataFrame:
    """
    Returns the final value, and that on validation rows where the world has them, by learning rate, arm and task, of
    the arms with a sweep.
    """
    part = table[(table["settings"] == "{}") & table["seed"].isin(seeds)]
    part = part[part.groupby("arm")["learning_rate"].transform("nunique") > 1]
    means = part.groupby(["learning_rate", "arm", "task"])[["final", "validation"]].mean().reset_index()
    return means if means["validation"].notna().any() else means.drop(columns="validation")


def selection_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the final value of mashup against the number of rows that select (half of `sample_size`)."""
    sizes = table["settings"].str.extract(r'^{"sample_size": (\d+)}$', expand=False).dropna().astype(int)
    part = table.loc[sizes.index].assign(rows=sizes // 2)
    return part.groupby(["rows", "task"])["final"].mean().reset_index()


def method_ranks(table: pd.DataFrame, higher_is_better: bool = True) -> pd.DataFrame:
    """Returns the mean over tasks and seeds of the rank (1 is best) and of the value of each method and k."""
    found = table["settings"].str.extract(r'"merge_method": "(?P<method>\w+)", "top_k": (?P<k>\d+)').dropna()
    part = table.join(found.astype({"k": int}), how="inner")
    ranks = part.groupby(["task", "seed"])["final"].rank(ascending=not higher_is_better)
    grouped = part.assign(rank=ranks).groupby(["method", "k"])
    return grouped.agg(mean_rank=("rank", "mean"), mean=("final", "mean")).reset_index()


def above_chance(table: pd.DataFrame) -> pd.DataFrame:
    """
    Returns by how many standard errors of a guess scratch's accuracy ends above chance, mean over seeds, by task, and
    whether the task `counts`; no rows where a world has no chance.
    """
    part = table[(table["arm"] == "scratch") & table["chance"].notna()]
    means = part.groupby("task")[["accuracy", "chance", "rows"]].mean().reset_index()
    error = (means["chance"] * (1 - means["chance"]) / means["rows"]) ** 0.5
    means["standard_errors"] = (means["accuracy"] - means["chance"]) / error
    return means.assign(counts=means["standard_errors"] >= ABOVE_CHANCE)


def regret(table: pd.DataFrame, higher_is_better: bool = True) -> pd.DataFrame:
    """Returns by how much the oracle's subset ends better than the mashup's (negative: worse), by task and seed."""
    part = table[table["arm"].isin(["mashup", "oracle"])]
    wide = part.pivot_table(index=["task", "seed"], columns="arm", values=["final", "chosen"], aggfunc="first")
    if wide.empty or not {("final", "mashup"), ("final", "oracle")} <= set(wide.columns):
        return pd.DataFrame(columns=["task", "seed", "mashup", "oracle", "regret", "mashup_chosen", "oracle_chosen"])
    wide = wide.dropna()
    difference = wide["final"]["oracle"] - wide["final"]["mashup"]
    columns = {"mashup": wide["final"]["mashup"], "oracle": wide["final"]["oracle"]}
    columns |= {"regret": difference if higher_is_better else -difference}
    columns |= {f"{arm}_chosen": wide["chosen"][arm] for arm in ("mashup", "oracle")}
    return pd.DataFrame(columns).reset_index()
