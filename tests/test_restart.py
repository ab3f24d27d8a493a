"""A run that was killed after its mashup and is started again, against the same run from the beginning."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from mashup_callback import MashupCallback, MashupReport
from tests.full import full_trainer, same, save_models, weights
from tests.tiny import llama, lora, lora_parameters, losses, rows, save_scaled_adapter, sft_trainer


class Killed(TrainerCallback):
    """Counts the forward passes before the first step, keeps what training starts from, and ends the run there."""

    def __init__(self, killed: bool = True) -> None:
        self.killed, self.passes = killed, 0

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.handle = model.register_forward_pre_hook(self._count)

    def _count(self, *args):
        self.passes += 1

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.handle.remove()
        self.start = weights(model)
        if self.killed:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def no_scores_are_kept(monkeypatch):
    monkeypatch.setenv("MASHUP_CACHE", "")


def start(output_dir: Path, candidates: str, killed: bool = False, trainer=sft_trainer, settings=None, **arguments):
    callback, probe = MashupCallback(candidates, **(settings or {})), Killed(killed)
    made = trainer(output_dir, callbacks=[callback, probe], **arguments)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            made.train()
    else:
        made.train()
    return made, callback, probe


def killed_and_again(tmp_path: Path, candidates: str, **second):
    _, first, begun = start(tmp_path / "run", candidates, killed=True)
    assert begun.passes > 0 and not first.report.reused
    return first.report, begun, *start(tmp_path / "run", candidates, **second)


@pytest.fixture
def runs(tmp_path, library):
    for seed in range(3):
        save_scaled_adapter(tmp_path / f"candidates/{seed}", library / f"trained-{seed}", 1.0)
    return str(tmp_path / "candidates/*")


@pytest.mark.parametrize("scale", [1.0, -1.0], ids=["merged", "scratch"])
def test_a_killed_run_uses_its_mashup_again(tmp_path, library, scale):
    for seed in range(3):
        save_scaled_adapter(tmp_path / f"candidates/{seed}", library / f"trained-{seed}", scale)
    candidates = str(tmp_path / "candidates/*")
    report, begun, trainer, callback, again = killed_and_again(tmp_path, candidates)
    assert report.decision != "scratch" if scale > 0 else report.decision == "scratch"
    assert again.passes == 0
    assert same(again.start, begun.start)
    assert callback.report.reused and MashupReport.load(tmp_path / "run/mashup") == callback.report
    assert callback.report.candidates == report.candidates and callback.report.reason == report.reason
    uninterrupted, _, _ = start(tmp_path / "other", candidates)
    assert losses(trainer) == losses(uninterrupted)
    assert same(lora_parameters(trainer.model), lora_parameters(uninterrupted.model))


def test_the_trainees_precision_survives(tmp_path, runs):
    arguments = {"bf16": True, "peft_config": lora(r=6, lora_alpha=5)}
    _, _, begun = start(tmp_path / "run", runs, killed=True, **arguments)
    _, callback, again = start(tmp_path / "run", runs, **arguments)
    assert callback.report.reused and same(again.start, begun.start)


def _changed_file(tmp_path):
    path = tmp_path / "candidates/0/adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path)


def _new_candidate(tmp_path):
    save_scaled_adapter(tmp_path / "candidates/3", tmp_path / "candidates/0", 0.5)


def _broken_merge(tmp_path):
    os.truncate(tmp_path / "run/mashup/adapter_model.safetensors", 100)


def _no_report(tmp_path):
    (tmp_path / "run/mashup/report.json").write_text("{")


@pytest.mark.parametrize("change", [_changed_file, _new_candidate, _broken_merge, _no_report])
def test_other_files_make_another_mashup(tmp_path, runs, change):
    start(tmp_path / "run", runs, killed=True)
    change(tmp_path)
    _, callback, probe = start(tmp_path / "run", runs)
    assert probe.passes > 0 and not callback.report.reused
    assert callback.report.decision != "scratch"


@pytest.mark.parametrize(
    "second",
    [
        {"settings": {"top_k": 2}},
        {"settings": {"sample_size": 16}},
        {"train_rows": rows(seed=9)},
        {"model": llama(seed=9)},
        {"peft_config": lora(r=2)},
        {"settings": {"guard_dataset": [{"input_ids": [*range(7, 20)], "labels": [*range(7, 20)]}] * 8}},
    ],
    ids=["k", "sample", "data", "base", "rank", "guard"],
)
def test_other_inputs_make_another_mashup(tmp_path, runs, second):
    *_, callback, probe = killed_and_again(tmp_path, runs, **second)
    assert probe.passes > 0 and not callback.report.reused


def test_a_callable_cannot_be_compared(tmp_path, runs):
    def metric(model, batch):
        return model(**batch).loss.item(), 1.0

    start(tmp_path / "run", runs, killed=True, settings={"metric": metric})
    _, callback, probe = start(tmp_path / "run", runs, settings={"metric": metric})
    assert probe.passes > 0 and callback.report.inputs is None


def test_a_failed_mashup_is_tried_again(tmp_path, runs):
    nothing = str(tmp_path / "candidates/9*")
    _, callback, _ = start(tmp_path / "run", nothing, killed=True)
    assert callback.report.decision == "scratch" and callback.report.inputs is None


def test_a_killed_full_run_uses_its_mashup_again(tmp_path):
    candidates = f"{save_models(tmp_path / 'full', 2)}/*"
    _, first, begun = start(tmp_path / "run", candidates, killed=True, trainer=full_trainer)
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/mashup").glob("*.safetensors")}
    _, callback, again = start(tmp_path / "run", candidates, trainer=full_trainer)
    assert first.report.decision != "scratch" and shards
    assert again.passes == 0 and callback.report.reused
    assert same(again.start, begun.start) and not same(again.start, weights(llama()))
    found = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/mashup").glob("*.safetensors")}
    assert found == shards


def test_masks_drawn_at_random_are_the_same_inputs(tmp_path, runs):
    seeds = itertools.count()

    class Elsewhere(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            torch.manual_seed(next(seeds))

    def trainer(output_dir, callbacks, **arguments):
        made = sft_trainer(output_dir, callbacks=[Elsewhere(), *callbacks], **arguments)
        made.data_collator = _masking(made.data_collator)
        return made

    _, first, begun = start(tmp_path / "run", runs, killed=True, trainer=trainer)
    _, callback, again = start(tmp_path / "run", runs, trainer=trainer)
    assert begun.passes > 0 and first.report.inputs is not None
    assert again.passes == 0 and callback.report.reused
    assert same(again.start, begun.start)


def _masking(collate):
    def masked(rows):
        batch = collate(rows)
        drawn = torch.rand(batch["labels"].shape) < 0.3
        return batch | {"labels": batch["labels"].masked_fill(drawn, -100)}

    return masked


def test_a_report_that_cannot_be_saved_again_does_not_hide_the_swap(tmp_path, runs, monkeypatch):
    first, begun, *_ = killed_and_again(tmp_path, runs)
    saved = (tmp_path / "run/mashup/report.json").read_text()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(MashupReport, "save", fail)
    _, callback, again = start(tmp_path / "run", runs)
    assert callback.report.reused and callback.report.decision == first.decision != "scratch"
    assert same(again.start, begun.start)
    assert (tmp_path / "run/mashup/report.json").read_text() == saved


def test_the_report_says_so(tmp_path, runs, capsys):
    killed_and_again(tmp_path, runs)
    assert "made by an earlier start of this run" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/mashup/report.json").read_text())["reused"] is True
