"""Who is merged, with which weight, and who goes on in a race."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mashup_callback.candidates import Candidate
from mashup_callback.losses import RowLosses
from mashup_callback.racing import joined, rung_sizes, survivors
from mashup_callback.scoring import Score
from mashup_callback.selection import select


def row_losses(values):
    loss = torch.tensor(values, dtype=torch.float64)
    return RowLosses(loss, torch.zeros_like(loss), torch.ones_like(loss))


def score(name, loss, run=None, status="scored"):
    return Score(Candidate(name=name, run=run or name), status, losses=row_losses([loss]))


def names(selection):
    return [item.candidate.name for item in selection.scores]


def test_one_checkpoint_of_a_run():
    scores = [score("a-1", 1.0, "a"), score("a-2", 0.5, "a"), score("b", 2.0), score("c", 3.0)]
    assert names(select(scores, 2)) == ["a-2", "b"]
    assert names(select(scores, None)) == ["a-2", "b", "c"]
    assert names(select(scores, 9)) == ["a-2", "b", "c"]


def test_only_scored_candidates():
    assert names(select([score("a", 0.1, status="eliminated"), score("b", 2.0)], 2)) == ["b"]
    assert names(select([], 2)) == []


def test_weights():
    scores = [score("a", 1.0), score("b", 2.0)]
    assert select(scores, 2).weights == (0.5, 0.5)
    ratio = select(scores, 2, "softmax").weights
    assert ratio[0] / ratio[1] == pytest.approx(math.e) and sum(ratio) == pytest.approx(1)
    assert select(scores, 2, (3.0, 1.0)).weights == (3.0, 1.0)
    assert select(scores[:1], 2, (3.0, 1.0)).weights == (3.0,)
    assert select(scores, 2).first(1).weights == (1.0,)


def test_rungs_double_up_to_all_rows():
    assert rung_sizes(128, "racing") == [16, 32, 64, 128]
    assert rung_sizes(128, "exhaustive") == [128]
    assert rung_sizes(20, "racing") == [20]
    assert rung_sizes(100, "racing") == [25, 50, 100]


def test_the_worse_half_goes_and_ties_stay():
    noise = torch.linspace(-1, 1, 16)
    values = {
        "best": row_losses((noise + 1.0).tolist()),
        "good": row_losses((noise + 2.0).tolist()),
        # As good as the last one kept within the noise of the difference.
        "tied": row_losses((-noise + 2.0001).tolist()),
        # Only a little worse, but so on every row: paired, that is certain.
        "surely worse": row_losses((noise + 2.1).tolist()),
        "worst": row_losses((noise + 9.0).tolist()),
    }
    runs = {name: name for name in values}
    del values["worst"], runs["worst"]
    assert set(survivors(values, runs, 1, "loss")) == {"best", "good", "tied"}


def test_race_keeps_enough_runs():
    values = {index: row_losses([float(index)] * 4) for index in range(8)}
    runs = {index: "same" if index < 6 else str(index) for index in values}
    assert set(survivors(values, runs, 2, "loss")) == set(range(7))
    assert set(survivors(values, runs, 5, "loss")) == set(range(8))


@given(
    losses=st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=12),
    keep=st.integers(1, 5),
)
def test_survivors_always_hold_the_best(losses, keep):
    values = {index: row_losses(loss) for index, loss in enumerate(losses)}
    kept = survivors(values, {index: str(index) for index in values}, keep, "loss")
    assert len(kept) >= min(keep, len(values)) and len(kept) >= len(values) / 2
    best = min(values, key=lambda index: values[index].mean_loss)
    assert values[best].mean_loss == min(values[index].mean_loss for index in kept)


def test_joined_parts():
    both = joined([row_losses([1.0, 2.0]), row_losses([3.0])])
    assert both.loss.tolist() == [1.0, 2.0, 3.0] and both.mean_loss == 2.0
