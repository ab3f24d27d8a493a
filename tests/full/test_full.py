"""Full fine-tuning through a Trainer, against from_pretrained, the mergekit command and runs without callback."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from mashup_callback import MashupCallback, MashupReport, find_candidates, score_candidates
from mashup_callback.full.merge import check_space
from mashup_callback.sharing.card import mashup_card
from tests.full.damage import BAD
from tests.full_model import full_trainer, run_mergekit, same, trained_full, weights
from tests.tiny import llama, losses, save_random_adapter, save_scaled_adapter, sft_trainer, trained


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, 87, (4, 12), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def loss_of(model):
    with torch.no_grad():
        return model.eval()(**batch()).loss.item()


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (False, {}),
        (True, {}),
        (False, {"merge_method": "ties", "merge_parameters": {"density": 0.5}}),
        (False, {"merge_method": "slerp", "top_k": 2}),
        (False, {"merge_method": "karcher", "top_k": "auto"}),
        (False, {"dry_run": True}),
    ],
    indirect=["tied"],
    ids=str,
)
def test_first_loss_is_that_of_the_merge_on_disk(tmp_path, models, tied, settings):
    callback = MashupCallback(str(models / "model-*"), guard=False, on_error="raise", **settings)
    trainer = trained_full(tmp_path / "out", callback, model=llama(tie_word_embeddings=tied))
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out/mashup")
    assert callback.report.decision in ("merged", "single")
    start = llama(tie_word_embeddings=tied) if settings.get("dry_run") else saved
    alone = trained_full(tmp_path / "alone", model=start)
    assert losses(trainer) == pytest.approx(losses(alone), abs=1e-6)
    assert losses(trainer)[0] < 3.6 or settings.get("dry_run")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mashup"]


def test_the_published_recipe_gives_the_published_model(tmp_path, untied):
    callback = MashupCallback(str(untied / "model-*"), guard=False, merge_method="ties", top_k=3)
    full_trainer(tmp_path / "out", callbacks=[callback]).train()
    recipe = yaml.safe_load((tmp_path / "out/mashup/mergekit.yaml").read_text())
    base = tmp_path / "base"
    llama().save_pretrained(base)
    recipe["base_model"] = {"model": {"path": str(base)}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_mergekit([tmp_path / "recipe.yaml"])
    expected = load_file(tmp_path / "recipe.yaml.out/model.safetensors")
    assert same(load_file(tmp_path / "out/mashup/model.safetensors"), expected)


def test_scratch_is_bit_identical_to_no_callback(tmp_path, untied, library):
    for seed in range(3):
        # What unlearns: the logits with the other sign.
        model = LlamaForCausalLM.from_pretrained(untied / f"model-{seed}")
        with torch.no_grad():
            model.model.norm.weight.mul_(-3)
        model.save_pretrained(tmp_path / f"runs/{seed}", max_shard_size="20KB")
        save_scaled_adapter(tmp_path / f"runs/adapter-{seed}", library / f"trained-{seed}", -1.0)
    callback = MashupCallback(str(tmp_path / "runs/*"), on_error="raise")
    trainer = trained_full(tmp_path / "with", callback)
    alone = trained_full(tmp_path / "without")
    assert callback.report.decision == "scratch"
    assert {row.status for row in callback.report.candidates} <= {"scored", "eliminated"}
    assert losses(trainer) == losses(alone)
    assert same(weights(trainer.model), weights(alone.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_leaves_every_bit(models, tied, dtype):
    model = llama(tie_word_embeddings=tied).to(dtype)
    before, pointers = weights(model), [id(value) for value in model.parameters()]
    scores = score_candidates(model, sorted(models.glob("model-*")) * 3, [batch(0), batch(1)])
    assert {score.status for score in scores} == {"scored"} and len(scores) >= 9
    assert same(before, weights(model)) and pointers == [id(value) for value in model.parameters()]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_scores_are_those_of_the_loaded_models(untied):
    [score] = score_candidates(llama(), [untied / "model-1"], [batch()])
    expected = loss_of(LlamaForCausalLM.from_pretrained(untied / "model-1"))
    assert score.loss == pytest.approx(expected, abs=1e-6)
    assert abs(loss_of(llama()) - expected) > 0.01


def test_adapters_and_checkpoints_together(tmp_path, untied):
    shutil.copytree(untied / "model-0", tmp_path / "runs/full")
    save_random_adapter(tmp_path / "runs/adapter", 0, scale=0.02)
    callback = MashupCallback(str(tmp_path / "runs/*"), guard=False, on_error="raise", top_k=2)
    trainer = trained_full(tmp_path / "out", callback)
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(llama(), tmp_path / "runs/adapter").merge_and_unload().state_dict()
    full = LlamaForCausalLM.from_pretrained(tmp_path / "runs/full").state_dict()
    merged = load_file(tmp_path / "out/mashup/model.safetensors")
    assert {row.weight for row in callback.report.candidates} == {0.5}
    for name, value in merged.items():
        torch.testing.assert_close(value, (adapted[name] + full[name]) / 2, atol=1e-6, rtol=1e-5)
    alone = trained_full(tmp_path / "alone", model=LlamaForCausalLM.from_pretrained(tmp_path / "out/mashup"))
    assert losses(trainer) == pytest.approx(losses(alone), abs=1e-6)


def test_an_adapter_alone_is_swapped_into_the_weights(tmp_path):
    save_random_adapter(tmp_path / "adapter", 0, scale=0.02)
    callback = MashupCallback(str(tmp_path / "adapter"), guard=False, on_error="raise")
    trained_full(tmp_path / "out", callback)
    [score] = score_candidates(llama(), [tmp_path / "adapter"], [batch()])
    assert loss_of(LlamaForCausalLM.from_pretrained(tmp_path / "out/mashup")) == pytest.approx(score.loss, abs=1e-6)


def test_frozen_weights_are_left_alone(tmp_path, untied):
    model = llama()
    for parameter in model.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    before = model.model.embed_tokens.weight.detach().clone()
    callback = MashupCallback(str(untied / "model-*"), guard=False, on_error="raise")
    full_trainer(tmp_path / "out", callbacks=[callback], model=model).train()
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert callback.report.merge.lost_layers == ("model.embed_tokens.weight",)
    assert 0 < callback.report.merge.lost_energy < 1


def test_nothing_trainable_is_refused(tmp_path, untied):
    tokens = [{"input_ids": list(range(7, 20)), "labels": list(range(7, 20))} for _ in range(16)]
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to="none")
    model = llama().requires_grad_(False)
    trainer = Trainer(model, arguments, train_dataset=tokens, callbacks=[MashupCallback(str(untied / "model-*"))])
    with pytest.raises(ValueError, match="trains no LoRA layers, and none of its own weights"):
        trainer.train()


def test_resuming_keeps_the_report_and_the_weights(tmp_path, untied):
    callback = MashupCallback(str(untied / "model-*"), guard=False, on_error="raise")
    settings = {"save_strategy": "steps", "save_steps": 1}
    full_trainer(tmp_path / "out", callbacks=[callback], max_steps=2, **settings).train()
    resumed = MashupCallback(str(untied / "model-*"), guard=False, on_error="raise")
    trainer = full_trainer(tmp_path / "out", callbacks=[resumed], max_steps=3, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    whole = trained_full(tmp_path / "whole", MashupCallback(str(untied / "model-*"), guard=False), max_steps=3)
    assert resumed.report is None
    assert MashupReport.load(tmp_path / "out/mashup").decision == "merged"
    assert losses(trainer)[-1] == pytest.approx(losses(whole)[-1], abs=1e-5)
    # The run's own checkpoints and mashup are full models too, and no candidates of another run's name.
    found = find_candidates(str(tmp_path / "out"))
    assert [Path(item.name).name for item in found] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert {item.kind for item in found} == {"model"} and len({item.run for item in found}) == 1


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_rejected_with_the_reason(tmp_path, untied, name):
    damage, reason = BAD[name]
    shutil.copytree(untied / "model-0", tmp_path / "bad")
    damage(tmp_path / "bad")
    callback = MashupCallback(str(tmp_path / "bad"))
    trainer = trained_full(tmp_path / "out", callback, max_steps=1)
    alone = trained_full(tmp_path / "alone", max_steps=1)
    [row] = callback.report.candidates
    assert row.status == "rejected"
    assert re.search(reason, row.reason)
    assert callback.report.decision == "scratch" and losses(trainer) == losses(alone)
    assert {path.name for path in (tmp_path / "out/mashup").iterdir()} <= {"ranking.png", "report.json"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mashup"]
    with pytest.raises(RuntimeError, match=reason):
        full_trainer(tmp_path / "raise", callbacks=[MashupCallback(str(tmp_path / "bad"), on_error="raise")]).train()


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, untied, monkeypatch):
    usage = shutil._ntuple_diskusage(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="needs .* GB in .*, and 1e-06 GB are free"):
        check_space(tmp_path, 10**5)
    callback = MashupCallback(str(untied / "model-*"))
    trained_full(tmp_path / "out", callback, max_steps=1)
    assert callback.report.decision == "scratch" and "GB are free" in callback.report.reason
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mashup"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(directory)], capture_output=True)
    if mount.returncode:
        pytest.skip("no file system can be mounted here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_disk_that_fills_up_while_merging(tmp_path, small_disk, untied, monkeypatch):
    # Another process may take the space that was free when it was checked.
    monkeypatch.setattr("mashup_callback.full.trainee.check_space", lambda directory, needed: None)
    settings = {"merge_method": "ties", "report_dir": str(small_disk / "mashup")}
    callback = MashupCallback(str(untied / "model-*"), **settings)
    trainer = trained_full(tmp_path / "out", callback, max_steps=1)
    alone = trained_full(tmp_path / "alone", max_steps=1)
    assert callback.report.decision == "scratch" and "space" in callback.report.reason
    assert losses(trainer) == losses(alone)
    assert [path.name for path in small_disk.iterdir()] == ["mashup"]
    with pytest.raises(Exception, match="space"):
        raising = MashupCallback(str(untied / "model-*"), on_error="raise", **settings)
        full_trainer(tmp_path / "raise", callbacks=[raising], max_steps=1).train()


def test_a_full_checkpoint_for_a_lora_trainee(tmp_path, untied):
    # A LoRA merged into the base is a full checkpoint whose update has the rank of the LoRA.
    save_random_adapter(tmp_path / "adapter", 0, scale=0.02)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(llama(), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "full", max_shard_size="20KB")
    reports, found = [], []
    for name in ("adapter", "full"):
        callback = MashupCallback(str(tmp_path / name), guard=False, on_error="raise")
        trainer = trained(tmp_path / f"out-{name}", callback)
        reports.append(callback.report)
        found.append(losses(trainer))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    [row] = reports[1].candidates
    assert row.name == str(tmp_path / "full") and "keeps 100.0% of its full update" in row.warnings[0]
    # It is no LoRA for mergekit, and `mashup merge` does not take it.
    run_mergekit([recipe := tmp_path / "out-full/mashup/mergekit.yaml"])
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(f"{recipe}.out").state_dict(), merged.state_dict())
    assert "mashup merge" not in mashup_card(replace(reports[1], candidates=(replace(row, revision="a" * 40),)), {})


def test_too_little_energy_is_refused_with_the_numbers_unless_accepted(tmp_path, untied):
    model, base = LlamaForCausalLM.from_pretrained(untied / "model-0"), llama()
    update = {name: value - base.state_dict()[name] for name, value in model.state_dict().items()}
    kept = 0.0
    for name, value in update.items():
        if "proj" in name:
            kept += torch.linalg.svdvals(value.double())[:4].square().sum().item()
    kept /= sum(value.double().square().sum().item() for value in update.values())
    callback = MashupCallback(str(untied / "model-0"), min_kept_energy=kept + 0.01)
    sft_trainer(tmp_path / "out", callbacks=[callback], max_steps=1).train()
    [row] = callback.report.candidates
    assert row.status == "rejected"
    assert f"rank 4 keeps {kept:.1%} of its update" in row.reason and "min_kept_energy=" in row.reason
    accepted = MashupCallback(str(untied / "model-0"), min_kept_energy=kept - 0.01, guard=False, on_error="raise")
    sft_trainer(tmp_path / "out2", callbacks=[accepted], max_steps=1).train()
    assert accepted.report.decision == "single"
    assert (tmp_path / "out2/mashup/adapter_model.safetensors").is_file()


def test_memory_stays_within_the_bound(tmp_path):
    script = Path(__file__).parents[2] / "recipes/benchmarks/full_memory.py"
    found = []
    for count in (2, 8):
        command = [sys.executable, str(script), f"--candidates={count}", "--hidden=512", "--layers=6"]
        environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found.append(json.loads(result.stdout.strip().splitlines()[-1]))
    slack = 8_000_000
    assert all(run["peak_extra_bytes"] <= run["bound_bytes"] + slack for run in found), found
    assert found[1]["peak_extra_bytes"] <= found[0]["peak_extra_bytes"] + slack
    assert found[1]["peak_extra_bytes"] > found[1]["model_bytes"] / 2
