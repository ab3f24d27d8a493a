"""How many rows a sample has, so that a mashup costs little against the training that it saves."""

import math
from dataclasses import replace

from .halving import FEW, REDUCTION, round_sizes
from .sample import Sample, SampleRows, label_counts


# Share of the run's own forward and backward work that scoring and guarding may take.
SHARE = 0.05
FEWEST, MOST = 32, 512
# Of long rows, fewer tell as much: so many in each half, if they have so many label tokens.
FEWEST_LONG, ENOUGH_TOKENS = 8, 1024
# A forward pass and a backward pass, which costs at least as much.
PASSES_OF_A_TRAINED_ROW = 2


def affordable_size(trained_rows: int, candidates: int, judged: int, search: str, keep: int) -> int:
    """
    Returns the largest even sample size, from 32 to 512, by which scoring and guarding stay within 5% of the run's
    own forward and backward work, or 32 where none does.

    Args:
        trained_rows (`int`): Rows of all optimizer steps on all processes.
        candidates (`int`): Candidates to score.
        judged (`int`): Initializations that are judged on the held-out half.
        search (`str`): `"racing"` or `"exhaustive"`.
        keep (`int`): Runs that racing must leave.
    """
    sizes = range(MOST, FEWEST, -2)
    costs = ((size, most_passes(size // 2, candidates, search, keep) + judged * size // 2) for size in sizes)
    return next((size for size, cost in costs if share_of_run(cost, trained_rows) <= SHARE), FEWEST)


def shortened(sample: Sample, held_out: bool = True) -> Sample:
    """Returns a sample that costs too much with as few long rows in each half as have 1,024 label tokens."""
    return replace(
        sample,
        selection=_enough(sample.selection),
        held_out=_enough(sample.held_out) if held_out else sample.held_out,
    )


def _enough(rows: SampleRows) -> SampleRows:
    counts: dict[int, int] = {}
    for indices, found in label_counts(rows):
        # A batch that is one row (padding-free) does not tell of its rows.
        if found is None or len(found) != len(indices):
            return rows
        counts.update(zip(indices, found, strict=True))
    total = 0
    for index in range(len(rows)):
        total += counts[index]
        if index + 1 >= FEWEST_LONG and total >= ENOUGH_TOKENS:
            return rows.part(0, index + 1)
    return rows


def share_of_run(passes: float, trained_rows: int) -> float:
    """Returns forward passes of a row as a share of the run's own forward and backward work."""
    return passes / (PASSES_OF_A_TRAINED_ROW * trained_rows)


def most_passes(rows: int, candidates: int, search: str, keep: int) -> int:
    """Returns the forward passes of a row in a search in which all candidates tie."""
    passes = seen = 0
    for size in round_sizes(rows, search):
        passes += candidates * (size - seen)
        candidates = min(candidates, max(keep, FEW, math.ceil(candidates / REDUCTION)))
        seen = size
    return passes
