"""Who goes on in a race, what it costs, and that it ends as an exhaustive search does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mashup_callback import MashupReport, score_candidates
from mashup_callback.candidates import Candidate
from mashup_callback.report import RaceRound
from mashup_callback.scoring import RowLosses, SampleRows, Score, joined, race_rounds, round_sizes, survivors
from mashup_callback.selection import select
from tests.tiny import llama, rows, save_scaled_adapter, sft_trainer


def row_losses(values):
    loss = torch.as_tensor(values, dtype=torch.float64)
    return RowLosses(loss, torch.zeros_like(loss), torch.ones_like(loss))


def kept(values, keep=1, runs=None):
    values = {name: row_losses(losses) for name, losses in values.items()}
    return set(survivors(values, runs or {name: name for name in values}, keep))


def race(losses, keep=3, runs=None):
    """Replays a race on losses of all candidates on all rows; returns the survivors by loss and the rows seen."""
    alive, seen, start = list(range(len(losses))), 0, 0
    sizes = round_sizes(losses.shape[1], "racing")
    runs = runs or {index: str(index) for index in alive}
    for size in sizes:
        seen += len(alive) * (size - start)
        start = size
        if size != sizes[-1]:
            alive = survivors({index: row_losses(losses[index, :size]) for index in alive}, runs, keep)
    return sorted(alive, key=lambda index: losses[index].mean()), seen


def test_rounds_double_up_to_all_rows():
    assert round_sizes(128, "racing") == [16, 32, 64, 128]
    assert round_sizes(128, "exhaustive") == [128]
    assert round_sizes(20, "racing") == [20]
    assert round_sizes(100, "racing") == [25, 50, 100]


def test_paired_differences_tell_candidates_apart():
    noise = torch.linspace(-1, 1, 16)
    values = {
        "best": noise + 1.0,
        # As good as the best within the noise of the difference, which is large.
        "tied": -noise + 1.1,
        # Only a little worse, but so on every row: paired, that is certain.
        "surely worse": noise + 1.1,
    }
    assert kept(values) == {"best", "tied"}
    assert kept(values, keep=3) == set(values)


def test_ties_are_bounded_by_a_third_of_many():
    noise = torch.randn(90, 16, generator=torch.Generator().manual_seed(0))
    tied = {index: losses - losses.mean() for index, losses in enumerate(noise)}
    assert len(kept(tied)) == 30
    assert len(kept({index: tied[index] for index in range(14)})) == 10
    assert len(kept({index: tied[index] for index in range(14)}, keep=12)) == 12


def test_race_keeps_enough_runs():
    values = {index: [float(index)] * 4 for index in range(8)}
    runs = {index: "same" if index < 6 else str(index) for index in values}
    assert kept(values, 1, runs) == {0}
    # Further checkpoints of a run that are better than the last run that is needed stay as well.
    assert kept(values, 2, runs) == set(range(7))
    assert kept(values, 5, runs) == set(values)


@given(
    losses=st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=40),
    keep=st.integers(1, 5),
)
def test_survivors_always_hold_the_best(losses, keep):
    order = sorted(range(len(losses)), key=lambda index: row_losses(losses[index]).mean_loss)
    found = survivors({index: row_losses(loss) for index, loss in enumerate(losses)}, {i: str(i) for i in order}, keep)
    assert set(order[:keep]) <= set(found)
    assert len(found) <= max(keep, 10, -(-len(losses) // 3))


def test_64_candidates_that_tie_cost_no_more_than_promised():
    noise = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    _, seen = race(noise)
    assert 0.2 < seen / noise.numel() <= 0.29


def test_the_best_of_64_win():
    """Rows of very different difficulty, candidates a little apart: nearly always as if all had seen all rows."""
    same = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        quality = torch.cat([torch.tensor([0.0, 0.15, 0.3]), 0.6 + 2 * torch.rand(61, generator=generator)])
        difficulty = 2 * torch.randn(128, generator=generator)
        losses = quality[:, None] + difficulty + 0.4 * torch.randn(64, 128, generator=generator)
        best, seen = race(losses)
        same += best[:3] == losses.mean(1).argsort()[:3].tolist()
        assert seen / losses.numel() <= 0.3
    assert same >= 19


def test_joined_parts():
    both = joined([row_losses([1.0, 2.0]), row_losses([3.0])])
    assert both.loss.tolist() == [1.0, 2.0, 3.0] and both.mean_loss == 2.0


def test_rounds_of_a_race_are_read_off_its_scores():
    def score(count, status):
        return Score(Candidate(name=f"{count} {status}"), status, losses=row_losses([0.0] * count) if count else None)

    scores = [
        *(score(128, "scored") for _ in range(2)),
        *(score(64, "eliminated") for _ in range(3)),
        *(score(16, "eliminated") for _ in range(4)),
        score(0, "rejected"),
    ]
    assert race_rounds(scores) == (RaceRound(16, 9, 5), RaceRound(32, 5, 5), RaceRound(64, 5, 2), RaceRound(128, 2, 2))
    report = MashupReport("merged", "because", rounds=race_rounds(scores))
    assert MashupReport.from_json(report.to_json()) == report


@pytest.fixture(scope="module")
def field(tmp_path_factory, library):
    directory = tmp_path_factory.mktemp("field")
    loader = sft_trainer(directory / "out", train_rows=rows("text", 128)).get_train_dataloader()
    factors = (1.0, 0.9, 0.5, 0.1, -0.2, -0.5, -1.0, -1.5, -2.0, -2.5)
    paths = [
        save_scaled_adapter(directory / f"{source}-{factor}", library / source, factor)
        for source in ("trained-0", "trained-1")
        for factor in factors
    ]
    return paths, SampleRows([loader.dataset[i] for i in range(128)], loader.collate_fn, 16)


def test_a_race_ends_like_an_exhaustive_search_and_twice_the_same(field):
    paths, data = field
    everything = score_candidates(llama(), paths, data, search="exhaustive")
    races = [score_candidates(llama(), paths, data, search="racing", keep=3) for _ in range(2)]
    names = [[score.candidate.name for score in select(scores, 3).scores] for scores in (everything, *races)]
    assert names[0] == names[1] == names[2]
    assert [(s.candidate.name, s.loss, s.status, s.rows) for s in races[0]] == [
        (s.candidate.name, s.loss, s.status, s.rows) for s in races[1]
    ]
    seen = sum(score.rows for score in races[0])
    assert seen <= 0.4 * len(paths) * len(data)
    assert [step.rows for step in race_rounds(races[0])] == [16, 32, 64, 128]
    assert race_rounds(races[0])[0].entered == len(paths)
