"""The sample is the Trainer's own rows, disjoint and reproducible, and drawing it leaves no trace."""

import itertools
import random
import resource
import threading
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from mashup_callback.scoring import SampleRows, as_rows, draw_sample
from mashup_callback.scoring.private_copy import private_copy
from mashup_callback.scoring.sample import _drawn


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"input_ids": [i]} for i in range(1000)])


def identity(rows):
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def numbers(rows):
    return [row["input_ids"][0] for row in rows.rows]


def halves(sample):
    return sample.selection, sample.held_out


DATA = [{"input_ids": [i]} for i in range(100)]


def test_halves_are_disjoint_and_reproducible():
    loader = DataLoader(DATA, batch_size=4, collate_fn=identity, shuffle=True)
    before = torch.get_rng_state()
    first, second = halves(draw_sample(loader, 40, batch_size=8, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    assert len(first) == len(second) == 20
    assert len(set(numbers(first)) | set(numbers(second))) == 40
    again, _ = halves(draw_sample(loader, 40, batch_size=8, seed=1))
    other, _ = halves(draw_sample(loader, 40, batch_size=8, seed=2))
    assert numbers(first) == numbers(again) != numbers(other)


def test_stream_gives_its_first_rows():
    first, second = halves(draw_sample(DataLoader(Stream(), collate_fn=identity), 10, batch_size=2))
    assert (numbers(first), numbers(second)) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])


def test_stream_that_knows_its_length_is_a_stream():
    class Counted(Stream):
        def __len__(self):
            return 1000

    first, second = halves(draw_sample(DataLoader(Counted(), collate_fn=identity), 4, batch_size=2))
    assert (numbers(first), numbers(second)) == ([0, 2], [1, 3])


def test_small_and_empty_data():
    first, second = halves(draw_sample(DataLoader(DATA[:3], collate_fn=identity), 10, batch_size=2))
    assert sorted(numbers(first) + numbers(second)) == [0, 1, 2]
    with pytest.raises(ValueError, match="1 rows, 1 of them different, expected at least 2"):
        draw_sample(DataLoader(DATA[:1], collate_fn=identity), 10, batch_size=2)


def test_guard_rows_replace_the_held_out_half():
    loader = DataLoader(DATA, collate_fn=identity)
    first, second = halves(draw_sample(loader, 10, batch_size=2, guard_rows=[{"input_ids": [-1]}]))
    assert len(first) == 10 and numbers(second) == [-1]
    with pytest.raises(ValueError, match="lack \\['input_ids'\\]"):
        draw_sample(loader, 10, batch_size=2, guard_rows=[{"text": "a"}])
    with pytest.raises(ValueError, match="empty"):
        draw_sample(loader, 10, batch_size=2, guard_rows=[])


def test_batches_hold_every_row_once_longest_first():
    data = [{"input_ids": [0] * length} for length in (3, 1, 4, 1, 5, 9, 2, 6)]
    rows = SampleRows(data, lambda rows: {"longest": max(len(row["input_ids"]) for row in rows)}, 3)
    groups = [(indices, batch["longest"]) for indices, batch in rows.batches()]
    assert sorted(index for indices, _ in groups for index in indices) == list(range(8))
    assert [longest for _, longest in groups] == [9, 4, 1]


def test_halving_while_batches_run():
    rows = SampleRows(DATA[:7], identity, 4)
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
    rows = SampleRows(DATA[:4], lambda rows: {"noise": torch.rand(3)}, 2)
    assert torch.equal(*(next(rows.batches())[1]["noise"] for _ in range(2)))


def test_fingerprint_tells_samples_apart():
    fingerprints = {SampleRows(DATA[i : i + 4], identity, 2).fingerprint() for i in (0, 1)}
    assert len(fingerprints) == 2
    assert SampleRows(DATA[:4], identity, 2).fingerprint() in fingerprints


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
    _, held_out = halves(draw_sample(loader, 10, batch_size=2, guard_rows=[{"input_ids": [-1], "text": "a"}]))
    assert held_out.rows == [{"input_ids": [-1]}]


