"""Drawing a sample takes nothing from the run: no random number, no row of a stream, no state of a collator."""

import itertools
import random
import threading
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from mashup_callback.scoring import SampleRows
from mashup_callback.scoring.private_copy import private_copy
from tests.scoring.samples import DATA, drawn


def test_random_collator_gives_every_candidate_the_same_batch():
    rows = SampleRows(DATA[:4], lambda rows: {"noise": torch.rand(3)}, 2)
    assert torch.equal(*(next(rows.batches())[1]["noise"] for _ in range(2)))


def test_reading_rows_leaves_the_random_numbers_alone():
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"input_ids": [index, int(torch.randint(9, (1,)))]}

    before = torch.get_rng_state()
    drawn(Augmented(), 8)
    assert torch.equal(before, torch.get_rng_state())


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
    sample = drawn(stream, 10)
    assert len(sample.selection) == len(sample.held_out) == 5
    assert len(list(stream)) == 30


def test_one_shot_stream_is_refused_before_a_row_is_lost():
    stream = OneShot({"input_ids": [i]} for i in range(30))
    with pytest.raises(ValueError, match="can be read once: it holds a generator"):
        drawn(stream, 10)
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
    def __init__(self):
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
    sample = drawn(DATA, 10, collate=collate)
    sampled = [batch["input_ids"] for _, batch in sample.selection.batches()]
    after = collate(DATA[:2])["input_ids"]
    RANDOM.bit_generator.state = state
    assert torch.equal(after, make()(DATA[:2])["input_ids"]) and len(sampled) == 3
    RANDOM.bit_generator.state = state


def test_models_are_not_copied_with_a_collator():
    collator = Keeps()
    copied, stuck = private_copy(collator)
    assert copied is not collator and copied.model is collator.model and copied.lock is collator.lock and not stuck
