"""A case that fails ends its launch, and only its own test."""

import sys

import pytest

from tests.distributed import launching
from tests.distributed.launching import Launcher, case


# A worker that fails where the settings of a case say so.
WORKER = """
import json, pathlib, sys
for case in json.loads(sys.argv[1]):
    if case["fault"]:
        raise RuntimeError(f"{case['fault']} on purpose")
    for rank in range(2):
        (pathlib.Path(case["directory"]) / f"rank{rank}.json").write_text(json.dumps({"seconds": 1.0}))
"""


@pytest.fixture
def launches(monkeypatch):
    """The cases of each launch, in order."""
    found = []

    def command(mode, cases, world):
        found.append([each["fault"] for each in cases])
        return [sys.executable, "-c", WORKER, launching.json.dumps(cases)]

    monkeypatch.setattr(launching, "torchrun", command)
    return found


def test_a_failing_case_fails_alone(tmp_path, launches):
    good, broken, after = case(fault=None), case(fault="breaks"), case(fault=None)
    ends, elsewhere = case(fault="killed", ends=True), case("fsdp2", fault=None)
    launcher = Launcher(tmp_path, [good, broken, after, ends, elsewhere], lambda library: {})
    assert [len(launcher[each].ranks) for each in (after, good, broken)] == [2, 2, 0]
    assert "RuntimeError: breaks on purpose" in launcher[broken].output and launcher[broken].code == 1
    assert launches == [[None, "breaks", None], [None]]
    assert (launcher[ends].code, len(launcher[elsewhere].ranks)) == (1, 2)
    assert launches[2:] == [["killed"], [None]]