def test_fingerprint_of_batches_that_are_no_mappings():
    assert SampleRows(["a"], list).fingerprint() != SampleRows(["b"], list).fingerprint()


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
    sample = draw_sample(DataLoader(Large(), collate_fn=identity), 64, batch_size=8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**17
    assert len({*numbers(sample.selection), *numbers(sample.held_out)}) == 64


def labeled(rows):
    return {
        "input_ids": torch.tensor([row["input_ids"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def test_copies_of_a_row_are_in_one_half():
    data = [{"input_ids": [i % 30, 1]} for i in range(100)]
    sample = draw_sample(DataLoader(data, collate_fn=identity), 80, batch_size=8)
    first, second = ({row["input_ids"][0] for row in part.rows} for part in (sample.selection, sample.held_out))
    assert first and second and not first & second
    assert sample.duplicates == 80 - len(first | second) > 40
    assert sample.counts()["selection"] + sample.counts()["held_out"] == 80
    with pytest.raises(ValueError, match="100 rows, 1 of them different"):
        draw_sample(DataLoader([data[0]] * 100, collate_fn=identity), 100, batch_size=8)


@pytest.mark.parametrize("make", [torch.tensor, np.array, list, tuple])
def test_content_is_that_of_the_numbers(make):
    rows = [{"input_ids": make([i % 4] * 5000 + [i % 2])} for i in range(8)]
    sample = draw_sample(DataLoader(rows, collate_fn=list), 8, batch_size=2)
    assert sample.duplicates == 4


def test_rows_without_labels_are_left_out_and_counted():
    data = [{"input_ids": [i, 1], "labels": [-100, -100 if i % 4 == 0 else 1]} for i in range(40)]
    sample = draw_sample(DataLoader(data, collate_fn=labeled), 40, batch_size=8)
    left = numbers(sample.selection) + numbers(sample.held_out)
    assert sorted(left) == [i for i in range(40) if i % 4] and sample.unlabeled == 10
    assert all((batch["labels"] != -100).any(1).all() for _, batch in sample.selection.batches())
    whole = draw_sample(DataLoader(data, collate_fn=labeled), 40, batch_size=8, labeled=False)
    assert len(whole.selection) + len(whole.held_out) == 40 and not whole.unlabeled


def test_data_without_any_label_names_the_causes():
    data = [{"input_ids": [i, 1], "labels": [-100, -100]} for i in range(40)]
    with pytest.raises(ValueError, match=r"None of the 20 rows .*max_length.*masks.*response template"):
        draw_sample(DataLoader(data, collate_fn=labeled), 40, batch_size=8)


class OneShot(IterableDataset):
    """A stream that does not start over."""

    def __init__(self, rows):
        self.source = rows

    def __iter__(self):
        return (row for row in self.source)


class Itself(IterableDataset):
    def __init__(self, count):
        self.place, self.count = 0, count

    def __iter__(self):
        return self

    def __next__(self):
        if self.place == self.count:
            raise StopIteration
        self.place += 1
        return {"input_ids": [self.place]}


@pytest.mark.parametrize(
    "stream",
    [
        lambda: OneShot(iter([{"input_ids": [i]} for i in range(30)])),
        lambda: OneShot(itertools.chain([{"input_ids": [0]}], [{"input_ids": [i]} for i in range(1, 30)])),
        lambda: Itself(30),
        lambda: datasets.IterableDataset.from_generator(lambda: (row for row in DATA[:30])),
    ],
    ids=["iterator", "chain", "itself", "generator function"],
)
def test_stream_gets_its_rows_back(stream):
    stream = stream()
    sample = draw_sample(DataLoader(stream, collate_fn=identity), 10, batch_size=2)
    assert len(sample.selection) == len(sample.held_out) == 5
    assert len(list(stream)) == 30


def test_one_shot_stream_is_refused_before_a_row_is_lost():
    stream = OneShot({"input_ids": [i]} for i in range(30))
    with pytest.raises(ValueError, match="can be read once: it holds a generator"):
        draw_sample(DataLoader(stream, collate_fn=identity), 10, batch_size=2)
    assert len(list(stream)) == 30


RANDOM = np.random.default_rng(0)


def names_a_variable(rows):
    return {"input_ids": torch.from_numpy(RANDOM.random(len(rows)))}


def keeps_in_a_closure():
    generator, calls = random.Random(0), []

    def collate(rows):
        calls.append(1)
        return {"input_ids": torch.tensor([generator.random() + len(calls) for _ in rows])}

    return collate


class Keeps:
    def __init__(self, generator=None):
        self.lock, self.model, self.calls, self.source = threading.Lock(), torch.nn.Linear(1, 1), 0, itertools.count()
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, rows):
        self.calls += 1
        noise = torch.rand(len(rows), generator=self.generator)
        return {"input_ids": noise + self.calls + next(self.source)}


@pytest.mark.parametrize(
    "make",
    [lambda: names_a_variable, keeps_in_a_closure, Keeps, lambda: Keeps().__call__, lambda: partial(Keeps())],
    ids=["variable", "closure", "object with a lock", "method", "partial"],
)
def test_collator_keeps_its_state(make):
    collate, state = make(), RANDOM.bit_generator.state
    sample = draw_sample(DataLoader(DATA, collate_fn=collate), 10, batch_size=2)
    sampled = [batch["input_ids"] for _, batch in sample.selection.batches()]
    after = collate(DATA[:2])["input_ids"]
    RANDOM.bit_generator.state = state
    assert torch.equal(after, make()(DATA[:2])["input_ids"]) and len(sampled) == 3
    RANDOM.bit_generator.state = state


def test_models_are_not_copied_with_a_collator():
    collator = Keeps()
    copied, stuck = private_copy(collator)
    assert copied is not collator and copied.model is collator.model and copied.lock is collator.lock and not stuck


def lengths(rows):
    return [len(indices) for indices, _ in rows.batches()]


def test_short_rows_with_labels_fill_a_batch_up_to_the_budget(monkeypatch):
    monkeypatch.setattr("mashup_callback.scoring.sample.CPU_TOKENS", 60)
    data = [{"input_ids": [i] * (20 if i < 4 else 10), "labels": [1] * (20 if i < 4 else 10)} for i in range(24)]
    loader = DataLoader(data, collate_fn=padded)
    rows = draw_sample(loader, 24, batch_size=2, guard_rows=data[:1]).selection
    # Three rows of 20 tokens, then the last of these with as many short ones, padded to its length.
    assert lengths(rows) == [3, 3, 6, 6, 6]
    assert lengths(draw_sample(loader, 24, batch_size=8, guard_rows=data[:1]).selection) == [8, 8, 8]
    assert lengths(draw_sample(loader, 24, batch_size=2, guard_rows=data[:1], labeled=False).selection) == [2] * 12
    assert lengths(rows.part(0, 12)) == lengths(SampleRows(rows.rows[:12], padded, 2, 60))


def test_shares_of_filled_batches_are_as_many_on_each_process():
    data = [{"input_ids": [i, 1], "labels": [1, 1]} for i in range(9)]
    shares = [SampleRows(data, padded, 2, 1000).share(rank, 2) for rank in range(2)]
    assert [lengths(share) for share in shares] == [[5], [4]]
    assert sorted(i for share in shares for indices, _ in share.batches() for i in indices) == list(range(9))


def test_shares_for_a_loss_that_all_compute_have_batches_of_one_size():
    shares = [SampleRows(DATA[:15], identity, 4).share(rank, 2, even=True) for rank in range(2)]
    assert [lengths(share) for share in shares] == [[4, 4], [4, 4]]
    assert {i for share in shares for indices, _ in share.batches() for i in indices} == set(range(15))


def test_rows_that_are_packed_into_one_keep_the_batch_size():
    data = [{"input_ids": [i, 1], "labels": [1, 1]} for i in range(16)]

    def packed(rows):
        return {name: torch.tensor([[x for row in rows for x in row[name]]]) for name in ("input_ids", "labels")}

    sample = draw_sample(DataLoader(data, collate_fn=packed), 16, batch_size=2)
    assert lengths(sample.selection) == lengths(sample.held_out) == [2] * 4


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
        for name, fill in (("input_ids", 0), ("labels", -100))
    }
