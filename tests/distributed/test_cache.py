"""A sharded run that is started again scores from the cache."""

import json

import pytest

from tests.distributed.conftest import CALLBACK
from tests.distributed.launching import finish, read_ranks, start, torchrun


@pytest.mark.parametrize("mode", ["native", pytest.param("fsdp1", marks=pytest.mark.slow)])
def test_a_second_run_of_a_sharded_model_scores_from_the_cache(tmp_path, places, mode):
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        case = {"directory": str(tmp_path / name), "callback": {**CALLBACK, "guard": False}, **places("adapters")}
        running = start(torchrun(mode, [case], 2), MASHUP_CACHE=str(tmp_path / "cache"))
        code, output = finish(running, 300)
        assert code == 0, output[-8000:]
        found.append(read_ranks(tmp_path / name))
    first, second = found
    candidates = [json.dumps({**row, "seconds": 0}) for row in first[0]["report"]["candidates"]]
    assert [json.dumps({**row, "seconds": 0}) for row in second[0]["report"]["candidates"]] == candidates
    scored = sum(row["rows"] for row in first[0]["report"]["candidates"])
    # Each process looks at half of the rows of every candidate, and what is left is the guard's.
    for rank in range(2):
        assert first[rank]["rows"] - second[rank]["rows"] == scored / 2
