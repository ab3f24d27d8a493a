"""What fails on one process ends on all of them, with its reason, and nobody waits for ever."""

import pickle
from types import SimpleNamespace

import pytest

from mashup_callback import distributed
from tests.distributed.launching import case


CALLBACK = {"batch_size": 4}
RAISES = {**CALLBACK, "on_error": "raise"}
# Seconds for a case on a busy machine; starting takes as many.
LIMIT = 30


def broken(mode, fault, slow=False, callback=CALLBACK, **settings):
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(case(mode, fault=fault, callback=callback, **settings), marks=marks, id=f"{mode}-{fault}")


def by_case(*cases):
    return pytest.mark.parametrize("run", cases, indirect=True)


def statuses(run):
    rows = run.ranks[0]["report"]["candidates"]
    return {row["name"].rsplit("/", 1)[-1]: (row["status"], row["reason"]) for row in rows}


def check_agreement(run):
    assert run.ranks[0]["report"] == run.ranks[1]["report"]
    assert run.ranks[0]["held"] == run.ranks[1]["held"]
    assert run.ranks[0]["losses"] == run.ranks[1]["losses"]


def check_read(run):
    check_agreement(run)
    found = statuses(run)
    assert found["trained-1"] == ("scored", None)
    return found["trained-0"]


@by_case(broken("ddp", "missing", callback=RAISES), broken("native", "unreadable", callback=RAISES))
def test_candidate_that_one_process_cannot_read(run):
    status, reason = check_read(run)
    assert status == "rejected" and reason.startswith("process 1: ")


@by_case(broken("ddp", "unreadable", callback=RAISES, slow=True))
def test_candidate_that_one_process_of_ddp_cannot_read(run):
    # Process 1 may not be the one that reads this candidate's tensors.
    check_read(run)


@by_case(broken("ddp", "lost", callback={**RAISES, "guard": False}))
def test_candidate_that_is_lost_before_the_merge(run):
    check_agreement(run)
    report = run.ranks[0]["report"]
    weights = {row["name"].rsplit("/", 1)[-1]: row["weight"] for row in report["candidates"]}
    assert weights["trained-0"] is None and weights["trained-1"] and weights["trained-2"]
    assert report["decision"] == "merged" and "trained-0 was left out: it is gone" in report["reason"]


@by_case(broken("ddp", "scoring_raises"), broken("native", "scoring_raises", slow=True))
def test_process_that_raises_in_scoring(run):
    assert run.seconds < LIMIT
    check_agreement(run)
    assert run.ranks[0]["report"]["decision"] == "scratch"
    assert "process 1: " in run.ranks[0]["report"]["reason"]
    assert "a defect on process 1" in run.ranks[0]["report"]["reason"]


@by_case(
    broken("ddp", "scoring_raises", callback=RAISES, ends=True),
    broken("native", "scoring_raises", callback=RAISES, ends=True, slow=True),
)
def test_process_that_raises_ends_all_where_the_user_wants_that(run):
    assert run.code != 0 and not run.ranks and run.seconds < 2 * LIMIT
    assert "a defect on process 1" in run.output


def test_an_error_whose_class_cannot_be_sent(monkeypatch):
    class LocalError(Exception):
        pass

    sent = []
    monkeypatch.setattr(distributed, "PartialState", lambda: SimpleNamespace(num_processes=2, process_index=1))
    monkeypatch.setattr(distributed, "gather_object", lambda parcels: sent.extend(pickle.loads(pickle.dumps(parcels))))
    with pytest.raises(LocalError), distributed.failing_together():
        raise LocalError("its reason")
    assert sent == [((RuntimeError, "LocalError: its reason"), None)]


@by_case(broken("fsdp2", "batch_raises"))
def test_sharded_model_goes_on_when_one_process_fails_on_its_rows(run):
    assert run.seconds < LIMIT
    assert {status for status, _ in statuses(run).values()} == {"failed"}
    assert all("process 1 chokes on its rows" in reason for _, reason in statuses(run).values())
    assert run.ranks[0]["report"]["decision"] == "scratch" and len(run.losses) == 3


@by_case(broken("fsdp2", "killed", ends=True), broken("fsdp2", "forward_raises", ends=True))
def test_process_that_cannot_go_on_takes_the_others_along(run):
    assert run.code != 0 and not run.ranks and run.seconds < 2 * LIMIT


VARIANTS = {"library": "variants", "callback": RAISES}


@by_case(case("native", **VARIANTS), case("fsdp1", **VARIANTS))
def test_what_needs_whole_weights_is_rejected_on_a_sharded_model(run):
    check_agreement(run)
    found = statuses(run)
    assert found["plain"] == ("scored", None)
    reasons = {"dora": "these are sharded or offloaded in this run", "head": "a model that is not sharded"}
    for name, reason in reasons.items():
        assert found[name][0] == "rejected" and reason in found[name][1]


@by_case(broken("ddp", "missing", library="untied", callback={**RAISES, "min_kept_energy": 0.0}))
def test_full_checkpoint_that_one_process_cannot_read(run):
    check_agreement(run)
    found = statuses(run)
    assert found["model-0"] == ("rejected", "process 1: its configuration is missing")
    assert found["model-1"] == ("scored", None)


FULL = {"library": "untied", "trains": "full", "trainer": {"learning_rate": 1e-4}, "callback": {"guard": False}}


@by_case(broken("ddp", "unsendable"), broken("fsdp2", "lost_in_swap", **FULL))
def test_process_that_fails_while_the_others_wait_for_it(run):
    check_agreement(run)
    report = run.ranks[0]["report"]
    assert report["decision"] == "scratch" and any(
        why in report["reason"] for why in ("cannot pickle", "process 1: its file cannot be read")
    )


@by_case(broken("native", "another_cache", callback=RAISES))
def test_scores_are_kept_by_all_processes_of_a_sharded_model_or_none(run):
    check_agreement(run)
    assert run.ranks[0]["report"]["decision"] in ("merged", "single")
