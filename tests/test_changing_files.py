"""Candidates that are not what they were: the run takes them as they were or as they are, or does without."""

import itertools
import json
import os
import shutil
import signal
import time
from functools import partial

import pytest
from peft import PeftModel

import mashup_callback.lora.source
from mashup_callback import pipeline
from tests.runs import TRAINERS, begin, build, hidden, losses_without, train
from tests.tiny import llama


STAGES = ("find_candidates", "draw_sample", "score_candidates", "choose", "save_mashup")


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
def starts(tmp_path_factory, candidates):
    """First losses of undisturbed runs: of all candidates, without the last, with another last one, and of none."""
    known = {}
    for kind in TRAINERS:
        directory = tmp_path_factory.mktemp("starts")
        shutil.copytree(candidates / kind, directory / "all")
        known[kind] = [train(kind, directory / "out", directory / "all/*")[1], losses_without(kind, directory)]
        rewritten(directory / "all/run-2")
        known[kind].append(train(kind, directory / "out", directory / "all/*")[1])
        vanish(directory / "all/run-2")
        known[kind].append(train(kind, directory / "out", directory / "all/*")[1])
        assert len(set(map(str, known[kind]))) == 4
    return known


@pytest.mark.parametrize(("kind", "fault"), CASES)
def test_a_candidate_that_changes_at_any_stage(tmp_path, candidates, starts, kind, fault, monkeypatch):
    # Nothing is kept in memory, so that the file is read again.
    monkeypatch.setattr(mashup_callback.lora.source, "KEPT_BYTES", 0)
    for stage in STAGES:
        home = tmp_path / stage
        shutil.copytree(candidates / kind, home / "runs")
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


def test_two_runs_share_everything_while_a_third_rewrites(tmp_path, candidates, monkeypatch):
    shutil.copytree(candidates / "lora", tmp_path / "runs")
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
