"""A run that is killed, a full disk and files that change under it cost nothing but time; nothing half-written is read."""

import json
import os
import subprocess
import sys

import pytest

from tests.hub.server import HubServer
from tests.killing import save_library


KINDS = ("lora", "full", "download", "two")
# Random times, every which change of the disk, and stages at whose beginning a run is killed.
FEW = dict.fromkeys(KINDS, {"times": 1, "every": 16, "stages": 0}) | {"two": {"times": 1, "every": 0, "stages": 0}}
MANY = {
    "lora": {"times": 15, "every": 1, "stages": 7},
    "full": {"times": 15, "every": 1, "stages": 7},
    "download": {"times": 10, "every": 1, "stages": 7},
    "two": {"times": 10, "every": 0, "stages": 7},
}


def kill_runs(home, kinds, seed=0, seconds=600):
    """Returns what came of each kill, of all kinds in one process that imports everything once."""
    save_library(home / "library")
    with HubServer() as hub:
        names = [f"acme/run-{number}" for number in range(3)]
        for name in names:
            directory = home / "library/lora" / name.partition("/")[2]
            hub.seed(name, {path.name: path.read_bytes() for path in directory.iterdir()})
        values = {"directory": str(home), "seed": seed, "kinds": kinds, "hub": names}
        done = subprocess.run(
            [sys.executable, "-m", "tests.killing", json.dumps(values)],
            env={**hub.environment(home / "hf"), "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found):
    assert {each["next"] for each in found} == {"same"}, found
    # Between the two renames there is nothing; all else is the mashup from before or the new one.
    assert {each["left"] for each in found} <= {"earlier", "new", "nothing"}, found
    assert {each["killed"] for each in found if not each["how"].startswith("after")} <= {True}


def test_a_run_after_a_killed_one_is_as_if_there_had_been_none(tmp_path):
    found = kill_runs(tmp_path, FEW)
    check(found)
    assert {each["kind"] for each in found if each["killed"]} == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_kills(tmp_path, kind):
    """Two to five minutes each on an idle machine."""
    found = kill_runs(tmp_path, {kind: MANY[kind]}, seconds=3600)
    check(found)
    print(kind, len(found), [(each["how"], each["left"]) for each in found])
