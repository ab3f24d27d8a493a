"""A run that is killed costs nothing but time, and nothing half-written is read."""

import json
import os
import signal
import subprocess
import sys
import tempfile

import pytest

from mashup_callback import pipeline, storage
from tests.hub.server import HubServer
from tests.killing import save_library
from tests.runs import TRAINERS, build, forked, hidden


KINDS = ("lora", "full", "download", "two")
# Random times, every which change of the disk, and stages at whose beginning a run is killed.
ONE = {"times": 1, "every": 0, "stages": 0}
FEW = {kind: ONE | {"every": 20} for kind in KINDS} | {"two": ONE}
MANY = {
    "lora": {"times": 15, "every": 1, "stages": 7},
    "full": {"times": 15, "every": 1, "stages": 7},
    # Of 120 changes of the disk, most of them by the Hub's client in its cache.
    "download": {"times": 10, "every": 10, "stages": 7},
    "two": {"times": 10, "every": 0, "stages": 7},
}


def kill_runs(home, kinds, seed=0, seconds=1500):
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
    assert {each["kind"] for each in found if each["killed"]} >= {"lora", "full", "download"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_kills(tmp_path, kind):
    """Some 50 to 200 runs of a second each on an idle machine."""
    found = kill_runs(tmp_path, {kind: MANY[kind]}, seconds=3600)
    check(found)
    print(kind, len(found), [(each["how"], each["left"]) for each in found])


@pytest.mark.parametrize("handled", [False, True], ids=["default", "handler"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_sigterm_leaves_no_file(tmp_path, candidates, kind, handled, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("MASHUP_CACHE", str(tmp_path / "scores"))
    (tmp_path / "out").mkdir()
    trainer, _ = build(kind, tmp_path / "out", candidates / f"{kind}/*")

    def ended(stage):
        def stop(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

        if handled:
            signal.signal(signal.SIGTERM, lambda *args: sys.exit(7))
        target = storage if stage == "_swap_in" else pipeline
        monkeypatch.setattr(target, stage, stop)
        try:
            trainer.train()
        except SystemExit:
            os._exit(7)

    for stage in ("score_candidates", "choose", "check_swap", "save_mashup", "_swap_in"):
        status = forked(lambda stage=stage: ended(stage))
        assert (os.WEXITSTATUS(status) == 7) if handled else os.WTERMSIG(status) == signal.SIGTERM
        assert not hidden(tmp_path) and not list((tmp_path / "out").iterdir()) and not list(temporary.iterdir()), stage
