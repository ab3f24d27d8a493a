"""The tables: pure functions from the results of jobs to data frames."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence

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


def value_at(x: Sequence[float], values: Sequence[float], where: float) -> float:
    """Returns a curve's value at a place, on straight lines between its points; NaN before the first of them."""
    if where < x[0]:
        return math.nan
    for index in range(1, len(x)):
        if where <= x[index]:
            share = (where - x[index - 1]) / (x[index] - x[index - 1])
            return values[index - 1] + share * (values[index] - values[index - 1])
    return values[-1]


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
        "equal_seconds": value_at(clock, values, seconds),
    }


def counted(parity: pd.Series, least: float = 1.0) -> pd.Series:
    """Counts what was never reached as 100%: a lower bound, marked with a plus where it is shown."""
    return parity.replace(math.inf, least)


def main_runs(table: pd.DataFrame, learning_rate: float | Mapping[str, float]) -> pd.DataFrame:
    """The runs, or points, of the main table: the arms as they are, at one learning rate or each at its own."""
    rate = table["arm"].map(learning_rate) if isinstance(learning_rate, Mapping) else learning_rate
    return table[(table["learning_rate"] == rate) & (table["settings"] == "{}")]


def summary(table: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """
    Returns one row for each arm: `mean` and `std` over seeds of the mean over tasks; means over tasks and seeds of
    `gain` and of both parities (never reached counts as 1); `gain_se`, the standard error of the mean of the paired
    differences; `worse`, the number of runs that end worse than scratch.
    """
    rows = []
    for arm in [arm for arm in arms if arm in set(table["arm"])]:
        part = table[table["arm"] == arm]
        seeds = part.groupby("seed")["final"].mean()
        values = {"arm": arm, "learning_rate": part["learning_rate"].iloc[0], "mean": seeds.mean(), "std": seeds.std()}
        values |= {"gain": part["gain"].mean(), "gain_se": part["gain"].sem(), "worse": (part["gain"] < 0).sum()}
        values |= {name: counted(part[name]).mean() for name in PARITY}
        rows.append(values | {"tasks": part["task"].nunique(), "seeds": len(seeds)})
    return pd.DataFrame(rows, columns=SUMMARY)


def by_task(table: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Returns one row for each task and arm, means over seeds; `reached` is the share of runs that reach parity."""
    table = table.assign(reached=table["steps_to_parity"] < math.inf)
    for name in PARITY:
        table = table.assign(**{name: counted(table[name])})
    columns = {name: (name, "mean") for name in ("gain", *PARITY, "reached")} | {"gain_se": ("gain", "sem")}
    columns |= {"equal_seconds": ("equal_seconds", "mean"), "overhead": ("overhead", "mean")}
    grouped = table.groupby(["task", "arm"]).agg(mean=("final", "mean"), std=("final", "std"), **columns)
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
    settings = table["settings"].map(json.loads)
    part = table[settings.map(lambda s: set(s) == {"sample_size"})].assign(rows=settings.map(_half_the_sample))
    return part.groupby(["rows", "task"])["final"].mean().reset_index()


def _half_the_sample(settings: dict) -> int:
    return settings.get("sample_size", 0) // 2


def method_ranks(table: pd.DataFrame, higher_is_better: bool = True) -> pd.DataFrame:
    """Returns the mean over tasks and seeds of the rank (1 is best) and of the value of each method and k."""
    settings = table["settings"].map(json.loads)
    chosen = settings.map(lambda s: "merge_method" in s)
    part = table[chosen].assign(method=settings.map(lambda s: s.get("merge_method")), k=settings.map(_k))
    ranks = part.groupby(["task", "seed"])["final"].rank(ascending=not higher_is_better)
    grouped = part.assign(rank=ranks).groupby(["method", "k"])
    return grouped.agg(mean_rank=("rank", "mean"), mean=("final", "mean")).reset_index()


def _k(settings: dict) -> int:
    return settings.get("top_k", 0)


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
