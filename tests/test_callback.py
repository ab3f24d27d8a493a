"""The whole way through a real SFTTrainer, against the same run without the callback."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from mashup_callback import MashupCallback, score_candidates
from tests.full_model import same
from tests.snapshot import Snapshot, run_with_snapshots
from tests.tiny import (
    LINEAR,
    llama,
    lora,
    lora_parameters,
    losses,
    run_settings,
    save_random_adapter,
    save_scaled_adapter,
    sft_trainer,
    trained,
)


def test_scratch_is_bit_identical_to_no_callback(tmp_path, library):
    for seed in range(3):
        save_scaled_adapter(tmp_path / "runs" / str(seed), library / f"trained-{seed}", -1.0)
    config = lora(lora_dropout=0.3)
    callback = MashupCallback(str(tmp_path / "runs/*"), top_k=2)
    trainer = trained(tmp_path / "with", callback, peft_config=config)
    alone = trained(tmp_path / "without", peft_config=config)
    assert callback.report.decision == "scratch"
    assert "better than a fresh initialization" in callback.report.reason
    assert losses(trainer) == losses(alone)
    assert same(lora_parameters(trainer.model), lora_parameters(alone.model))


def test_first_loss_after_the_swap_is_that_of_the_saved_merge(tmp_path, library):
    batches = []

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            handle = model.register_forward_pre_hook(
                lambda module, args, kwargs: batches.append(kwargs) or handle.remove(), with_kwargs=True
            )

    callback = MashupCallback(str(library / "trained-*"))
    trainer = trained(tmp_path / "out", callback, Keep())
    assert callback.report.decision in ("merged", "single")
    batch = {name: batches[0][name] for name in ("input_ids", "attention_mask", "labels")}
    [score] = score_candidates(llama(), [tmp_path / "out/mashup"], [batch])
    # What the logged loss is divided by: transformers 5.0 counts the labels before it shifts them.
    _, counted = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    logged = losses(trainer)[0] * float(counted / (batch["labels"][:, 1:] != -100).sum())
    assert score.loss == pytest.approx(logged, abs=1e-5)
    assert losses(trainer)[0] < losses(trained(tmp_path / "fresh"))[0] - 0.05


def held_factors(snapshot):
    """The factors in the model, by the names in an adapter's file."""
    return {n.replace(".default.", "."): value for n, value in snapshot.values.items() if "lora_" in n}


def changed(before, after):
    return {name for name, value in before.values.items() if not torch.equal(value, after.values[name])}


def test_saved_merge_is_what_the_trainee_holds(tmp_path, library):
    _, _, after = run_with_snapshots(tmp_path / "out", MashupCallback(str(library / "trained-*"), guard=False))
    saved = load_file(tmp_path / "out/mashup/adapter_model.safetensors")
    assert same(saved, held_factors(after))


def test_nothing_but_the_weights_of_the_adapter_changes(tmp_path, library):
    callback = MashupCallback(str(library / "*"))
    _, before, after = run_with_snapshots(tmp_path / "out", callback, peft_config=lora(lora_dropout=0.1))
    assert callback.report.decision != "scratch"
    for what in ("parameters", "optimized", "flags", "training", "hooks", "active", "random", "use_cache"):
        assert getattr(before, what) == getattr(after, what), what
    assert changed(before, after) == {name for name in before.values if "lora_" in name}


def test_a_collator_that_draws_random_numbers_draws_none_of_the_runs(tmp_path, library):
    callback, before, after = MashupCallback(str(library / "trained-*")), Snapshot(), Snapshot()
    trainer = sft_trainer(tmp_path / "out", callbacks=[before, callback, after])
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: collate(rows) | {"drawn": torch.rand(len(rows), 1)}
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: (args, {n: v for n, v in inputs.items() if n != "drawn"}), with_kwargs=True
    )
    trainer.train()
    assert before.random == after.random


def test_other_adapters_on_the_model_are_left_alone(tmp_path, library):
    model = get_peft_model(llama(), lora())
    model.add_adapter("reference", lora(init_lora_weights=False))
    callback = MashupCallback(str(library / "trained-*"))
    trainer, before, after = run_with_snapshots(tmp_path / "out", callback, model=model)
    assert callback.report.decision != "scratch"
    assert before.flags == after.flags
    assert trainer.model.active_adapters == ["default"]
    assert not [name for name in changed(before, after) if "reference" in name]


