"""Who is merged, and with which weight."""

import math

import pytest
import torch

from mashup_callback.candidates import Candidate
from mashup_callback.scoring import RowLosses, Score
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
    assert names(select(scores, "auto")) == ["a-2", "b", "c"]
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
