"""A library of 200 adapters, 150 of them hostile: the choice is that of the 50 good ones alone, to the bit."""

import pytest

from tests.distributed.launching import case


SETTINGS = {"callback": {"batch_size": 4, "on_error": "raise"}}
FULL = {**SETTINGS, "trains": "full", "trainer": {"learning_rate": 1e-4}}


def pair(mode, marks=(), **settings):
    cases = [case(mode, library=library, **(settings or SETTINGS)) for library in ("hostile", "good")]
    return pytest.param(*cases, marks=marks, id="-".join([mode, *settings.get("trains", "").split()]))


def check_same_choice(hostile, good):
    for one, other in zip(hostile.ranks, good.ranks, strict=True):
        found, expected = one["report"], other["report"]
        rejected = [row for row in found["candidates"] if row["status"] == "rejected"]
        assert len(rejected) > 130 and all("-hostile" in row["name"] and row["reason"] for row in rejected)
        assert found["decision"] == expected["decision"] != "scratch"
        assert one["losses"] == other["losses"] and one["held"] == other["held"]
        for name in ("base_loss", "merged_loss", "single_loss", "gain", "gain_se", "rounds", "merge"):
            assert found[name] == expected[name], name
        scored, alone = (
            [[row[name] for name in ("name", "status", "loss", "rows", "tokens", "weight")] for row in candidates]
            for candidates in ([row for row in found["candidates"] if row not in rejected], expected["candidates"])
        )
        assert scored == alone and len(alone) == 50
    [first, second] = [sorted((run.directory / "out/mashup").glob("*.safetensors")) for run in (hostile, good)]
    assert first and [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_in_one_process(train_here):
    check_same_choice(*(train_here(library=library, **SETTINGS) for library in ("hostile", "good")))


@pytest.mark.parametrize(
    ("run", "other"),
    [
        pair("ddp"),
        *(pair(mode, pytest.mark.slow) for mode in ("native", "fsdp1", "fsdp2")),
        *(pair(mode, pytest.mark.slow, **FULL) for mode in ("ddp", "fsdp2")),
    ],
    indirect=True,
)
def test_in_two_processes(run, other):
    check_same_choice(run, other)
