"""
Every way to launch a run, in two real processes, against the same run in one process.

The slow ones need packages that the others do not:

    pip install wheel ninja py-cpuinfo
    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed
    python -m pytest -m slow tests/distributed
"""

import math

import pytest

from tests.distributed.launching import case
from tests.distributed.modes import has_deepspeed


CALLBACK = {"batch_size": 4}
# Its loss decides nothing here: whether these candidates help it is another question.
DPO = {"trains": "dpo", "callback": {**CALLBACK, "guard": False, "on_error": "raise"}}
# bfloat16 keeps 8 bits, and the two runs round in different places.
BFLOAT16 = {"callback": CALLBACK, "dtype": "bfloat16"}

needs_deepspeed = pytest.mark.skipif(not has_deepspeed, reason="deepspeed is not installed")


def plain(*modes, **settings):
    cases = [case(mode, callback=CALLBACK, **settings) for mode in modes]
    return pytest.mark.parametrize("run", cases, indirect=True, ids=str)


def check_same(run, alone, tolerance=1e-5):
    """Losses after the swap, decision and written weights are those of one process, and the same in all."""
    assert alone.ranks[0]["report"]["decision"] in ("merged", "single")
    for rank in run.ranks:
        assert rank["losses"] == pytest.approx(alone.losses, abs=tolerance)
        assert rank["held"] == run.ranks[0]["held"]
        assert rank["report"] == run.ranks[0]["report"]
        assert rank["report"]["decision"] == alone.ranks[0]["report"]["decision"]
    assert run.ranks[0]["saved_difference"] == 0.0


@plain("ddp")
def test_ddp(run, alone):
    check_same(run, alone)
    assert run.ranks[0]["kind"] == "MULTI_CPU"
    losses = [row["loss"] for row in run.ranks[0]["report"]["candidates"]]
    assert losses == pytest.approx([row["loss"] for row in alone.ranks[0]["report"]["candidates"]], abs=1e-5)
    # Half of the candidates (within one) and half of the guard's rows each, and a batch that checks the swap.
    rows, batch = (len(losses) * 4 + 3 * 4) * 4, CALLBACK["batch_size"]
    assert alone.ranks[0]["rows"] == rows + batch
    for rank in run.ranks:
        assert abs(rank["rows"] - rows / 2 - batch) <= 4 * 4 / 2
    assert sum(rank["rows"] for rank in run.ranks) == rows + 2 * batch


@pytest.mark.parametrize("run", [case(**DPO)], indirect=True, ids=str)
def test_bound_trainer_in_ddp(run, train_here):
    alone = train_here(**DPO)
    check_same(run, alone)
    losses, alone_losses = (
        {row["name"]: row["loss"] for row in each.ranks[0]["report"]["candidates"]} for each in (run, alone)
    )
    assert losses == pytest.approx(alone_losses, abs=1e-5)
    # DPO's own loss: ln 2 for an adapter that changes nothing.
    assert run.ranks[0]["report"]["base_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(set(losses.values())) > 1 and run.ranks[0]["report"]["merged_loss"] != pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "run", [case(**{**DPO, "callback": {**DPO["callback"], "sample_size": 30}})], indirect=True, ids=str
)
def test_bound_trainer_in_ddp_whose_last_batch_is_smaller(run):
    """It gathers a number for each row, and so has to have as many rows in every process."""
    assert run.ranks[0]["report"] == run.ranks[1]["report"] and run.ranks[0]["held"] == run.ranks[1]["held"]
    assert run.ranks[0]["rows"] == run.ranks[1]["rows"]


@plain("native")
def test_fsdp2_of_transformers(run, alone):
    check_same(run, alone)


@plain("fsdp1", "fsdp2", "fsdp2-whole")
def test_fsdp_of_accelerate(run, alone):
    assert run.ranks[0]["kind"] == "FSDP"
    check_same(run, alone)


@plain("ddp", "native", fault="fused")
def test_fused_kernels(run, alone):
    check_same(run, alone)
    rows, expected = (each.ranks[0]["report"]["candidates"] for each in (run, alone))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
    assert not any(row["warnings"] for row in rows)


@plain("ddp", fault="writes_on_main_only")
def test_write_on_the_main_process_only_is_seen_by_these_tests(run, alone):
    with pytest.raises(AssertionError):
        check_same(run, alone)
    assert run.ranks[0]["held"] != run.ranks[1]["held"]


@pytest.mark.parametrize(
    "run",
    [case(callback={**CALLBACK, "on_error": "raise"}, fault="other_values", ends=True)],
    indirect=True,
    ids=str,
)
def test_different_weights_on_the_processes_raise(run):
    assert run.code != 0
    assert "differ from those of process 0" in run.output


@pytest.mark.slow
@needs_deepspeed
@plain("zero1", "zero2", "zero3")
def test_zero(run, alone):
    assert run.ranks[0]["kind"] == "DEEPSPEED"
    check_same(run, alone)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("run", [case("zero2", **BFLOAT16)], indirect=True, ids=str)
def test_zero2_in_bfloat16(run, train_here):
    check_same(run, train_here(**BFLOAT16), tolerance=2e-2)


@pytest.mark.slow
@needs_deepspeed
@plain("zero1", "zero3", fault="no_master")
def test_zero_without_its_masters_is_seen_by_these_tests(run, alone):
    with pytest.raises(AssertionError):
        check_same(run, alone)
