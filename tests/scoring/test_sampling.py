"""Which rows the sample holds: the Trainer's own, in two disjoint halves, the same for the same seed."""

import resource

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from mashup_callback.scoring import SampleRows, draw_sample
from mashup_callback.scoring.sample import _drawn
from tests.scoring.samples import DATA, drawn, numbers, padded


def halves(sample):
    return sample.selection, sample.held_out


def test_halves_are_disjoint_and_reproducible():
    loader = DataLoader(DATA, batch_size=4, collate_fn=padded, shuffle=True)
    before = torch.get_rng_state()
    first, second = halves(draw_sample(loader, 40, batch_size=8, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    assert len(first) == len(second) == 20
    assert len(set(numbers(first)) | set(numbers(second))) == 40
    again, _ = halves(draw_sample(loader, 40, batch_size=8, seed=1))
    other, _ = halves(draw_sample(loader, 40, batch_size=8, seed=2))
    assert numbers(first) == numbers(again) != numbers(other)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"input_ids": [i]} for i in range(1000)])


def test_stream_gives_its_first_rows():
    first, second = halves(drawn(Stream(), 10))
    assert (numbers(first), numbers(second)) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])


def test_stream_that_knows_its_length_is_a_stream():
    class Counted(Stream):
        def __len__(self):
            return 1000

    first, second = halves(drawn(Counted(), 4))
    assert (numbers(first), numbers(second)) == ([0, 2], [1, 3])


def test_small_and_empty_data():
    first, second = halves(drawn(DATA[:3], 10))
    assert sorted(numbers(first) + numbers(second)) == [0, 1, 2]
    with pytest.raises(ValueError, match="1 rows, 1 of them different, expected at least 2"):
        drawn(DATA[:1], 10)


def test_guard_rows_replace_the_held_out_half():
    first, second = halves(drawn(DATA, 10, guard_rows=[{"input_ids": [-1]}]))
    assert len(first) == 10 and numbers(second) == [-1]
    with pytest.raises(ValueError, match="lack \\['input_ids'\\]"):
        drawn(DATA, 10, guard_rows=[{"text": "a"}])
    with pytest.raises(ValueError, match="empty"):
        drawn(DATA, 10, guard_rows=[])


def test_guard_rows_lose_the_columns_that_training_rows_lack():
    _, held_out = halves(drawn(DATA, 10, guard_rows=[{"input_ids": [-1], "text": "a"}]))
    assert held_out.rows == [{"input_ids": [-1]}]


@pytest.mark.parametrize("count", [1, 2, 5, 100, 4096, 10**6])
def test_rows_are_those_of_a_whole_permutation(count):
    expected = torch.randperm(count, generator=torch.Generator().manual_seed(7))[:256].tolist()
    assert _drawn(count, 256, torch.Generator().manual_seed(7)) == expected


def test_rows_of_a_billion_are_drawn_without_a_list_of_them():
    class Large(torch.utils.data.Dataset):
        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            return {"input_ids": [index]}

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sample = drawn(Large(), 64, 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**17
    assert len({*numbers(sample.selection), *numbers(sample.held_out)}) == 64


def test_copies_of_a_row_are_in_one_half():
    data = [{"input_ids": [i % 30, 1]} for i in range(100)]
    sample = drawn(data, 80, 8)
    first, second = ({row["input_ids"][0] for row in part.rows} for part in (sample.selection, sample.held_out))
    assert first and second and not first & second
    assert sample.duplicates == 80 - len(first | second) > 40
    assert sample.counts()["selection"] + sample.counts()["held_out"] == 80
    with pytest.raises(ValueError, match="100 rows, 1 of them different"):
        drawn([data[0]] * 100, 100, 8)


@pytest.mark.parametrize("make", [torch.tensor, np.array, list, tuple])
def test_content_is_that_of_the_numbers(make):
    rows = [{"input_ids": make([i % 4] * 5000 + [i % 2])} for i in range(8)]
    sample = drawn(rows, 8, collate=list)
    assert sample.duplicates == 4


def test_rows_without_labels_are_left_out_and_counted():
    data = [{"input_ids": [i, 1], "labels": [-100, -100 if i % 4 == 0 else 1]} for i in range(40)]
    sample = drawn(data, 40, 8)
    left = numbers(sample.selection) + numbers(sample.held_out)
    assert sorted(left) == [i for i in range(40) if i % 4] and sample.unlabeled == 10
    assert all((batch["labels"] != -100).any(1).all() for _, batch in sample.selection.batches())
    whole = drawn(data, 40, 8, labeled=False)
    assert len(whole.selection) + len(whole.held_out) == 40 and not whole.unlabeled


def test_data_without_any_label_names_the_causes():
    data = [{"input_ids": [i, 1], "labels": [-100, -100]} for i in range(40)]
    with pytest.raises(ValueError, match=r"None of the 20 rows .*max_length.*masks.*response template"):
        drawn(data, 40, 8)


def test_fingerprint_tells_samples_apart():
    fingerprints = {SampleRows(DATA[i : i + 4], padded, 2).fingerprint() for i in (0, 1)}
    assert len(fingerprints) == 2
    assert SampleRows(DATA[:4], padded, 2).fingerprint() in fingerprints


def test_fingerprint_of_batches_that_are_no_mappings():
    assert SampleRows(["a"], list).fingerprint() != SampleRows(["b"], list).fingerprint()
