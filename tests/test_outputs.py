"""What a run leaves and sends: its report, scalars for trackers, tags, and pushes after a resume."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback, TrainerState, TrainingArguments

from mashup_callback import MashupCallback, MashupReport
from tests.tiny import sft_trainer, trained


def test_the_scalars_reach_the_trackers_of_a_bound_trainer(tmp_path, library):
    names = ("base_loss", "single_loss", "merged_loss", "decision", "k", "kept_energy", "seconds")
    scalars, logged, pictures = {f"mashup/{name}" for name in names}, [], []

    class Tracker(TrainerCallback):
        # As transformers' TensorBoardCallback and WandbCallback hold what they log to.
        tb_writer = SimpleNamespace(add_image=lambda name, image, step, dataformats: pictures.append(image.shape))
        _wandb = SimpleNamespace(log=pictures.append, Image=lambda path: Path(path).name)

        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(set(logs))

    callback = MashupCallback(str(library / "trained-*"))
    trainer = sft_trainer(tmp_path / "out", callbacks=[Tracker(), callback])
    callback.bind(trainer)
    trainer.train()
    assert scalars <= logged[0]
    assert [scalars <= set(entry) for entry in trainer.state.log_history].count(True) == 1
    assert trainer.model.model_tags.count("mashup") == 1
    assert len(pictures[0]) == 3 and pictures[1:] == [{"mashup/ranking": "ranking.png"}]
    # The trained model's folder tells of it, whoever writes its card.
    trainer.save_model(str(tmp_path / "saved"))
    trainer.create_model_card()
    for card in (tmp_path / "saved/README.md", tmp_path / "out/README.md"):
        assert "- mashup\n" in card.read_text()


def test_report_on_disk_and_in_the_log(tmp_path, library, capsys):
    callback = MashupCallback(str(library / "*"))
    trainer = trained(tmp_path / "out", callback)
    report = MashupReport.load(tmp_path / "out/mashup")
    assert report == callback.report
    scalars = {"mashup/base_loss", "mashup/merged_loss", "mashup/seconds"}
    assert scalars <= set(trainer.state.log_history[0])
    assert (tmp_path / "out/mashup/ranking.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert f"mashup: {report.decision}" in shown and "held-out loss" in shown
    assert sum(report.timings.values()) == pytest.approx(report.seconds)
    assert not list((tmp_path / "out").glob(".mashup*"))


def test_a_directory_that_is_no_mashups_is_never_replaced(tmp_path, library):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/precious.txt").write_text("mine")
    callback = MashupCallback(str(library / "trained-*"), report_dir=str(tmp_path / "reports"))
    with pytest.raises(ValueError, match=r"precious\.txt and would be replaced"):
        trained(tmp_path / "out", callback)
    assert (tmp_path / "reports/precious.txt").read_text() == "mine"


def test_push_after_a_resume(tmp_path, library, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trained(tmp_path / "out", MashupCallback(str(library / "*"), guard=False), **settings)
    callback, pushed = MashupCallback(str(library / "*")), []
    trainer = sft_trainer(tmp_path / "out", callbacks=[callback], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    monkeypatch.setattr("mashup_callback.callback.push_mashup", lambda *args, license: pushed.append(args))
    callback.push_to_hub("acme/start")
    assert pushed == [(tmp_path / "out/mashup", "acme/start", None, False)]


@pytest.mark.parametrize("text", ["{", "[]", '{"decision": "merged", "reason": "", "schema": 99}', "\x00"])
def test_a_broken_report_does_not_stop_a_push(tmp_path, library, caplog, text):
    (tmp_path / "out/mashup").mkdir(parents=True)
    (tmp_path / "out/mashup/report.json").write_text(text)
    callback, state = MashupCallback(str(library / "*")), TrainerState(global_step=3)
    callback.on_push_begin(TrainingArguments(str(tmp_path / "out"), use_cpu=True), state, None)
    assert "are pushed as they are" in caplog.text


def test_a_terminal_that_cannot_show_the_table_costs_nothing_else(tmp_path, library, monkeypatch, caplog):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    callback = MashupCallback(str(library / "trained-*"))
    sft_trainer(tmp_path / "out", callbacks=[callback], max_steps=1).train()
    assert "could not be shown" in caplog.text
    assert MashupReport.load(tmp_path / "out") == callback.report and callback.report.decision != "scratch"
    failing = MashupCallback(str(library / "trained-*"), report_dir=str(tmp_path / "report"))
    monkeypatch.setattr("mashup_callback.pipeline.choose", lambda *args: None)
    sft_trainer(tmp_path / "out", callbacks=[failing], max_steps=1).train()
    assert MashupReport.load(tmp_path / "report").decision == "scratch"


def test_a_home_in_report_dir_is_the_users(tmp_path, library, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    callback = MashupCallback(str(library / "trained-*"), report_dir="~/report")
    sft_trainer(tmp_path / "out", callbacks=[callback], max_steps=1).train()
    assert MashupReport.load(tmp_path / "report") == callback.report
