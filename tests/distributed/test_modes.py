"""
Every way to launch a run, in two real processes, against the same run in one process.

The slow ones need packages that the others do not:

    pip install wheel ninja py-cpuinfo
    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed
    python -m pytest -m slow tests/distributed
"""

import math

import pytest


CALLBACK = {"batch_size": 4}


def check_same(run, alone, tolerance=1e-5):
    """Losses after the swap, decision and written weights are those of one process, and the same in all."""
    assert alone.ranks[0]["report"]["decision"] in ("merged", "single")
    for rank in run.ranks:
        assert rank["losses"] == pytest.approx(alone.losses, abs=tolerance)
        assert rank["held"] == run.ranks[0]["held"]
        assert rank["report"] == run.ranks[0]["report"]
        assert rank["report"]["decision"] == alone.ranks[0]["report"]["decision"]
    assert run.ranks[0]["saved_difference"] == 0.0


def test_ddp(start, alone):
    run = start(mode="ddp", callback=CALLBACK)
    check_same(run, alone)
    assert run.ranks[0]["kind"] == "MULTI_CPU"
    losses = [row["loss"] for row in run.ranks[0]["report"]["candidates"]]
    assert losses == pytest.approx([row["loss"] for row in alone.ranks[0]["report"]["candidates"]], abs=1e-5)
    # Half of the candidates (within one) and half of the guard's rows each.
    rows = (len(losses) * 4 + 3 * 4) * 4
    assert alone.ranks[0]["rows"] == rows
    for rank in run.ranks:
        assert abs(rank["rows"] - rows / 2) <= 4 * 4 / 2
    assert sum(rank["rows"] for rank in run.ranks) == rows


def test_bound_trainer_in_ddp(start):
    # Its loss decides nothing here: whether these candidates help it is another question.
    settings = {"trains": "dpo", "callback": {**CALLBACK, "guard": False, "on_error": "raise"}}
    run, alone = start(mode="ddp", **settings), start(world=1, **settings)
    check_same(run, alone)
    losses, alone_losses = (
        {row["name"]: row["loss"] for row in each.ranks[0]["report"]["candidates"]} for each in (run, alone)
    )
    assert losses == pytest.approx(alone_losses, abs=1e-5)
    # DPO's own loss: ln 2 for an adapter that changes nothing.
    assert run.ranks[0]["report"]["base_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(set(losses.values())) > 1 and run.ranks[0]["report"]["merged_loss"] != pytest.approx(math.log(2))


def test_fsdp2_of_transformers(start, alone):
    check_same(start(mode="native", callback=CALLBACK), alone)


@pytest.mark.parametrize("mode", ["fsdp1", "fsdp2", "fsdp2-whole"])
def test_fsdp_of_accelerate(start, alone, mode):
    run = start(mode=mode, callback=CALLBACK)
    assert run.ranks[0]["kind"] == "FSDP"
    check_same(run, alone)


def test_write_on_the_main_process_only_is_seen_by_these_tests(start, alone):
    run = start(callback=CALLBACK, fault="writes_on_main_only")
    with pytest.raises(AssertionError):
        check_same(run, alone)
    assert run.ranks[0]["held"] != run.ranks[1]["held"]


def test_different_weights_on_the_processes_raise(start):
    run = start(callback={**CALLBACK, "on_error": "raise"}, fault="other_values", ok=False)
    assert run.code != 0
    assert "differ from those of process 0" in run.output


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero1", "zero2", "zero3"])
def test_zero(start, alone, mode):
    run = start(mode=mode, callback=CALLBACK)
    assert run.ranks[0]["kind"] == "DEEPSPEED"
    check_same(run, alone)


@pytest.mark.slow
def test_zero2_in_bfloat16(start):
    # bfloat16 keeps 8 bits, and the two runs round in different places.
    settings = {"callback": CALLBACK, "dtype": "bfloat16"}
    check_same(start(mode="zero2", **settings), start(world=1, **settings), tolerance=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero1", "zero3"])
def test_zero_without_its_masters_is_seen_by_these_tests(start, alone, mode):
    run = start(mode=mode, callback=CALLBACK, fault="no_master")
    with pytest.raises(AssertionError):
        check_same(run, alone)
