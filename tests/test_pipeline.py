"""What fails on the way never stops a run, never trains from something else, and is told."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from mashup_callback import MashupCallback
from mashup_callback.lora.source import LoraUpdate
from mashup_callback.lora.trainee import LoraTrainee
from mashup_callback.lowrank import LoraFactors
from tests.full_model import same
from tests.snapshot import Snapshot, run_with_snapshots
from tests.tiny import llama, losses, save_random_adapter, trained


def test_rejected_candidates_never_stop_a_run(tmp_path, library):
    save_random_adapter(tmp_path / "runs/wide", 0, base=llama(hidden_size=64))
    (tmp_path / "runs/broken").mkdir(parents=True)
    (tmp_path / "runs/broken/adapter_config.json").write_text("{")
    (tmp_path / "runs/broken/adapter_model.safetensors").write_bytes(b"\0" * 100)
    save_random_adapter(tmp_path / "runs/nan", 1, scale=float("nan"))
    callback = MashupCallback([str(tmp_path / "runs/*"), str(library / "trained-0")])
    trained(tmp_path / "out", callback)
    report = callback.report
    assert report.decision == "single"
    rejected = {Path(row.name).name: row.reason for row in report.candidates if row.status == "rejected"}
    assert set(rejected) == {"wide", "broken", "nan"} and all(rejected.values())


def test_first_run_of_a_team_trains_from_scratch(tmp_path, caplog, capsys):
    callback = MashupCallback(str(tmp_path / "runs/*"))
    trained(tmp_path / "out", callback)
    assert callback.report.decision == "scratch" and "no candidate was found" in callback.report.reason
    shown = capsys.readouterr().out
    assert "Training starts from the fresh initialization: no candidate was found in" in " ".join(shown.split())
    # One friendly line: no table, no warning of a failure, no name of an exception.
    assert not {"┃", "Error", "best single"} & {*shown, *shown.split()} and "No mashup" not in caplog.text
    with pytest.raises(RuntimeError, match="no candidate was found"):
        trained(tmp_path / "o2", MashupCallback(str(tmp_path / "runs/*"), on_error="raise"))


def test_failed_stage_obeys_on_error(tmp_path, library, monkeypatch):
    monkeypatch.setattr("mashup_callback.pipeline.choose", lambda *args: SimpleNamespace(nothing=1))
    callback = MashupCallback(str(library / "trained-*"))
    trainer = trained(tmp_path / "out", callback)
    assert callback.report.decision == "scratch" and "AttributeError" in callback.report.reason
    assert losses(trainer) == losses(trained(tmp_path / "alone"))


def test_method_that_fails_loses(tmp_path, library, monkeypatch, caplog):
    methods = {"linear": {}, "ties": {"density": "none"}}
    monkeypatch.setattr("mashup_callback.guard.AUTO_METHODS", methods)
    settings = {"merge_method": "auto", "on_error": "raise", "guard": False}
    callback = MashupCallback(str(library / "trained-*"), **settings)
    trained(tmp_path / "out", callback, max_steps=1)
    assert callback.report.merge.method == "linear" and "a method that failed: ties" in caplog.text
    del methods["linear"]
    failing = MashupCallback(str(library / "trained-*"), **settings)
    with pytest.raises(RuntimeError, match=r"Every method .* failed"):
        trained(tmp_path / "none", failing, max_steps=1)


def is_merge(snapshot):
    """Whether the adapter holds an update, which a fresh one does not."""
    return any(value.any() for name, value in snapshot.values.items() if "lora_B" in name)


def test_report_that_cannot_be_saved_does_not_hide_the_swap(tmp_path, library, monkeypatch):
    monkeypatch.setattr("mashup_callback.pipeline.save_mashup", Mock(side_effect=ValueError("no place")))
    callback, after = MashupCallback(str(library / "trained-*")), Snapshot()
    trained(tmp_path / "out", callback, after, max_steps=1)
    assert callback.report.decision in ("merged", "single")
    assert is_merge(after)


def test_failure_after_the_swap_says_what_is_in_the_model(tmp_path, library, monkeypatch, caplog):
    gone = Mock(side_effect=ValueError("the other process is gone"))
    monkeypatch.setattr("mashup_callback.pipeline.MashupRun._save", gone)
    callback, after = MashupCallback(str(library / "trained-*")), Snapshot()
    trained(tmp_path / "out", callback, after, max_steps=1)
    assert is_merge(after)
    assert callback.report.decision in ("merged", "single") and callback.report.merge is not None
    assert "something failed after it was written" in caplog.text and "the other process is gone" in caplog.text
    assert "fresh initialization: " not in caplog.text


def test_failed_swap_is_scratch(tmp_path, library, monkeypatch):
    monkeypatch.setattr("mashup_callback.swap._check_written", Mock(side_effect=RuntimeError("it does not hold")))
    callback = MashupCallback(str(library / "trained-*"))
    _, before, after = run_with_snapshots(tmp_path / "out", callback, max_steps=1)
    assert callback.report.decision == "scratch" and "it does not hold" in callback.report.reason
    assert same(before.values, after.values)


def test_loss_after_the_swap_is_what_the_guard_found(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"), on_error="raise")
    trained(tmp_path / "out", callback, max_steps=1)
    assert callback.report.swapped_loss == pytest.approx(callback.report.expected_loss, abs=1e-5)
    assert abs(callback.report.swapped_loss - callback.report.base_loss) > 0.01


@pytest.mark.parametrize(("factor", "decision"), [(-3.0, "scratch"), (0.5, "merged")])
def test_swap_that_computes_something_else_is_told(tmp_path, library, monkeypatch, caplog, factor, decision):
    def write_other(self, update):
        other = {n: LoraFactors(f.A, factor * f.B, f.scaling) for n, f in update.factors.items()}
        write(self, LoraUpdate(other))

    write = LoraTrainee.write
    monkeypatch.setattr(LoraTrainee, "write", write_other)
    # In float32 on a CPU there is next to no rounding.
    monkeypatch.setattr("mashup_callback.verification._tolerance", lambda model: 0.005 / 5)
    monkeypatch.setattr("mashup_callback.guard._decide", lambda *args: "merged")
    callback = MashupCallback(str(library / "trained-*"))
    _, before, after = run_with_snapshots(tmp_path / "out", callback, max_steps=1)
    report = callback.report
    assert report.decision == decision and "after the swap the loss on one held-out batch is" in report.reason
    assert report.swapped_loss > report.expected_loss + 0.02 and "does not compute" in caplog.text
    assert same(before.values, after.values) == (decision == "scratch")
    assert before.random == after.random
