"""The sample grows with the run, and what the report says of its cost is what was computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mashup_callback import MashupCallback
from mashup_callback.scoring import Sample, SampleRows, affordable_size, doublings, shortened
from tests.scoring.test_racing import race
from tests.tiny import rows, sft_trainer


@given(
    trained=st.integers(1, 10**6),
    candidates=st.integers(1, 200),
    judged=st.integers(3, 8),
    keep=st.integers(1, 5),
)
def test_a_search_in_which_all_tie_stays_within_five_percent(trained, candidates, judged, keep):
    size = affordable_size(trained, candidates, judged, "racing", keep)
    _, seen = race(torch.zeros(candidates, size // 2), keep)
    assert size == 32 or (32 < size <= 512 and seen + judged * size // 2 <= 0.05 * 2 * trained)
    assert affordable_size(2 * trained, candidates, judged, "racing", keep) >= size


@pytest.mark.parametrize(
    ("steps", "batch", "candidates", "expected"),
    [(40, 4, 7, 32), (500, 32, 7, 320), (500, 32, 64, 70), (10**5, 32, 64, 512)],
)
def test_short_runs_have_small_samples(steps, batch, candidates, expected):
    assert affordable_size(steps * batch, candidates, 3, "racing", 3) == expected


@pytest.mark.parametrize(("length", "expected"), [(8, 16), (100, 11), (300, 8)])
def test_short_runs_take_few_long_rows(length, expected):
    """16 rows in each half, of which those are kept that have 1,024 labels, all but the first two tokens of a row."""
    labels = [[-100, -100] + [1] * (length - 2)] * 16

    def collate(rows):
        return {"labels": torch.tensor(rows)}

    halves = SampleRows(labels, collate, 4), SampleRows(labels, collate, 4)
    sample = shortened(Sample(*halves), 16, True)
    assert (len(sample.selection), len(sample.held_out)) == (expected, expected)
    sample = shortened(Sample(*halves), 16, True, held_out=False)
    assert (len(sample.selection), len(sample.held_out)) == (expected, 16)


@given(rows=st.integers(8, 256), trained=st.integers(1, 10**5), passes=st.integers(0, 10**4))
def test_an_undecided_guard_stays_within_its_bounds(rows, trained, passes):
    def allowed(size):
        long, short = passes + 3 * size <= 0.05 * 2 * trained, size <= 64 and 3 * size <= 0.2 * 2 * trained
        return size <= 256 and (long or short)

    sizes = doublings(rows, trained, passes)
    assert sizes == [rows * 2**power for power in range(1, len(sizes) + 1)]
    assert all(map(allowed, sizes)) and not allowed(2 * [rows, *sizes][-1])


def judged(library, directory, **settings):
    """The report of a run of 120 steps of 4 rows, and how many rows its embedding saw before training began."""
    callback = MashupCallback(str(library / "trained-0"), **settings)
    trainer = sft_trainer(directory, train_rows=rows("text", 200), callbacks=[callback], max_steps=120)
    trainer.state.max_steps, counted = 120, []
    handle = trainer.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: counted.append(len(args[0]))
    )
    loader = trainer.get_train_dataloader()
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, train_dataloader=loader)
    handle.remove()
    return callback.report, sum(counted)


def test_a_guard_that_cannot_decide_looks_at_more_rows(library, tmp_path):
    """With the margins between the certainties of 16, 32 and 64 held-out rows that samples of a set size give."""
    fixed = {rows: judged(library, tmp_path / f"{rows}", sample_size=2 * rows)[0] for rows in (16, 32, 64)}
    certain = {rows: report.gain / report.gain_se for rows, report in fixed.items()}
    assert certain[16] < certain[32] < certain[64]
    margins = {16: certain[16] / 2, 32: (certain[16] + certain[32]) / 2, 64: (certain[32] + certain[64]) / 2}
    for rows_seen, margin in (*margins.items(), (64, 1e6)):
        report, counted = judged(library, tmp_path / f"auto-{margin}", guard_margin=margin)
        assert report.sample["held_out"] == rows_seen
        assert report.decision == ("scratch" if margin == 1e6 else "single")
        for name in ("base_loss", "single_loss", "gain", "gain_se"):
            assert getattr(report, name) == pytest.approx(getattr(fixed[rows_seen], name), rel=1e-5), name
        # A candidate alone stands for the merge too, on the rows that are added; the swap is checked on one batch.
        assert 0 <= counted + rows_seen - 16 - report.share * 2 * 480 <= 16 * (margin != 1e6)
    for settings in ({"guard": False}, {"guard_dataset": None, "sample_size": 32}):
        assert judged(library, tmp_path / f"{settings}", **settings)[0].sample["held_out"] == 16


@pytest.mark.parametrize(("batch_size", "largest"), [(None, 16), (2, 2)])
def test_a_batch_size_that_is_set_is_a_bound(library, tmp_path, batch_size, largest):
    callback = MashupCallback([str(library / "trained-0"), str(library / "trained-1")], batch_size=batch_size)
    trainer = sft_trainer(tmp_path, train_rows=rows("text", 64), callbacks=[callback], max_steps=1)
    sizes = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda *args: sizes.append(len(args[1][0])))
    trainer.train()
    # The last is the step of training.
    assert max(sizes[:-1]) == largest


def test_the_share_is_that_of_the_rows_that_went_through_the_model(library, tmp_path):
    """The rows that the embedding sees before training begins, counted by a hook."""
    callback = MashupCallback([str(library / "trained-0"), str(library / "trained-1")], guard_margin=0.0)
    trainer = sft_trainer(tmp_path, train_rows=rows("text", 64), callbacks=[callback], max_steps=8)
    counted = []
    embedding = trainer.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: counted.append(len(args[0])))
    callback.on_train_begin(
        trainer.args,
        trainer.state,
        trainer.control,
        model=trainer.model,
        train_dataloader=trainer.get_train_dataloader(),
    )
    handle.remove()
    report = callback.report
    assert report.sample["selection"] + report.sample["held_out"] == 32
    trained = max(1, trainer.state.max_steps) * trainer.args.train_batch_size
    # The check after the swap takes one more batch.
    swapped = sum(counted) - report.share * 2 * trained
    assert 0 < swapped <= 16
