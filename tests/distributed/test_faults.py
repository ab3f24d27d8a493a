"""What fails on one process ends on all of them, with its reason, and nobody waits for ever."""

import pytest


CALLBACK = {"batch_size": 4}
# Starting takes half of it on a busy machine.
LIMIT = 60


def statuses(run):
    rows = run.ranks[0]["report"]["candidates"]
    return {row["name"].rsplit("/", 1)[-1]: (row["status"], row["reason"]) for row in rows}


def check_agreement(run):
    assert run.ranks[0]["report"] == run.ranks[1]["report"]
    assert run.ranks[0]["held"] == run.ranks[1]["held"]
    assert run.ranks[0]["losses"] == run.ranks[1]["losses"]


@pytest.mark.parametrize(
    ("mode", "fault"),
    [("ddp", "missing"), ("native", "unreadable"), pytest.param("ddp", "unreadable", marks=pytest.mark.slow)],
)
def test_candidate_that_one_process_cannot_read(start, mode, fault):
    run = start(mode=mode, callback={**CALLBACK, "on_error": "raise"}, fault=fault)
    check_agreement(run)
    found = statuses(run)
    assert found["trained-1"] == ("scored", None)
    # In DDP, process 1 may not be the one that reads this candidate's tensors.
    if (mode, fault) != ("ddp", "unreadable"):
        status, reason = found["trained-0"]
        assert status == "rejected" and reason.startswith("process 1: ")


def test_candidate_that_is_lost_before_the_merge(start):
    run = start(mode="ddp", callback={**CALLBACK, "on_error": "raise", "guard": False}, fault="lost")
    check_agreement(run)
    report = run.ranks[0]["report"]
    weights = {row["name"].rsplit("/", 1)[-1]: row["weight"] for row in report["candidates"]}
    assert weights["trained-0"] is None and weights["trained-1"] and weights["trained-2"]
    assert report["decision"] == "merged" and "trained-0 was left out: it is gone" in report["reason"]


@pytest.mark.parametrize("mode", ["ddp", pytest.param("native", marks=pytest.mark.slow)])
def test_process_that_raises_in_scoring(start, mode):
    run = start(mode=mode, callback=CALLBACK, fault="scoring_raises")
    assert run.seconds < LIMIT
    check_agreement(run)
    assert run.ranks[0]["report"]["decision"] == "scratch"
    assert "process 1: " in run.ranks[0]["report"]["reason"]
    assert "a defect on process 1" in run.ranks[0]["report"]["reason"]


@pytest.mark.parametrize("mode", ["ddp", pytest.param("native", marks=pytest.mark.slow)])
def test_process_that_raises_ends_all_where_the_user_wants_that(start, mode):
    run = start(mode=mode, callback={**CALLBACK, "on_error": "raise"}, fault="scoring_raises", ok=False)
    assert run.code != 0 and not run.ranks and run.seconds < LIMIT
    assert "a defect on process 1" in run.output


def test_sharded_model_goes_on_when_one_process_fails_on_its_rows(start):
    run = start(mode="fsdp2", callback=CALLBACK, fault="batch_raises")
    assert run.seconds < LIMIT
    assert {status for status, _ in statuses(run).values()} == {"failed"}
    assert all("process 1 chokes on its rows" in reason for _, reason in statuses(run).values())
    assert run.ranks[0]["report"]["decision"] == "scratch" and len(run.losses) == 3


@pytest.mark.parametrize("fault", ["killed", "forward_raises"])
def test_process_that_cannot_go_on_takes_the_others_along(start, fault):
    run = start(mode="fsdp2", callback=CALLBACK, fault=fault, ok=False)
    assert run.code != 0 and not run.ranks and run.seconds < LIMIT
