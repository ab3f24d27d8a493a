"""The whole way through a real SFTTrainer, against the same run without the callback."""

import io
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from mashup_callback import MashupCallback, MashupConfig, MashupReport, score_candidates
from mashup_callback.lora.source import LoraUpdate
from mashup_callback.lora.trainee import LoraTrainee
from mashup_callback.lowrank import LoraFactors
from tests.full_model import full_trainer, save_models
from tests.tiny import (
    LINEAR,
    llama,
    lora,
    lora_parameters,
    losses,
    rows,
    save_random_adapter,
    save_scaled_adapter,
    sft_trainer,
)


class Snapshot(TrainerCallback):
    """What a model and the random number generators look like when training begins."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.parameters = {name: id(value) for name, value in model.named_parameters()}
        self.optimized = [id(value) for group in optimizer.param_groups for value in group["params"]]
        self.flags = {name: value.requires_grad for name, value in model.named_parameters()}
        self.training = {name: module.training for name, module in model.named_modules()}
        self.hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        self.active = list(model.active_adapters) if isinstance(model, PeftModel) else model.active_adapters()
        self.values = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.random = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        self.use_cache = model.config.use_cache


def run_with_snapshots(output_dir, callback, **settings):
    before, after = Snapshot(), Snapshot()
    trainer = sft_trainer(output_dir, callbacks=[before, callback, after], **settings)
    trainer.train()
    return trainer, before, after


def test_scratch_is_bit_identical_to_no_callback(tmp_path, library):
    for seed in range(3):
        save_scaled_adapter(tmp_path / "runs" / str(seed), library / f"trained-{seed}", -1.0)
    config = lora(lora_dropout=0.3)
    callback = MashupCallback(str(tmp_path / "runs/*"), top_k=2)
    trainer = sft_trainer(tmp_path / "with", callbacks=[callback], peft_config=config)
    trainer.train()
    alone = sft_trainer(tmp_path / "without", peft_config=config)
    alone.train()
    assert callback.report.decision == "scratch"
    assert "better than a fresh initialization" in callback.report.reason
    assert losses(trainer) == losses(alone)
    weights = lora_parameters(alone.model)
    assert all(torch.equal(value, weights[name]) for name, value in lora_parameters(trainer.model).items())


def test_first_loss_after_the_swap_is_that_of_the_saved_merge(tmp_path, library):
    batches = []

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            handle = model.register_forward_pre_hook(
                lambda module, args, kwargs: batches.append(kwargs) or handle.remove(), with_kwargs=True
            )

    callback = MashupCallback(str(library / "trained-*"))
    trainer = sft_trainer(tmp_path / "out", callbacks=[callback, Keep()])
    trainer.train()
    assert callback.report.decision in ("merged", "single")
    batch = {name: batches[0][name] for name in ("input_ids", "attention_mask", "labels")}
    [score] = score_candidates(llama(), [tmp_path / "out/mashup"], [batch])
    # What the logged loss is divided by: transformers 5.0 counts the labels before it shifts them.
    _, counted = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    logged = losses(trainer)[0] * float(counted / (batch["labels"][:, 1:] != -100).sum())
    assert score.loss == pytest.approx(logged, abs=1e-5)
    fresh = sft_trainer(tmp_path / "fresh")
    fresh.train()
    assert losses(trainer)[0] < losses(fresh)[0] - 0.05


def test_saved_merge_is_what_the_trainee_holds(tmp_path, library):
    after = Snapshot()
    callback = MashupCallback(str(library / "trained-*"), guard=False)
    trainer = sft_trainer(tmp_path / "out", callbacks=[callback, after])
    trainer.train()
    saved = load_file(tmp_path / "out/mashup/adapter_model.safetensors")
    held = {name: value for name, value in after.values.items() if "lora_" in name}
    assert len(saved) == len(held)
    for name, value in saved.items():
        assert torch.equal(value, held[name.replace(".weight", ".default.weight")]), name


def test_nothing_but_the_weights_of_the_adapter_changes(tmp_path, library):
    callback = MashupCallback(str(library / "*"))
    _, before, after = run_with_snapshots(tmp_path / "out", callback, peft_config=lora(lora_dropout=0.1))
    assert callback.report.decision != "scratch"
    for what in ("parameters", "optimized", "flags", "training", "hooks", "active", "random", "use_cache"):
        assert getattr(before, what) == getattr(after, what), what
    changed = {name for name, value in before.values.items() if not torch.equal(value, after.values[name])}
    assert changed == {name for name in before.values if "lora_" in name}


def test_a_collator_that_draws_random_numbers_draws_none_of_the_runs(tmp_path, library):
    callback, before, after = MashupCallback(str(library / "trained-*")), Snapshot(), Snapshot()
    trainer = sft_trainer(tmp_path / "out", callbacks=[before, callback, after])
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: collate(rows) | {"drawn": torch.rand(len(rows), 1)}
    trainer.model.register_forward_pre_hook(_without_drawn, with_kwargs=True)
    trainer.train()
    assert before.random == after.random


def _without_drawn(module, args, inputs):
    return args, {name: value for name, value in inputs.items() if name != "drawn"}


def test_other_adapters_on_the_model_are_left_alone(tmp_path, library):
    model = get_peft_model(llama(), lora())
    model.add_adapter("reference", lora(init_lora_weights=False))
    callback = MashupCallback(str(library / "trained-*"))
    trainer, before, after = run_with_snapshots(tmp_path / "out", callback, model=model)
    assert callback.report.decision != "scratch"
    assert before.flags == after.flags
    assert trainer.model.active_adapters == ["default"]
    for name, value in before.values.items():
        if "reference" in name:
            assert torch.equal(value, after.values[name]), name


def test_model_with_transformers_own_adapter(tmp_path, library):
    model = llama()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR))
    callback = MashupCallback(str(library / "trained-*"), on_error="raise")
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    tokens = [{"input_ids": list(range(7 + n, 20 + n)), "labels": list(range(7 + n, 20 + n))} for n in range(16)]
    before, after = Snapshot(), Snapshot()
    Trainer(model, arguments, train_dataset=tokens, callbacks=[before, callback, after]).train()
    assert callback.report.decision != "scratch"
    assert (before.flags, before.active, before.training) == (after.flags, after.active, after.training)
    changed = {name for name, value in before.values.items() if not torch.equal(value, after.values[name])}
    assert changed == {name for name in before.values if "lora_" in name}


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 9, "lora_alpha": 3}, {"r": 6, "use_rslora": True}])
@pytest.mark.parametrize("candidate", [{}, {"use_rslora": True, "lora_alpha": 5}])
def test_one_candidate_is_the_identity(tmp_path, settings, candidate):
    save_random_adapter(tmp_path / "one", 3, **candidate)
    after = Snapshot()
    callback = MashupCallback(str(tmp_path / "one"), top_k=1, guard=False)
    trainer = sft_trainer(tmp_path / "out", callbacks=[callback, after], peft_config=lora(**settings))
    trainer.train()
    expected = PeftModel.from_pretrained(llama(), tmp_path / "one").base_model.model
    for name, layer in trainer.model.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            prefix = f"base_model.model.{name}"
            A, B = (after.values[f"{prefix}.lora_{factor}.default.weight"] for factor in "AB")
            other = expected.get_submodule(name).get_delta_weight("default")
            assert (layer.scaling["default"] * B @ A - other).norm() <= 1e-5 * other.norm()
            # The ranks that the merge leaves free can still learn: fresh A, zero B.
            assert bool((A[4:].norm(dim=1) > 0).all()) and bool((B[:, 4:] == 0).all())


def test_one_good_adapter_among_bad_ones_is_found(tmp_path, library):
    for seed in range(9):
        save_scaled_adapter(tmp_path / "runs" / f"bad-{seed}", library / f"trained-{seed % 3}", -1.0 - 0.1 * seed)
    specs = [str(tmp_path / "runs/*"), str(library / "trained-0")]
    callback = MashupCallback(specs)
    sft_trainer(tmp_path / "out", callbacks=[callback]).train()
    assert callback.report.decision == "single"
    assert callback.report.candidates[0].name.endswith("trained-0")
    assert callback.report.candidates[0].weight == 1.0
    assert callback.report.single_loss < callback.report.base_loss


def test_dry_run_reports_and_leaves_the_model_alone(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"), dry_run=True)
    trainer = sft_trainer(tmp_path / "out", callbacks=[callback])
    trainer.train()
    alone = sft_trainer(tmp_path / "alone")
    alone.train()
    assert callback.report.decision != "scratch" and callback.report.dry_run
    assert losses(trainer) == losses(alone)


def test_second_train_and_resume_do_not_swap_again(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"))
    trainer = sft_trainer(tmp_path / "out", callbacks=[callback], max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    first = callback.report
    trainer.train()
    assert callback.report is first
    resumed = MashupCallback(str(library / "trained-*"))
    after = Snapshot()
    again = sft_trainer(tmp_path / "out", callbacks=[resumed, after], max_steps=3, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    assert resumed.report is None
    saved = load_file(tmp_path / "out/checkpoint-1/adapter_model.safetensors")
    for name, value in saved.items():
        assert torch.equal(value, after.values[name.replace(".weight", ".default.weight")]), name


def test_a_smaller_batch_after_running_out_of_memory_does_not_swap_again(tmp_path, library):
    class OutOfMemory(TrainerCallback):
        reports, starts, sizes = [], [], []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.reports.append(callback.report)
            self.starts.append(lora_parameters(model))

        def on_step_begin(self, args, state, control, **kwargs):
            self.sizes.append(state.train_batch_size)
            if len(self.sizes) == 1:
                raise RuntimeError("CUDA out of memory.")

    callback, broken = MashupCallback(str(library / "trained-*")), OutOfMemory()
    trainer = sft_trainer(tmp_path / "out", callbacks=[callback, broken], auto_find_batch_size=True)
    trainer.train()
    assert trainer.state.global_step == 3 and broken.sizes[1] < broken.sizes[0]
    assert len(broken.reports) == 2 and broken.reports[0] is broken.reports[1]
    first, again = broken.starts
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(value.any() for name, value in again.items() if "lora_B" in name)


def test_a_new_model_is_a_new_run(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"))
    for name in ("one", "two"):
        sft_trainer(tmp_path / name, callbacks=[callback]).train()
        assert (tmp_path / name / "mashup/report.json").exists()


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
    trainer = sft_trainer(tmp_path / "out", callbacks=[callback])
    trainer.train()
    report = MashupReport.load(tmp_path / "out/mashup")
    assert report == callback.report
    scalars = {"mashup/base_loss", "mashup/merged_loss", "mashup/seconds"}
    assert scalars <= set(trainer.state.log_history[0])
    assert (tmp_path / "out/mashup/ranking.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert f"mashup: {report.decision}" in shown and "held-out loss" in shown
    assert sum(report.timings.values()) == pytest.approx(report.seconds)
    assert not list((tmp_path / "out").glob(".mashup*"))


def test_own_output_and_mashups_are_never_candidates(tmp_path, library):
    output = tmp_path / "runs/new"
    save_random_adapter(output / "checkpoint-5", 0)
    save_random_adapter(tmp_path / "runs/old/mashup", 1)
    save_random_adapter(tmp_path / "runs/old", 2)
    callback = MashupCallback(str(tmp_path / "runs/*"))
    sft_trainer(output, callbacks=[callback]).train()
    assert [Path(row.name).name for row in callback.report.candidates] == ["old"]


def test_rejected_candidates_never_stop_a_run(tmp_path, library):
    save_random_adapter(tmp_path / "runs/wide", 0, base=llama(hidden_size=64))
    (tmp_path / "runs/broken").mkdir(parents=True)
    (tmp_path / "runs/broken/adapter_config.json").write_text("{")
    (tmp_path / "runs/broken/adapter_model.safetensors").write_bytes(b"\0" * 100)
    save_random_adapter(tmp_path / "runs/nan", 1, scale=float("nan"))
    callback = MashupCallback([str(tmp_path / "runs/*"), str(library / "trained-0")])
    sft_trainer(tmp_path / "out", callbacks=[callback]).train()
    report = callback.report
    assert report.decision == "single"
    rejected = {Path(row.name).name: row.reason for row in report.candidates if row.status == "rejected"}
    assert set(rejected) == {"wide", "broken", "nan"} and all(rejected.values())


def test_first_run_of_a_team_trains_from_scratch(tmp_path, caplog, capsys):
    callback = MashupCallback(str(tmp_path / "runs/*"))
    sft_trainer(tmp_path / "out", callbacks=[callback]).train()
    assert callback.report.decision == "scratch" and "no candidate was found" in callback.report.reason
    shown = capsys.readouterr().out
    assert "Training starts from the fresh initialization: no candidate was found in" in " ".join(shown.split())
    # One friendly line: no table, no warning of a failure, no name of an exception.
    assert not {"┃", "Error", "best single"} & {*shown, *shown.split()} and "No mashup" not in caplog.text
    with pytest.raises(RuntimeError, match="no candidate was found"):
        sft_trainer(tmp_path / "o2", callbacks=[MashupCallback(str(tmp_path / "runs/*"), on_error="raise")]).train()


def test_user_mistakes_raise_before_any_work(tmp_path, library):
    with pytest.raises(TypeError, match="Did you mean `top_k`"):
        MashupCallback(str(library / "*"), topk=3)
    with pytest.raises(ValueError, match="does not exist"):
        MashupCallback(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="task_arithmetic"):
        MashupCallback(str(library / "*"), merge_method="tiess")
    with pytest.raises(ValueError, match="weights"):
        MashupCallback(str(library / "*"), weights=[1, 2])
    with pytest.raises(ValueError, match="`?t`?"):
        MashupCallback(str(library / "*"), merge_method="nearswap", top_k=2)
    with pytest.raises(ValueError, match="slerp"):
        MashupCallback(str(library / "*"), merge_method="slerp", top_k=3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(init_lora_weights="pissa"), "alters the base weights"),
        (lora(init_lora_weights="olora"), "alters the base weights"),
        (lora(init_lora_weights=False), "not fresh"),
        (lora(alora_invocation_tokens=[3]), "more than scaling"),
    ],
)
def test_unfit_trainees_are_refused(tmp_path, library, config, message):
    trainer = sft_trainer(tmp_path / "out", callbacks=[MashupCallback(str(library / "*"))], peft_config=config)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_an_optimizer_without_what_is_trained_is_refused(tmp_path, library):
    model = llama()
    optimizer = torch.optim.AdamW(list(model.parameters()), lr=1e-3)
    trainer = sft_trainer(tmp_path / "out", model=model, callbacks=[MashupCallback(str(library / "*"))])
    trainer.optimizer = optimizer
    with pytest.raises(ValueError, match="holds none of the parameters that are trained"):
        trainer.train()


def test_overwrite_accepts_a_trained_adapter(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"), overwrite=True)
    config = lora(init_lora_weights=False)
    sft_trainer(tmp_path / "out", callbacks=[callback], peft_config=config).train()
    assert callback.report.decision != "scratch"


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": "auto"},
        {"merge_method": "auto"},
        {"merge_method": "ties", "merge_parameters": {"density": 0.5}, "merge_space": "core"},
        {"merge_space": "factors"},
        {"merge_method": "slerp", "top_k": 2},
        {"weights": "softmax", "search": "exhaustive"},
        {"weights": [3, 2, 1]},
        {"metric": "token_accuracy", "batch_size": 3},
    ],
    ids=str,
)
def test_settings(tmp_path, library, settings):
    callback = MashupCallback(str(library / "trained-*"), on_error="raise", guard=False, **settings)
    trainer = sft_trainer(tmp_path / "out", callbacks=[callback], max_steps=1)
    trainer.train()
    report = callback.report
    assert report.decision in ("merged", "single")
    used = [row.weight for row in report.candidates if row.weight]
    assert 1 <= len(used) <= 3
    assert report.merge.kept_energy > 0
    assert losses(trainer)[0] < 4.6


def test_callable_metric(tmp_path, library):
    seen = []

    def metric(model, batch):
        seen.append(model.training)
        return 2 * model(**batch).loss.item() * 10, 10

    callback = MashupCallback(str(library / "trained-*"), metric=metric)
    sft_trainer(tmp_path / "out", callbacks=[callback], max_steps=1).train()
    assert seen and not any(seen)
    assert callback.report.base_loss == pytest.approx(2 * 4.58, rel=0.02)
    assert callback.report.config["metric"].endswith("metric")


def test_targets_that_the_trainee_lacks_are_reported(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"), guard=False)
    config = lora(target_modules=["q_proj", "v_proj", "down_proj"])
    sft_trainer(tmp_path / "out", callbacks=[callback], peft_config=config, max_steps=1).train()
    assert 0 < callback.report.merge.lost_energy < 1
    assert any("gate_proj" in name for name in callback.report.merge.lost_layers)


def test_guard_dataset(tmp_path, library):
    trainer = sft_trainer(tmp_path / "prepared", train_rows=rows(count=8, seed=9))
    callback = MashupCallback(str(library / "trained-*"), guard_dataset=trainer.train_dataset)
    sft_trainer(tmp_path / "out", callbacks=[callback], max_steps=1).train()
    assert callback.report.candidates[0].rows == 32
    raw = MashupCallback(str(library / "trained-*"), guard_dataset=rows(), on_error="raise")
    with pytest.raises(ValueError, match="guard_dataset"):
        sft_trainer(tmp_path / "out2", callbacks=[raw], max_steps=1).train()


def test_failed_stage_obeys_on_error(tmp_path, library, monkeypatch):
    monkeypatch.setattr("mashup_callback.pipeline.choose", lambda *args: SimpleNamespace(nothing=1))
    callback = MashupCallback(str(library / "trained-*"))
    trainer = sft_trainer(tmp_path / "out", callbacks=[callback])
    trainer.train()
    alone = sft_trainer(tmp_path / "alone")
    alone.train()
    assert callback.report.decision == "scratch" and "AttributeError" in callback.report.reason
    assert losses(trainer) == losses(alone)


def test_config_object_and_settings(library):
    callback = MashupCallback(str(library / "*"), config=MashupConfig(top_k=2, seed=7), top_k=1)
    assert (callback.config.top_k, callback.config.seed) == (1, 7)


def test_a_directory_that_is_no_mashups_is_never_replaced(tmp_path, library):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/precious.txt").write_text("mine")
    callback = MashupCallback(str(library / "trained-*"), report_dir=str(tmp_path / "reports"))
    with pytest.raises(ValueError, match=r"precious\.txt and would be replaced"):
        sft_trainer(tmp_path / "out", callbacks=[callback]).train()
    assert (tmp_path / "reports/precious.txt").read_text() == "mine"


def test_a_merge_of_one_is_judged_in_the_form_that_is_written(tmp_path, library):
    half = {"merge_method": "task_arithmetic", "merge_parameters": {"lambda": 0.5}, "top_k": 1}
    held = {}
    for guard in (True, False):
        after = Snapshot()
        callback = MashupCallback(str(library / "trained-0"), guard=guard, **half)
        sft_trainer(tmp_path / str(guard), callbacks=[callback, after], max_steps=1).train()
        assert callback.report.decision == "single"
        held[guard] = after.values
    # The whole adapter is better than half of it, and is what the guard finds; without a guard it is as asked for.
    names = [name for name in held[True] if "lora_A" in name]
    for name in names:
        whole, less = (held[guard][name.replace("lora_A", "lora_B")] @ held[guard][name] for guard in (True, False))
        torch.testing.assert_close(less, whole / 2, atol=1e-5, rtol=1e-4)


def test_report_that_cannot_be_saved_does_not_hide_the_swap(tmp_path, library, monkeypatch):
    def fail(*args):
        raise ValueError("no place")

    monkeypatch.setattr("mashup_callback.pipeline.save_mashup", fail)
    callback, after = MashupCallback(str(library / "trained-*")), Snapshot()
    sft_trainer(tmp_path / "out", callbacks=[callback, after], max_steps=1).train()
    assert callback.report.decision in ("merged", "single")
    assert any(value.any() for name, value in after.values.items() if "lora_B" in name)


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


def test_failure_after_the_swap_says_what_is_in_the_model(tmp_path, library, monkeypatch, caplog):
    def fail(*args):
        raise ValueError("the other process is gone")

    monkeypatch.setattr("mashup_callback.pipeline.MashupRun._save", fail)
    callback, after = MashupCallback(str(library / "trained-*")), Snapshot()
    sft_trainer(tmp_path / "out", callbacks=[callback, after], max_steps=1).train()
    assert any(value.any() for name, value in after.values.items() if "lora_B" in name)
    assert callback.report.decision in ("merged", "single") and callback.report.merge is not None
    assert "something failed after it was written" in caplog.text and "the other process is gone" in caplog.text
    assert "fresh initialization: " not in caplog.text


def test_failed_swap_is_scratch(tmp_path, library, monkeypatch):
    def fail(found, values):
        raise RuntimeError("it does not hold")

    monkeypatch.setattr("mashup_callback.swap._check_written", fail)
    callback = MashupCallback(str(library / "trained-*"))
    _, before, after = run_with_snapshots(tmp_path / "out", callback, max_steps=1)
    assert callback.report.decision == "scratch" and "it does not hold" in callback.report.reason
    assert all(torch.equal(value, after.values[name]) for name, value in before.values.items())


def test_loss_after_the_swap_is_what_the_guard_found(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"), on_error="raise")
    sft_trainer(tmp_path / "out", callbacks=[callback], max_steps=1).train()
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
    same = all(torch.equal(value, after.values[name]) for name, value in before.values.items())
    assert same == (decision == "scratch")
    assert before.random == after.random


def test_method_that_fails_loses(tmp_path, library, monkeypatch, caplog):
    methods = {"linear": {}, "ties": {"density": "none"}}
    monkeypatch.setattr("mashup_callback.guard.AUTO_METHODS", methods)
    settings = {"merge_method": "auto", "on_error": "raise", "guard": False}
    callback = MashupCallback(str(library / "trained-*"), **settings)
    sft_trainer(tmp_path / "out", callbacks=[callback], max_steps=1).train()
    assert callback.report.merge.method == "linear" and "a method that failed: ties" in caplog.text
    del methods["linear"]
    failing = MashupCallback(str(library / "trained-*"), **settings)
    with pytest.raises(RuntimeError, match=r"Every method .* failed"):
        sft_trainer(tmp_path / "none", callbacks=[failing], max_steps=1).train()


def test_bound_trainer_in_full_training_ranks_by_its_own_loss(tmp_path):
    save_models(tmp_path / "runs", 3)
    ranked = {}
    for bound in (True, False):
        callback = MashupCallback(str(tmp_path / "runs/model-*"), on_error="raise")
        trainer = full_trainer(tmp_path / str(bound), callbacks=[callback], max_steps=1)
        if bound:
            callback.bind(trainer)
        trainer.train()
        ranked[bound] = {row.name: row.loss for row in callback.report.candidates}
        assert callback.report.decision in ("merged", "single")
    # One is a mean over batches, the other over tokens.
    assert list(ranked[True]) == list(ranked[False]) and ranked[True] != ranked[False]
    assert ranked[True] == pytest.approx(ranked[False], rel=0.1)


def test_a_score_and_a_metric_exclude_each_other(library):
    def score(model, batch):
        return 0.0

    for settings in ({"metric": "loss"}, {"metric": score}, {"config": MashupConfig(metric="token_accuracy")}):
        with pytest.raises(TypeError, match="`score` and `metric` were both given"):
            MashupCallback(str(library), score=score, **settings)
    for settings in ({"metric": "token_accuracy"}, {"score": score}):
        with pytest.raises(ValueError, match="has a `metric` or `score` of its own"):
            MashupCallback(str(library), **settings).bind(None)


def test_push_after_a_resume(tmp_path, library, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 1}
    sft_trainer(tmp_path / "out", callbacks=[MashupCallback(str(library / "*"), guard=False)], **settings).train()
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


def test_a_path_is_taken_literally(tmp_path, library, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = ["hub:author=me", "two\nlines", "trailing ", "acme/name@main"]
    for seed, name in enumerate(odd):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_scaled_adapter(tmp_path / name, library / f"trained-{seed % 3}", 1.0 + seed / 10)
    callback = MashupCallback([Path(name) for name in odd], guard=False, on_error="raise")
    sft_trainer(tmp_path / "out", callbacks=[callback]).train()
    assert {row.name for row in callback.report.candidates} == set(odd)
    assert all(row.loss is not None for row in callback.report.candidates)
