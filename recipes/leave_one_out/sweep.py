"""Every arm at its own best learning rate: the choice on validation rows, and the runs that it still needs."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import pandas as pd

from . import tables
from .protocol import SWEPT, Job, make_job
from .worlds import World
from .worlds.base import Budget


FACTOR, MOST_RATES = 2.0, 6


def averages(runs: pd.DataFrame, budget: Budget) -> dict[str, dict[float, float]]:
    """
    Returns the mean validation value of every tuned arm and learning rate, where the whole sweep of that rate is done.
    """
    part = runs[(runs["settings"] == "{}") & runs["seed"].isin(budget.sweep_seeds) & runs["task"].isin(budget.tasks)]
    part = part[part["arm"].isin(budget.tuned) & part["validation"].notna()]
    found: dict[str, dict[float, float]] = {}
    for (arm, rate), values in part.groupby(["arm", "learning_rate"])["validation"]:
        if len(values) == len(budget.tasks) * len(budget.sweep_seeds):
            found.setdefault(arm, {})[rate] = values.mean()
    return found


def best(values: Mapping[float, float], higher_is_better: bool) -> float:
    """Returns the learning rate with the best mean."""
    return (max if higher_is_better else min)(values, key=values.__getitem__)


def beyond(values: Mapping[float, float], higher_is_better: bool) -> float | None:
    """Returns the learning rate to try next where the best one is at the edge of the sweep; None where it is not."""
    if not values or len(values) >= MOST_RATES:
        return None
    rate = best(values, higher_is_better)
    return {max(values): rate * FACTOR, min(values): rate / FACTOR}.get(rate)


def chosen(runs: pd.DataFrame, budget: Budget, higher_is_better: bool) -> dict[str, float]:
    """Returns the learning rate of every arm in the main table: its own best, else the budget's."""
    found = averages(runs, budget)
    own = {arm: best(values, higher_is_better) for arm, values in found.items()}
    return {arm: own.get(arm, budget.learning_rate) for arm in budget.arms}


def plan_tuned(world: World, results: Sequence[dict], model: str | None = None) -> Iterator[Job]:
    """
    Yields what the results so far ask for: a wider sweep where an arm's best learning rate is at the edge, else the
    arm at its own rate on every seed. Scratch and mashup get the same sweep.
    """
    budget, up = world.budget, world.higher_is_better
    found = averages(tables.runs(tables.curves(results), up), budget)
    pair = [arm for arm in SWEPT if arm in found]
    for group in (pair, *([arm] for arm in found if arm not in SWEPT)):
        wider = sorted({rate for arm in group if (rate := beyond(found[arm], up))})
        rates = {arm: wider or [best(found[arm], up)] for arm in group}
        for seed, task, arm in product(budget.sweep_seeds if wider else budget.seeds, budget.tasks, group):
            yield from (make_job(world, task, arm, seed, rate, {}, model) for rate in rates[arm])
