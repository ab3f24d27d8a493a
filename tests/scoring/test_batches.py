"""How the rows of a sample are made into batches."""

import torch
from torch.utils.data import DataLoader

from mashup_callback.scoring import SampleRows, as_rows, draw_sample
from tests.scoring.samples import DATA, drawn, padded


def lengths(rows):
    return [len(indices) for indices, _ in rows.batches()]


def test_batches_hold_every_row_once_longest_first():
    data = [{"input_ids": [0] * length} for length in (3, 1, 4, 1, 5, 9, 2, 6)]
    rows = SampleRows(data, lambda rows: {"longest": max(len(row["input_ids"]) for row in rows)}, 3)
    groups = [(indices, batch["longest"]) for indices, batch in rows.batches()]
    assert sorted(index for indices, _ in groups for index in indices) == list(range(8))
    assert [longest for _, longest in groups] == [9, 4, 1]


def test_halving_while_batches_run():
    rows = SampleRows(DATA[:7], padded, 4)
    seen = []
    for indices, _ in rows.batches():
        if len(indices) > 2:
            assert rows.halve(indices)
            continue
        seen.append(indices)
    assert seen == [[0, 1], [2, 3], [4, 5], [6]]
    assert [indices for indices, _ in rows.batches()] == seen
    assert not rows.halve(seen[-1])


def test_ready_batches_are_rows():
    batches = [{"input_ids": torch.ones(2, 3)}, {"input_ids": torch.ones(1, 2)}]
    assert [batch for _, batch in as_rows(batches).batches()] == batches


def test_short_rows_with_labels_fill_a_batch_up_to_the_budget(monkeypatch):
    monkeypatch.setattr("mashup_callback.scoring.sample.CPU_TOKENS", 60)
    data = [{"input_ids": [i] * (20 if i < 4 else 10), "labels": [1] * (20 if i < 4 else 10)} for i in range(24)]
    rows = drawn(data, 24, guard_rows=data[:1]).selection
    # Three rows of 20 tokens, then the last of these with as many short ones, padded to its length.
    assert lengths(rows) == [3, 3, 6, 6, 6]
    assert lengths(drawn(data, 24, 8, guard_rows=data[:1]).selection) == [8, 8, 8]
    assert lengths(drawn(data, 24, guard_rows=data[:1], labeled=False).selection) == [2] * 12
    assert lengths(rows.part(0, 12)) == lengths(SampleRows(rows.rows[:12], padded, 2, 60))


def test_shares_of_filled_batches_are_as_many_on_each_process():
    data = [{"input_ids": [i, 1], "labels": [1, 1]} for i in range(9)]
    shares = [SampleRows(data, padded, 2, 1000).share(rank, 2) for rank in range(2)]
    assert [lengths(share) for share in shares] == [[5], [4]]
    assert sorted(i for share in shares for indices, _ in share.batches() for i in indices) == list(range(9))


def test_shares_for_a_loss_that_all_compute_have_batches_of_one_size():
    shares = [SampleRows(DATA[:15], padded, 4).share(rank, 2, even=True) for rank in range(2)]
    assert [lengths(share) for share in shares] == [[4, 4], [4, 4]]
    assert {i for share in shares for indices, _ in share.batches() for i in indices} == set(range(15))


def test_rows_that_are_batches_already_are_collated_one_at_a_time():
    data = [{"input_ids": torch.full((3, 4), i), "labels": torch.full((3, 4), i)} for i in range(8)]
    sample = draw_sample(DataLoader(data, batch_size=None), 8, batch_size=4)
    batches = [batch["labels"] for half in (sample.selection, sample.held_out) for _, batch in half.batches()]
    assert sorted(int(batch.unique()) for batch in batches) == list(range(8))
    assert all(batch.shape == (3, 4) for batch in batches)


def test_rows_of_several_data_sets_are_never_mixed():
    kinds = [{"a": 1, "b": 2}, {"a": 1, "b": 2, "score": 0.5}, {"a": 1, "b": 2, "dataset_name": "other"}]
    data = [kinds[index % 3] if index < 12 else kinds[0] for index in range(20)]

    def collated(rows):
        assert all(row == rows[0] for row in rows)
        return {"rows": rows}

    rows = SampleRows(data, collated, 8)
    assert lengths(rows) == [8, 4, 4, 4]
    shares = [SampleRows(data, collated, 8).share(rank, 2, even=True) for rank in range(2)]
    assert [lengths(share) for share in shares] == [[8, 8], [8, 8]]
    assert {i for share in shares for indices, _ in share.batches() for i in indices} == set(range(20))


def test_rows_that_are_packed_into_one_keep_the_batch_size():
    data = [{"input_ids": [i, 1], "labels": [1, 1]} for i in range(16)]

    def packed(rows):
        return {name: torch.tensor([[x for row in rows for x in row[name]]]) for name in ("input_ids", "labels")}

    sample = drawn(data, 16, collate=packed)
    assert lengths(sample.selection) == lengths(sample.held_out) == [2] * 4
