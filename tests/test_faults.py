"""A run that is killed, a full disk and files that change cost nothing but time, and nothing half-written is read."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import mashup_callback.lora.source
from mashup_callback import MashupCallback, MashupReport, merge_adapters, pipeline, storage
from mashup_callback.storage import replacing
from tests.full_model import full_trainer
from tests.hub.server import HubServer
from tests.killing import save_library
from tests.tiny import llama, losses, sft_trainer


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


TRAINERS = {"lora": sft_trainer, "full": full_trainer}
STAGES = ("find_candidates", "draw_sample", "score_candidates", "choose", "save_mashup")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shelf")
    save_library(directory / "library")
    return directory


def build(kind, output, specs, **values):
    callback = MashupCallback(str(specs), sample_size=8, guard=False, **values)
    torch.manual_seed(0)
    return TRAINERS[kind](output, callbacks=[callback], max_steps=1), callback


def train(kind, output, specs, **values):
    """Returns the report, and what tells one start from another: the loss of the first step."""
    trainer, callback = build(kind, output, specs, **values)
    trainer.train()
    return callback.report, losses(trainer)


def begin(function):
    """Calls a function in a process of its own, whose number is returned."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
        finally:
            os._exit(code)
    return child


def forked(function):
    """Returns how a process that calls a function ended."""
    return os.waitpid(begin(function), 0)[1]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def hidden(directory):
    return [path.name for path in directory.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


# What was moved aside.


def killed_between_the_renames(target, monkeypatch):
    def write():
        monkeypatch.setattr(storage, "refuse_foreign", lambda path, name=None: name and os.kill(os.getpid(), 9))
        with replacing(target) as draft:
            (draft / "new").write_text("new")

    assert os.WTERMSIG(forked(write)) == signal.SIGKILL and not target.exists()


def test_a_mashup_moved_aside_by_a_killed_run_is_put_back(tmp_path, shelf, monkeypatch):
    merge_adapters(sorted((shelf / "library/lora").iterdir()), output_dir=tmp_path / "out/mashup")
    before = contents(tmp_path / "out/mashup")
    killed_between_the_renames(tmp_path / "out/mashup", monkeypatch)
    # A run that fails must not take the place of what it cannot see.
    report, _ = train("lora", tmp_path / "out", tmp_path / "none-*")
    after = contents(tmp_path / "out/mashup")
    assert report.decision == "scratch" and after.pop("failed.json") and after == before
    killed_between_the_renames(tmp_path / "out/mashup", monkeypatch)
    train("lora", tmp_path / "out", shelf / "library/lora/*")
    assert not [name for name in hidden(tmp_path) if name.endswith(".old")]


def test_what_is_not_ours_is_not_put_back(tmp_path):
    (tmp_path / ".mashup.0123456789ab.old").mkdir()
    (tmp_path / ".mashup.0123456789ab.old/thesis.txt").write_text("years of work")
    storage.prepare(tmp_path / "mashup")
    assert [path.name for path in tmp_path.iterdir()] == [".mashup.0123456789ab.old"]


def test_runs_that_replace_one_directory_at_once(tmp_path):
    def write(number):
        for _ in range(100):
            with replacing(tmp_path / "mashup") as draft:
                MashupReport("scratch", f"by {number}").save(draft / "report.json")

    children = [begin(partial(write, number)) for number in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert MashupReport.load(tmp_path / "mashup").decision == "scratch"
    assert [path.name for path in tmp_path.iterdir()] == ["mashup"]


# Disks.


@contextlib.contextmanager
def disk(directory, kilobytes):
    """A file system of its own, as root may have one."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("kind", TRAINERS)
def test_no_space_for_the_mashup(tmp_path, shelf, kind, monkeypatch, caplog):
    specs = shelf / f"library/{kind}/*"
    whole, expected = train(kind, tmp_path / "whole", specs)
    # Full weights are merged beside the mashup, with a look at the space before: it is gone after that.
    monkeypatch.setattr("mashup_callback.full.merge.check_space", lambda *args: None)
    monkeypatch.setattr("mashup_callback.full.trainee.check_space", lambda *args: None)
    fresh = losses_without(kind, tmp_path)
    with disk(tmp_path / "disk", 24) as small:
        report, found = train(kind, tmp_path / "out", specs, report_dir=str(small / "mashup"))
        # Why there is no mashup is said on the disk too, where there is space enough for that.
        assert not hidden(small) and not list(small.rglob("*.safetensors"))
        with pytest.raises(Exception, match="No space left"):
            train(kind, tmp_path / "out", specs, report_dir=str(small / "other"), on_error="raise")
        assert not (small / "other").exists() and not hidden(small)
    if kind == "lora":
        assert report.decision == whole.decision == "merged" and found == expected
        assert "could not be saved" in caplog.text
    else:
        assert report.decision == "scratch" and "No space left" in report.reason and found == fresh


def losses_without(kind, directory):
    torch.manual_seed(0)
    trainer = TRAINERS[kind](directory / "alone", max_steps=1)
    trainer.train()
    return losses(trainer)


def test_no_space_for_an_earlier_mashup_s_successor(tmp_path, shelf):
    with disk(tmp_path / "disk", 80) as small:
        train("lora", tmp_path / "out", shelf / "library/lora/*", report_dir=str(small / "mashup"))
        before = contents(small / "mashup")
        (small / "ballast").write_bytes(b"0" * (shutil.disk_usage(small).free - 4096))
        report, _ = train("lora", tmp_path / "out", shelf / "library/lora/*", report_dir=str(small / "mashup"))
        assert report.decision == "merged" and contents(small / "mashup") == before
        assert len(list(small.iterdir())) == 2


def test_no_space_for_scores(tmp_path, shelf, monkeypatch):
    expected = train("lora", tmp_path / "out", shelf / "library/lora/*")[1]
    # Room for one file.
    with disk(tmp_path / "disk", 4) as small:
        monkeypatch.setenv("MASHUP_CACHE", str(small))
        report, found = train("lora", tmp_path / "out", shelf / "library/lora/*")
        files = [path for path in small.rglob("*") if path.is_file()]
        assert report.decision == "merged" and found == expected and len(files) <= 1 and not hidden(small)


def test_no_right_to_write(shelf, caplog):
    home = Path(tempfile.mkdtemp())
    home.chmod(0o755)
    try:
        shutil.copytree(shelf / "library/lora", home / "library")
        for path in (home / "library").rglob("*"):
            path.chmod(0o755)
        (home / "closed").mkdir(mode=0o555)
        trainer, callback = build("lora", home / "out", home / "library/*", report_dir=str(home / "closed/mashup"))

        def as_nobody():
            os.setuid(65534)
            trainer.train()
            assert callback.report.decision == "merged"
            assert "could not be saved" in caplog.text and "Permission denied" in caplog.text

        assert forked(as_nobody) == 0
        assert not list((home / "closed").iterdir())
    finally:
        shutil.rmtree(home)


# Candidates that are not what they were.


def vanish(directory):
    shutil.rmtree(directory)


def cut(directory):
    for path in directory.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])


def rewritten(directory):
    """Other weights, of the same size."""
    for path in directory.glob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-64] + bytes(64))


def unreadable(directory):
    for path in directory.glob("*.safetensors"):
        path.unlink()
        path.mkdir()


def endless(directory):
    for path in directory.glob("*.safetensors"):
        path.unlink()
        path.symlink_to("/dev/zero")


def waiting(directory):
    for path in directory.glob("*.safetensors"):
        path.unlink()
        os.mkfifo(path)


FAULTS = (vanish, cut, rewritten, unreadable, endless, waiting)
CASES = [("lora", fault) for fault in FAULTS] + [("full", vanish), ("full", rewritten)]
CASES += [pytest.param("full", fault, marks=pytest.mark.slow) for fault in (cut, unreadable, endless, waiting)]


@pytest.fixture(scope="module")
def starts(tmp_path_factory, shelf):
    """First losses of undisturbed runs: of all candidates, without the last, with another last one, and of none."""
    known = {}
    for kind in TRAINERS:
        directory = tmp_path_factory.mktemp("starts")
        shutil.copytree(shelf / "library" / kind, directory / "all")
        known[kind] = [train(kind, directory / "out", directory / "all/*")[1], losses_without(kind, directory)]
        rewritten(directory / "all/run-2")
        known[kind].append(train(kind, directory / "out", directory / "all/*")[1])
        vanish(directory / "all/run-2")
        known[kind].append(train(kind, directory / "out", directory / "all/*")[1])
        assert len(set(map(str, known[kind]))) == 4
    return known


@pytest.mark.parametrize(("kind", "fault"), CASES)
def test_a_candidate_that_changes_at_any_stage(tmp_path, shelf, starts, kind, fault, monkeypatch):
    # Nothing is kept in memory, so that the file is read again.
    monkeypatch.setattr(mashup_callback.lora.source, "KEPT_BYTES", 0)
    for stage in STAGES:
        home = tmp_path / stage
        shutil.copytree(shelf / "library" / kind, home / "runs")
        original = getattr(pipeline, stage)

        def broken(*args, home=home, original=original, **kwargs):
            fault(home / "runs/run-2")
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, stage, broken)
            report, found = train(kind, home / "out", home / "runs/*", on_error="raise")
        assert found in starts[kind], (stage, report.reason)
        assert report.decision == ("merged" if found != starts[kind][1] else "scratch")
        assert not hidden(home / "out")


def test_two_runs_share_everything_while_a_third_rewrites(tmp_path, shelf, monkeypatch):
    shutil.copytree(shelf / "library/lora", tmp_path / "runs")
    monkeypatch.setenv("MASHUP_CACHE", str(tmp_path / "scores"))
    victim = tmp_path / "runs/run-2/adapter_model.safetensors"
    versions = [victim.read_bytes(), (tmp_path / "runs/run-1/adapter_model.safetensors").read_bytes()]
    runs = [[build("lora", tmp_path / "out", tmp_path / "runs/*") for _ in range(3)] for _ in range(2)]

    def share(number):
        for turn, (trainer, callback) in enumerate(runs[number]):
            trainer.train()
            assert callback.report.decision == "merged", callback.report.reason
            (tmp_path / f"report-{number}-{turn}.json").write_text(callback.report.to_json())

    def rewrite():
        # Half of it, and the other half a little later.
        for content in itertools.cycle(versions):
            with victim.open("r+b") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                time.sleep(0.002)
                file.write(content[len(content) // 2 :])
            time.sleep(0.02)

    rewriting = begin(rewrite)
    children = [begin(partial(share, number)) for number in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    os.kill(rewriting, signal.SIGKILL)
    assert os.waitpid(rewriting, 0)[1] == signal.SIGKILL
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("report-*.json")]
    assert len(reports) == 6
    last = json.loads((tmp_path / "out/mashup/report.json").read_text())
    assert last["candidates"] in [report["candidates"] for report in reports]
    PeftModel.from_pretrained(llama(), tmp_path / "out/mashup")
    assert not hidden(tmp_path / "out") and not hidden(tmp_path / "scores")


# Signals.


@pytest.mark.parametrize("handled", [False, True], ids=["default", "handler"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_sigterm_leaves_no_file(tmp_path, shelf, kind, handled, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("MASHUP_CACHE", str(tmp_path / "scores"))
    (tmp_path / "out").mkdir()
    trainer, _ = build(kind, tmp_path / "out", shelf / f"library/{kind}/*")

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
