"""The sample is the Trainer's own rows, disjoint and reproducible, and drawing it leaves no trace."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from mashup_callback.scoring.sample import Rows, as_rows, draw_sample


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"input_ids": [i]} for i in range(1000)])


def identity(rows):
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def numbers(rows):
    return [row["input_ids"][0] for row in rows.rows]


DATA = [{"input_ids": [i]} for i in range(100)]


def test_halves_are_disjoint_and_reproducible():
    loader = DataLoader(DATA, batch_size=4, collate_fn=identity, shuffle=True)
    before = torch.get_rng_state()
    first, second = draw_sample(loader, 40, batch_size=8, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert len(first) == len(second) == 20
    assert len(set(numbers(first)) | set(numbers(second))) == 40
    again, _ = draw_sample(loader, 40, batch_size=8, seed=1)
    other, _ = draw_sample(loader, 40, batch_size=8, seed=2)
    assert numbers(first) == numbers(again) != numbers(other)


def test_stream_gives_its_first_rows():
    first, second = draw_sample(DataLoader(Stream(), collate_fn=identity), 10, batch_size=2)
    assert (numbers(first), numbers(second)) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])


def test_small_and_empty_data():
    first, second = draw_sample(DataLoader(DATA[:3], collate_fn=identity), 10, batch_size=2)
    assert sorted(numbers(first) + numbers(second)) == [0, 1, 2]
    with pytest.raises(ValueError, match="1 rows, expected at least 2"):
        draw_sample(DataLoader(DATA[:1], collate_fn=identity), 10, batch_size=2)


def test_guard_rows_replace_the_held_out_half():
    loader = DataLoader(DATA, collate_fn=identity)
    first, second = draw_sample(loader, 10, batch_size=2, guard_rows=[{"input_ids": [-1]}])
    assert len(first) == 10 and numbers(second) == [-1]
    with pytest.raises(ValueError, match="lack \\['input_ids'\\]"):
        draw_sample(loader, 10, batch_size=2, guard_rows=[{"text": "a"}])
    with pytest.raises(ValueError, match="empty"):
        draw_sample(loader, 10, batch_size=2, guard_rows=[])


def test_batches_hold_every_row_once_longest_first():
    data = [{"input_ids": [0] * length} for length in (3, 1, 4, 1, 5, 9, 2, 6)]
    rows = Rows(data, lambda rows: {"longest": max(len(row["input_ids"]) for row in rows)}, 3)
    groups = [(indices, batch["longest"]) for indices, batch in rows.batches()]
    assert sorted(index for indices, _ in groups for index in indices) == list(range(8))
    assert [longest for _, longest in groups] == [9, 4, 1]


def test_halving_while_batches_run():
    rows = Rows(DATA[:7], identity, 4)
    seen = []
    for indices, _ in rows.batches():
        if len(indices) > 2:
            assert rows.halve(indices)
            continue
        seen.append(indices)
    assert seen == [[0, 1], [2, 3], [4, 5], [6]]
    assert [indices for indices, _ in rows.batches()] == seen
    assert not rows.halve(seen[-1])


def test_random_collator_gives_every_candidate_the_same_batch():
    rows = Rows(DATA[:4], lambda rows: {"noise": torch.rand(3)}, 2)
    assert torch.equal(*(next(rows.batches())[1]["noise"] for _ in range(2)))


def test_fingerprint_tells_samples_apart():
    fingerprints = {Rows(DATA[i : i + 4], identity, 2).fingerprint() for i in (0, 1)}
    assert len(fingerprints) == 2
    assert Rows(DATA[:4], identity, 2).fingerprint() in fingerprints


def test_ready_batches_are_rows():
    batches = [{"input_ids": torch.ones(2, 3)}, {"input_ids": torch.ones(1, 2)}]
    assert [batch for _, batch in as_rows(batches).batches()] == batches


def test_reading_rows_leaves_the_random_numbers_alone():
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"input_ids": [index, int(torch.randint(9, (1,)))]}

    before = torch.get_rng_state()
    draw_sample(DataLoader(Augmented(), collate_fn=identity), 8, batch_size=2)
    assert torch.equal(before, torch.get_rng_state())


def test_guard_rows_lose_the_columns_that_training_rows_lack():
    loader = DataLoader(DATA, collate_fn=identity)
    _, held_out = draw_sample(loader, 10, batch_size=2, guard_rows=[{"input_ids": [-1], "text": "a"}])
    assert held_out.rows == [{"input_ids": [-1]}]


def test_fingerprint_of_batches_that_are_no_mappings():
    assert Rows(["a"], list).fingerprint() != Rows(["b"], list).fingerprint()