def test_model_with_transformers_own_adapter(tmp_path, library):
    model = llama()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR))
    callback = MashupCallback(str(library / "trained-*"), on_error="raise")
    arguments = TrainingArguments(**run_settings(tmp_path / "out", max_steps=1))
    tokens = [{"input_ids": list(range(7 + n, 20 + n)), "labels": list(range(7 + n, 20 + n))} for n in range(16)]
    before, after = Snapshot(), Snapshot()
    Trainer(model, arguments, train_dataset=tokens, callbacks=[before, callback, after]).train()
    assert callback.report.decision != "scratch"
    assert (before.flags, before.active, before.training) == (after.flags, after.active, after.training)
    assert changed(before, after) == {name for name in before.values if "lora_" in name}


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 9, "lora_alpha": 3}, {"r": 6, "use_rslora": True}])
@pytest.mark.parametrize("candidate", [{}, {"use_rslora": True, "lora_alpha": 5}])
def test_one_candidate_is_the_identity(tmp_path, settings, candidate):
    save_random_adapter(tmp_path / "one", 3, **candidate)
    callback = MashupCallback(str(tmp_path / "one"), top_k=1, guard=False)
    trainer, _, after = run_with_snapshots(tmp_path / "out", callback, peft_config=lora(**settings))
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
    trained(tmp_path / "out", callback)
    assert callback.report.decision == "single"
    assert callback.report.candidates[0].name.endswith("trained-0")
    assert callback.report.candidates[0].weight == 1.0
    assert callback.report.single_loss < callback.report.base_loss


def test_dry_run_reports_and_leaves_the_model_alone(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"), dry_run=True)
    trainer = trained(tmp_path / "out", callback)
    assert callback.report.decision != "scratch" and callback.report.dry_run
    assert losses(trainer) == losses(trained(tmp_path / "alone"))


def test_second_train_and_resume_do_not_swap_again(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"))
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = trained(tmp_path / "out", callback, max_steps=2, **saving)
    first = callback.report
    trainer.train()
    assert callback.report is first
    resumed = MashupCallback(str(library / "trained-*"))
    after = Snapshot()
    again = sft_trainer(tmp_path / "out", callbacks=[resumed, after], max_steps=3, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    assert resumed.report is None
    assert same(load_file(tmp_path / "out/checkpoint-1/adapter_model.safetensors"), held_factors(after))


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
    trainer = trained(tmp_path / "out", callback, broken, auto_find_batch_size=True)
    assert trainer.state.global_step == 3 and broken.sizes[1] < broken.sizes[0]
    assert len(broken.reports) == 2 and broken.reports[0] is broken.reports[1]
    first, again = broken.starts
    assert same(first, again)
    assert any(value.any() for name, value in again.items() if "lora_B" in name)


def test_a_new_model_is_a_new_run(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"))
    for name in ("one", "two"):
        trained(tmp_path / name, callback)
        assert (tmp_path / name / "mashup/report.json").exists()


def test_targets_that_the_trainee_lacks_are_reported(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"), guard=False)
    config = lora(target_modules=["q_proj", "v_proj", "down_proj"])
    trained(tmp_path / "out", callback, peft_config=config, max_steps=1)
    assert 0 < callback.report.merge.lost_energy < 1
    assert any("gate_proj" in name for name in callback.report.merge.lost_layers)


def test_own_output_and_mashups_are_never_candidates(tmp_path, library):
    output = tmp_path / "runs/new"
    save_random_adapter(output / "checkpoint-5", 0)
    save_random_adapter(tmp_path / "runs/old/mashup", 1)
    (tmp_path / "runs/old/mashup/report.json").write_text("{}")
    save_random_adapter(tmp_path / "runs/old", 2)
    callback = MashupCallback(str(tmp_path / "runs/*"))
    trained(output, callback)
    assert [Path(row.name).name for row in callback.report.candidates] == ["old"]
