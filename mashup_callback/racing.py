"""Successive halving: which candidates are worth more rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .losses import RowLosses


FIRST_RUNG = 16


def rung_sizes(rows: int, search: str) -> list[int]:
    """
    Returns the nested sample sizes at which candidates are compared; the last one is all `rows`.

    Args:
        rows (`int`):
            Selection rows.
        search (`str`):
            `"exhaustive"` has one rung, `"racing"` starts with 16 rows and doubles.
    """
    sizes = [rows]
    while search == "racing" and sizes[0] >= 2 * FIRST_RUNG:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def survivors(values: Mapping[Any, RowLosses], runs: Mapping[Any, str], keep: int, metric: Any) -> list[Any]:
    """
    Returns the keys of the candidates that go on: the better half, at least `keep` different runs, and whatever the
    sample cannot tell from the last of these.

    A candidate is told from the last one kept when its paired difference, row by row, exceeds the standard error of
    that difference.

    Args:
        values (`Mapping`):
            Losses of each candidate on the same rows.
        runs (`Mapping`):
            The training run of each candidate; one run enters a merge once.
        keep (`int`):
            Runs that must remain.
        metric (`str` or `Callable`):
            What ranks the candidates.
    """
    order = sorted(values, key=lambda key: ranking_value(values[key], metric))
    kept, seen = [], set()
    for key in order:
        if len(kept) >= math.ceil(len(order) / 2) and len(seen) >= keep:
            break
        kept.append(key)
        seen.add(runs[key])
    if not kept:
        return []
    last = values[kept[-1]]
    return kept + [key for key in order[len(kept) :] if not _worse(values[key], last, metric)]


def ranking_value(losses: RowLosses, metric: Any) -> float:
    """Returns what candidates are ranked by, lower is better: the loss, or minus the token accuracy."""
    return -losses.accuracy if metric == "token_accuracy" else losses.mean_loss


def _worse(losses: RowLosses, other: RowLosses, metric: Any) -> bool:
    sums = (-losses.correct, -other.correct) if metric == "token_accuracy" else (losses.loss, other.loss)
    difference = sums[0] - sums[1]
    if len(difference) < 2:
        return bool(difference.sum() > 0)
    return bool(difference.mean() > difference.std() / math.sqrt(len(difference)))


def joined(parts: Sequence[RowLosses]) -> RowLosses:
    """Returns the losses on several parts of a sample as one."""
    return RowLosses(*(torch.cat([getattr(part, name) for part in parts]) for name in ("loss", "correct", "tokens")))
