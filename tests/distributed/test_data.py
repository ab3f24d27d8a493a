"""Data that each process has a part of, and runs that the callback must leave as they are."""

import pytest

from tests.distributed.launching import case


CALLBACK = {"batch_size": 4}
STREAM = {"data": "stream", "callback": {**CALLBACK, "sample_size": 10}}
# A run of 480 rows, in which the guard never finds what it asks for.
MANY = {
    "data": "many",
    "callback": {**CALLBACK, "guard_margin": 1e6},
    "trainer": {"gradient_accumulation_steps": 120, "max_steps": 1},
}
DISPATCHED = {"accelerator_config": {"dispatch_batches": True}, "pad_to_multiple_of": 32}
DRAWING = {"lora_config": {"lora_dropout": 0.3}, "trainer": {"train_sampling_strategy": "group_by_length"}}


def one(**settings):
    return pytest.mark.parametrize("run", [case(**settings)], indirect=True, ids=str)


def rows_scored(run):
    return {(row["name"], row["loss"]) for row in run.ranks[0]["report"]["candidates"]}


def check_agreement(run):
    assert run.ranks[0]["report"] == run.ranks[1]["report"]
    assert run.ranks[0]["held"] == run.ranks[1]["held"]
    assert run.ranks[0]["report"]["decision"] in ("merged", "single")


@one(**STREAM)
def test_stream_is_sampled_as_in_one_process(run, train_here):
    alone = train_here(**STREAM)
    check_agreement(run)
    for (name, loss), (alone_name, alone_loss) in zip(
        sorted(rows_scored(run)), sorted(rows_scored(alone)), strict=True
    ):
        assert name == alone_name and loss == pytest.approx(alone_loss, abs=1e-5)
    assert run.losses[0] == pytest.approx(alone.losses[0], abs=1e-5)


@one(data="shards", callback={**CALLBACK, "sample_size": 9})
def test_shards_of_a_stream_give_every_process_the_same_sample(run):
    check_agreement(run)
    # Rows that do not come out even, neither in halves nor over the processes.
    assert {row["rows"] for row in run.ranks[0]["report"]["candidates"]} == {5}


@one(trainer=DISPATCHED, callback={**CALLBACK, "sample_size": 15})
def test_batches_dispatched_by_the_main_process(run):
    check_agreement(run)


@pytest.mark.parametrize("run", [case(**MANY), case(mode="fsdp2", **MANY)], indirect=True, ids=str)
def test_a_guard_that_cannot_decide_looks_at_the_same_rows_everywhere(run, train_here):
    alone = train_here(**MANY).ranks[0]["report"]
    for report in (rank["report"] for rank in run.ranks):
        assert report["sample"] == alone["sample"] and report["sample"]["held_out"] == 64
        for name in ("decision", "base_loss", "merged_loss", "gain", "gain_se"):
            assert report[name] == pytest.approx(alone[name], abs=1e-4), name


@pytest.mark.parametrize(
    ("run", "other"),
    [(case(fault="guard_refuses", callback=CALLBACK, **DRAWING), case(**DRAWING))],
    indirect=True,
    ids=str,
)
def test_scratch_is_bit_identical_to_no_callback(run, other):
    assert run.ranks[0]["report"]["decision"] == "scratch"
    assert run.ranks[0]["report"]["merged_loss"] is not None
    assert other.ranks[0]["report"] is None
    for scratch, without in zip(run.ranks, other.ranks, strict=True):
        assert scratch["losses"] == without["losses"]
        assert scratch["trained"] == without["trained"]
