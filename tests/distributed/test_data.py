"""Data that each process has a part of, and runs that the callback must leave as they are."""

import pytest


CALLBACK = {"batch_size": 4}


def rows_scored(run):
    return {(row["name"], row["loss"]) for row in run.ranks[0]["report"]["candidates"]}


def check_agreement(run):
    assert run.ranks[0]["report"] == run.ranks[1]["report"]
    assert run.ranks[0]["held"] == run.ranks[1]["held"]
    assert run.ranks[0]["report"]["decision"] in ("merged", "single")


def test_stream_is_sampled_as_in_one_process(start):
    settings = {"data": "stream", "callback": {**CALLBACK, "sample_size": 10}}
    together, alone = start(**settings), start(world=1, **settings)
    check_agreement(together)
    for one, other in zip(sorted(rows_scored(together)), sorted(rows_scored(alone)), strict=True):
        assert one[0] == other[0] and one[1] == pytest.approx(other[1], abs=1e-5)
    assert together.losses[0] == pytest.approx(alone.losses[0], abs=1e-5)


def test_shards_of_a_stream_give_every_process_the_same_sample(start):
    run = start(data="shards", callback={**CALLBACK, "sample_size": 9})
    check_agreement(run)
    # Rows that do not come out even, neither in halves nor over the processes.
    assert {row["rows"] for row in run.ranks[0]["report"]["candidates"]} == {5}


def test_batches_dispatched_by_the_main_process(start):
    settings = {"accelerator_config": {"dispatch_batches": True}, "pad_to_multiple_of": 32}
    check_agreement(start(trainer=settings, callback={**CALLBACK, "sample_size": 15}))


def test_scratch_is_bit_identical_to_no_callback(start):
    settings = {"lora": {"lora_dropout": 0.3}, "trainer": {"train_sampling_strategy": "group_by_length"}}
    scratch = start(fault="guard_refuses", callback=CALLBACK, **settings)
    without = start(callback=None, **settings)
    assert scratch.ranks[0]["report"]["decision"] == "scratch"
    assert scratch.ranks[0]["report"]["merged_loss"] is not None
    for one, other in zip(scratch.ranks, without.ranks, strict=True):
        assert one["losses"] == other["losses"]
        assert one["trained"] == other["trained"]
