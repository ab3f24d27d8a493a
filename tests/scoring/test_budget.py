"""The sample grows with the run, and what the report says of its cost is what was computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mashup_callback import MashupCallback
from mashup_callback.scoring import Sample, SampleRows, affordable_size, shortened
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
    sample = shortened(Sample(*halves))
    assert (len(sample.selection), len(sample.held_out)) == (expected, expected)
    sample = shortened(Sample(*halves), held_out=False)
    assert (len(sample.selection), len(sample.held_out)) == (expected, 16)


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
