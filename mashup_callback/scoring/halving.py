"""Successive halving: which candidates are worth more rows, and how many rows a run can afford."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..report import RaceRound
from .losses import RowLosses, sum_error
from .metrics import LOSS, Metric
from .score import Score


FIRST_ROUND = 16
# Of many candidates a third goes on; so few go on anyway, unless the sample already tells them apart.
REDUCTION, FEW = 3, 10
# A candidate counts as worse when its paired difference exceeds so many of its standard errors.
CERTAIN = 2.0
# Share of the run's own forward and backward work that scoring and guarding may take.
SHARE = 0.05
FEWEST, MOST = 32, 512
# Initializations that an undecided guard compares again, and up to how many rows it may cost a short run more. With 64
# rows, two standard errors are a quarter of what the differences of single rows vary by.
COMPARED, SURE, SHORT_SHARE = 3, 64, 0.2
# A forward pass and a backward pass, which costs at least as much.
PASSES_OF_A_TRAINED_ROW = 2


def round_sizes(rows: int, search: str) -> list[int]:
    """Returns how many rows have been seen after each round: all at once, or with `"racing"` 16, doubled up to all."""
    sizes = [rows]
    while search == "racing" and sizes[0] >= 2 * FIRST_ROUND:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def race_rounds(scores: Iterable[Score]) -> tuple[RaceRound, ...]:
    """Returns the rounds of the race that gave these scores, the first one first."""
    raced = [score for score in scores if score.rows]
    sizes = sorted({score.rows for score in raced})
    if len(sizes) > 1:
        # Where all went on, no score's rows tell of the round.
        sizes = sorted({*sizes, *round_sizes(sizes[-1], "racing")})
    entered = {size: [score for score in raced if score.rows >= size] for size in sizes}
    return tuple(
        RaceRound(size, len(among), sum(score.rows > size or score.status == "scored" for score in among))
        for size, among in entered.items()
    )


def survivors(values: Mapping[Any, RowLosses], runs: Mapping[Any, str], keep: int, metric: Metric = LOSS) -> list[Any]:
    """
    Returns the keys of the candidates that go on: the best of `keep` different runs, and those that the sample cannot
    tell from the last of these.

    Every candidate has seen the same rows, so two are told apart by their paired difference, row by row: one is worse
    where it exceeds two standard errors. Of many candidates that cannot be told apart, the best third goes on.
    At least `keep` runs go on, and successive halving (Jamieson and Talwalkar, arXiv 1502.07943) with the factor 3
    bounds the cost: 64 candidates that all tie take 29% of the forward passes of an exhaustive search on 128 rows.
    """
    order = sorted(values, key=lambda key: values[key].mean(metric.compared(values[key])))
    seen: dict[str, int] = {}
    for rank, key in enumerate(order):
        seen.setdefault(runs[key], rank)
    needed = sorted(seen.values())[:keep]
    if not needed:
        return []
    last, limit = values[order[needed[-1]]], max(FEW, math.ceil(len(order) / REDUCTION))
    near = [rank for rank, key in enumerate(order) if not _worse(values[key], last, metric)]
    return [order[rank] for rank in sorted({*needed, *near[:limit]})]


def _worse(losses: RowLosses, other: RowLosses, metric: Metric) -> bool:
    difference = metric.compared(losses) - metric.compared(other)
    error = sum_error(difference) if len(difference) > 1 else 0.0
    return bool(difference.sum() > CERTAIN * error)


def affordable_size(trained_rows: int, candidates: int, judged: int, search: str, keep: int) -> int:
    """
    Returns the largest even sample size, from 32 to 512, by which scoring and guarding stay within 5% of the run's
    own forward and backward work on `trained_rows`, or 32 where none does; `judged` initializations are guarded.
    """
    sizes = range(MOST, FEWEST, -2)
    costs = ((size, _most_passes(size // 2, candidates, search, keep) + judged * size // 2) for size in sizes)
    return next((size for size, cost in costs if share_of_run(cost, trained_rows) <= SHARE), FEWEST)


def doublings(rows: int, trained_rows: int, passes: int = 0) -> list[int]:
    """
    Returns with how many held-out rows, each twice the number before, a guard tries again that cannot decide on `rows`
    of them: as many as stay within 5% of the run together with the `passes` of scoring, or up to 64 within 20% alone.
    """
    sizes = []
    while (rows := 2 * rows) <= MOST // 2:
        cost = COMPARED * rows
        short = rows <= SURE and share_of_run(cost, trained_rows) <= SHORT_SHARE
        if not short and share_of_run(passes + cost, trained_rows) > SHARE:
            break
        sizes.append(rows)
    return sizes


def share_of_run(passes: float, trained_rows: int) -> float:
    """Returns forward passes of a row as a share of the run's own forward and backward work."""
    return passes / (PASSES_OF_A_TRAINED_ROW * trained_rows)


def _most_passes(rows: int, candidates: int, search: str, keep: int) -> int:
    """Returns the forward passes of a row in a search in which all candidates tie."""
    passes = seen = 0
    for size in round_sizes(rows, search):
        passes += candidates * (size - seen)
        candidates = min(candidates, max(keep, FEW, math.ceil(candidates / REDUCTION)))
        seen = size
    return passes
