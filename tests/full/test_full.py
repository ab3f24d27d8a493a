"""Full checkpoints and full fine-tuning, against from_pretrained, the mergekit command and runs without callback."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from mashup_callback import MashupCallback, MashupReport, find_candidates, score_candidates
from mashup_callback.candidates import as_candidate
from mashup_callback.config import MashupConfig
from mashup_callback.errors import AdapterError, CheckpointError
from mashup_callback.formats import BaseModel, load_factors, read_adapter, read_checkpoint, read_tensor
from mashup_callback.full import FullUpdate
from mashup_callback.full.merge import ModelInput, check_space, merge_models
from mashup_callback.full.weights import replaced
from mashup_callback.model import write_parameters
from mashup_callback.trainee import find_trainee
from tests.full_model import full_trainer, same, save_models, weights
from tests.tiny import llama, lora, losses, save_random_adapter, save_scaled_adapter, sft_trainer


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """Three trained checkpoints, each in several shards."""
    return save_models(tmp_path_factory.mktemp("untied"), 3)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request):
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory, tied, untied):
    """The checkpoints, or some whose head is their embeddings."""
    return save_models(tmp_path_factory.mktemp("tied"), 3, tied=True) if tied else untied


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, 87, (4, 12), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def whole(model, path):
    """Returns all weights of a checkpoint as an update of the model."""
    checkpoint = read_checkpoint(path).fit(BaseModel.of(model))
    return FullUpdate(checkpoint, frozenset(checkpoint.tensors))


def loss_of(model):
    with torch.no_grad():
        return model.eval()(**batch()).loss.item()


def run_mergekit(recipes):
    """Runs mergekit's command on recipes in a process of its own."""
    code = (
        "import sys; from mergekit.scripts.run_yaml import main\n"
        "for recipe in sys.argv[1:]: main([recipe, recipe + '.out', '--random-seed', '42'], standalone_mode=False)"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, recipes)], check=True, capture_output=True)


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
    trainer = full_trainer(tmp_path / "out", callbacks=[callback], model=llama(tie_word_embeddings=tied))
    trainer.train()
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out/mashup")
    assert callback.report.decision in ("merged", "single")
    start = llama(tie_word_embeddings=tied) if settings.get("dry_run") else saved
    alone = full_trainer(tmp_path / "alone", model=start)
    alone.train()
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


def test_merges_are_mergekits_own_byte_for_byte(tmp_path, models, tied):
    base = tmp_path / "base"
    llama(tie_word_embeddings=tied).save_pretrained(base)
    inputs = [ModelInput(models / f"model-{index}") for index in range(3)]
    methods = {
        "linear": {},
        "ties": {"density": 0.5},
        "dare_ties": {"density": 0.5},
        "model_stock": {},
        "karcher": {},
        "slerp": {},
        "task_arithmetic": {"lambda": 0.7},
    }
    for method, parameters in methods.items():
        used = inputs[:2] if method == "slerp" else inputs
        weights_ = [0.5, 0.3, 0.2][: len(used)]
        recipe = merge_models(
            used, tmp_path / method, weights=weights_, method=method, parameters=parameters, base=base, seed=42
        )
        (tmp_path / f"{method}.yaml").write_text(recipe)
    run_mergekit([tmp_path / f"{method}.yaml" for method in methods])
    contents = set()
    for method in methods:
        ours = (tmp_path / method / "model.safetensors").read_bytes()
        assert ours == (tmp_path / f"{method}.yaml.out/model.safetensors").read_bytes(), method
        contents.add(ours)
    assert len(contents) == len(methods)


def test_scratch_is_bit_identical_to_no_callback(tmp_path, untied, library):
    for seed in range(3):
        # What unlearns: the logits with the other sign.
        model = LlamaForCausalLM.from_pretrained(untied / f"model-{seed}")
        with torch.no_grad():
            model.model.norm.weight.mul_(-3)
        model.save_pretrained(tmp_path / f"runs/{seed}", max_shard_size="20KB")
        save_scaled_adapter(tmp_path / f"runs/adapter-{seed}", library / f"trained-{seed}", -1.0)
    callback = MashupCallback(str(tmp_path / "runs/*"), on_error="raise")
    trainer = full_trainer(tmp_path / "with", callbacks=[callback])
    trainer.train()
    alone = full_trainer(tmp_path / "without")
    alone.train()
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


def test_a_failure_within_gives_the_weights_back(untied):
    model = llama()
    before = weights(model)
    with pytest.raises(KeyError), replaced(model, whole(model, untied / "model-0")):
        assert not same(before, weights(model))
        raise KeyError
    assert same(before, weights(model))


def test_adapters_and_checkpoints_together(tmp_path, untied):
    shutil.copytree(untied / "model-0", tmp_path / "runs/full")
    save_random_adapter(tmp_path / "runs/adapter", 0, scale=0.02)
    callback = MashupCallback(str(tmp_path / "runs/*"), guard=False, on_error="raise", top_k=2)
    trainer = full_trainer(tmp_path / "out", callbacks=[callback])
    trainer.train()
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(llama(), tmp_path / "runs/adapter").merge_and_unload().state_dict()
    full = LlamaForCausalLM.from_pretrained(tmp_path / "runs/full").state_dict()
    merged = load_file(tmp_path / "out/mashup/model.safetensors")
    assert {row.weight for row in callback.report.candidates} == {0.5}
    for name, value in merged.items():
        torch.testing.assert_close(value, (adapted[name] + full[name]) / 2, atol=1e-6, rtol=1e-5)
    alone = full_trainer(tmp_path / "alone", model=LlamaForCausalLM.from_pretrained(tmp_path / "out/mashup"))
    alone.train()
    assert losses(trainer) == pytest.approx(losses(alone), abs=1e-6)


def test_an_adapter_alone_is_swapped_into_the_weights(tmp_path):
    save_random_adapter(tmp_path / "adapter", 0, scale=0.02)
    callback = MashupCallback(str(tmp_path / "adapter"), guard=False, on_error="raise")
    trainer = full_trainer(tmp_path / "out", callbacks=[callback])
    trainer.train()
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


def test_weights_are_read_back_after_the_swap(tmp_path, untied, monkeypatch):
    def write(model, values):
        write_parameters(model, {name: values[name] for name in values if name != "model.norm.weight"})

    monkeypatch.setattr("mashup_callback.swap.write_parameters", write)
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    before = weights(model)
    trainee, [path, *_] = find_trainee(model), sorted(untied.glob("model-*"))
    update = whole(model, path)
    with pytest.raises(RuntimeError, match=r"1 of .* do not hold the merge .*model\.norm\.weight"):
        trainee.write(update)
    assert same(weights(model), before)
    monkeypatch.undo()
    trainee.write(update)
    assert same(weights(model), weights(LlamaForCausalLM.from_pretrained(path)))
    trainee.undo()
    assert same(weights(model), before)


def test_the_trainee_merges_keeps_and_saves_without_a_trainer(tmp_path, untied):
    model, runs = llama(), tmp_path / "runs"
    trainee = find_trainee(model, MashupConfig(), tmp_path / "out/mashup")
    shutil.copytree(untied / "model-0", runs / "full")
    save_random_adapter(runs / "adapter", 0, scale=0.02)
    files = sorted(path for path in runs.rglob("*") if path.is_file())
    full, adapter = (trainee.admit(as_candidate(runs / name)) for name in ("full", "adapter"))
    update, info = trainee.merge([full, adapter], [0.5, 0.5], "linear", {})
    assert (info.method, info.lost_layers) == ("linear", ()) and update.owned
    before = weights(model)
    expected = weights(LlamaForCausalLM.from_pretrained(runs / "full"))
    factors = load_factors(read_adapter(runs / "adapter"))
    for name, value in before.items():
        delta = factors[layer].delta() if (layer := name.removesuffix(".weight")) in factors else 0
        expected[name] = (expected[name] + value + delta) / 2
    with update.applied(model):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    assert same(weights(model), before)
    alone, _ = trainee.merge([full], [1.0], "ties", {"density": 0.5})
    kept = trainee.keep(alone)
    assert not alone.owned and kept.owned and trainee.keep(kept) is kept
    trainee.discard(alone)
    trainee.write(kept)
    assert same(weights(model), weights(LlamaForCausalLM.from_pretrained(runs / "full")))
    trainee.undo()
    assert same(weights(model), before)
    for merge, name in ((update, "merge"), (kept, "single"), (alone, "none")):
        (tmp_path / name).mkdir()
        trainee.save(merge, tmp_path / name, "org/base")
    for name, value in weights(LlamaForCausalLM.from_pretrained(tmp_path / "merge")).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    single, candidate = (LlamaForCausalLM.from_pretrained(path) for path in (tmp_path / "single", runs / "full"))
    assert same(weights(single), weights(candidate))
    assert not any((tmp_path / "none").iterdir())
    recipe = (tmp_path / "merge/mergekit.yaml").read_text()
    assert str(runs / "adapter") in recipe and str(tmp_path / "out") not in recipe
    trainee.close()
    assert not any((tmp_path / "out").iterdir())
    assert sorted(path for path in runs.rglob("*") if path.is_file()) == files


def test_a_lora_trainee_admits_the_low_rank_part_of_a_checkpoint(tmp_path, untied):
    from peft import PeftModel, get_peft_model

    save_random_adapter(tmp_path / "adapter", 0, scale=0.02)
    PeftModel.from_pretrained(llama(), tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "full")
    trainee = find_trainee(get_peft_model(llama(), lora()), MashupConfig(), tmp_path / "out/mashup")
    source = trainee.admit(as_candidate(tmp_path / "full"))
    assert "keeps 100.0% of its full update" in source.warnings[0]
    expected = load_factors(read_adapter(tmp_path / "adapter"))
    found = source.load().factors
    assert found.keys() == expected.keys()
    for name, factors in found.items():
        torch.testing.assert_close(factors.delta(), expected[name].delta(), atol=1e-5, rtol=1e-4)
    with pytest.raises(AdapterError, match=r"rank 4 keeps .* less than min_kept_energy="):
        trainee.admit(as_candidate(untied / "model-0"))
    with pytest.raises(AdapterError, match="its update is zero in every layer"):
        llama().save_pretrained(tmp_path / "base")
        trainee.admit(as_candidate(tmp_path / "base"))
    trainee.close()
    assert not any((tmp_path / "out").iterdir())


def test_nothing_trainable_is_refused(tmp_path, untied):
    tokens = [{"input_ids": list(range(7, 20)), "labels": list(range(7, 20))} for _ in range(16)]
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to="none")
    model = llama().requires_grad_(False)
    trainer = Trainer(model, arguments, train_dataset=tokens, callbacks=[MashupCallback(str(untied / "model-*"))])
    with pytest.raises(ValueError, match="trains no LoRA layers, and none of its own weights"):
        trainer.train()


def test_full_training_of_what_is_no_model_of_transformers_is_refused():
    for model in (torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Sequential(llama())):
        with pytest.raises(ValueError, match="weights of a Sequential .* expected a model of transformers"):
            find_trainee(model)


def test_full_training_of_a_sentence_transformer_is_refused():
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(modules=[modules.Dense(4, 4)], device="cpu")
    with pytest.raises(ValueError, match="weights of a SentenceTransformer .* expected a model of transformers"):
        find_trainee(model)


def test_resuming_keeps_the_report_and_the_weights(tmp_path, untied):
    callback = MashupCallback(str(untied / "model-*"), guard=False, on_error="raise")
    settings = {"save_strategy": "steps", "save_steps": 1}
    full_trainer(tmp_path / "out", callbacks=[callback], max_steps=2, **settings).train()
    resumed = MashupCallback(str(untied / "model-*"), guard=False, on_error="raise")
    trainer = full_trainer(tmp_path / "out", callbacks=[resumed], max_steps=3, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    whole = full_trainer(
        tmp_path / "whole", callbacks=[MashupCallback(str(untied / "model-*"), guard=False)], max_steps=3
    )
    whole.train()
    assert resumed.report is None
    assert MashupReport.load(tmp_path / "out/mashup").decision == "merged"
    assert losses(trainer)[-1] == pytest.approx(losses(whole)[-1], abs=1e-5)
    # The run's own checkpoints and mashup are full models too, and no candidates of another run's name.
    found = find_candidates(str(tmp_path / "out"))
    assert [Path(item.name).name for item in found] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert {item.kind for item in found} == {"model"} and len({item.run for item in found}) == 1


# Bad input: what is done to a good checkpoint, and what the reason must say.


def other_architecture(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))


def other_width(directory):
    llama(hidden_size=48, num_attention_heads=4).save_pretrained(directory)
    (directory / "model.safetensors.index.json").unlink()


def other_depth(directory):
    llama(num_hidden_layers=1).save_pretrained(directory)
    (directory / "model.safetensors.index.json").unlink()


def other_tying(directory):
    llama(tie_word_embeddings=True).save_pretrained(directory)
    (directory / "model.safetensors.index.json").unlink()


def other_vocabulary(directory):
    llama(vocab_size=120).save_pretrained(directory)
    for name in ("model.safetensors.index.json", "tokenizer.json"):
        (directory / name).unlink()


def resized(directory, rows):
    model = LlamaForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(rows, mean_resizing=False)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(directory)


def longer_vocabulary(directory):
    resized(directory, 104)


def shorter_vocabulary(directory):
    resized(directory, 90)


def truncated_shard(directory):
    shard = sorted(directory.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])


def missing_shard(directory):
    sorted(directory.glob("*.safetensors"))[-1].unlink()


def missing_tensor(directory):
    shard = sorted(directory.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, shard)


def index_of_absent_files(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "model-99999-of-00006.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_leads_elsewhere(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../model-00001-of-00006.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def not_finite(directory):
    shard = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, shard)


def pickled(directory):
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, directory / "pytorch_model.bin")


def quantized(directory):
    shard = sorted(directory.glob("*.safetensors"))[0]
    save_file({name: value.to(torch.int8) for name, value in load_file(shard).items()}, shard)


BAD = {
    other_architecture: "another architecture: model_type is mistral, expected llama",
    other_width: "another architecture: .* has shape",
    other_depth: "another architecture: tensor model.layers.1.* is missing",
    other_tying: "its head is tied to its embeddings, and the model's is not",
    other_vocabulary: r"another vocabulary: .* has shape \(120, 32\), expected \(96, 32\)",
    longer_vocabulary: r"another vocabulary: .* has shape \(104, 32\), expected \(96, 32\)",
    shorter_vocabulary: r"another vocabulary: .* has shape \(90, 32\), expected \(96, 32\)",
    truncated_shard: "model-0000.-of-0000..safetensors: .* truncated",
    missing_shard: "model-0000.-of-0000..safetensors, which model.safetensors.index.json names is missing",
    missing_tensor: "says that .* and it is not there",
    index_of_absent_files: "model-99999-of-00006.safetensors, which .* names is missing",
    index_that_leads_elsewhere: "names the file .*, expected a",
    not_finite: "not finite",
    pickled: "pickled weights, which are never opened",
    quantized: "dtype I8, expected one of",
}


@pytest.mark.parametrize(
    "damage", [damage for damage in BAD if damage is not pickled], ids=lambda damage: damage.__name__
)
def test_bad_checkpoints_are_not_read(tmp_path, untied, damage):
    shutil.copytree(untied / "model-0", tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=BAD[damage]):
        checkpoint = read_checkpoint(tmp_path / "bad").fit(BaseModel.of(llama()))
        [read_tensor(checkpoint, name) for name in checkpoint.tensors]


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_bad_checkpoints_are_rejected_with_the_reason(tmp_path, untied, damage):
    shutil.copytree(untied / "model-0", tmp_path / "bad")
    damage(tmp_path / "bad")
    callback = MashupCallback(str(tmp_path / "bad"))
    trainer = full_trainer(tmp_path / "out", callbacks=[callback], max_steps=1)
    trainer.train()
    alone = full_trainer(tmp_path / "alone", max_steps=1)
    alone.train()
    [row] = callback.report.candidates
    assert row.status == "rejected"
    assert re.search(BAD[damage], row.reason)
    assert callback.report.decision == "scratch" and losses(trainer) == losses(alone)
    assert {path.name for path in (tmp_path / "out/mashup").iterdir()} <= {"ranking.png", "report.json"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mashup"]
    with pytest.raises(RuntimeError, match=BAD[damage]):
        full_trainer(tmp_path / "raise", callbacks=[MashupCallback(str(tmp_path / "bad"), on_error="raise")]).train()


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, untied, monkeypatch):
    usage = shutil._ntuple_diskusage(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="needs .* GB in .*, and 1e-06 GB are free"):
        check_space(tmp_path, 10**5)
    callback = MashupCallback(str(untied / "model-*"))
    trainer = full_trainer(tmp_path / "out", callbacks=[callback], max_steps=1)
    trainer.train()
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
    trainer = full_trainer(tmp_path / "out", callbacks=[callback], max_steps=1)
    trainer.train()
    alone = full_trainer(tmp_path / "alone", max_steps=1)
    alone.train()
    assert callback.report.decision == "scratch" and "space" in callback.report.reason
    assert losses(trainer) == losses(alone)
    assert [path.name for path in small_disk.iterdir()] == ["mashup"]
    with pytest.raises(Exception, match="space"):
        raising = MashupCallback(str(untied / "model-*"), on_error="raise", **settings)
        full_trainer(tmp_path / "raise", callbacks=[raising], max_steps=1).train()


def test_checkpoint_that_changes_while_in_use(tmp_path, untied):
    shutil.copytree(untied / "model-0", tmp_path / "model")
    update = whole(llama(), tmp_path / "model")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    model = llama()
    before = weights(model)
    with pytest.raises(CheckpointError, match="changed while it was in use"), replaced(model, update):
        pass
    assert same(before, weights(model))


def test_a_full_checkpoint_for_a_lora_trainee(tmp_path, untied):
    # A LoRA merged into the base is a full checkpoint whose update has the rank of the LoRA.
    save_random_adapter(tmp_path / "adapter", 0, scale=0.02)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(llama(), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "full", max_shard_size="20KB")
    reports, trained = [], []
    for name in ("adapter", "full"):
        callback = MashupCallback(str(tmp_path / name), guard=False, on_error="raise")
        trainer = sft_trainer(tmp_path / f"out-{name}", callbacks=[callback])
        trainer.train()
        reports.append(callback.report)
        trained.append(losses(trainer))
    assert trained[0][0] == pytest.approx(trained[1][0], abs=1e-5)
    [row] = reports[1].candidates
    assert row.name == str(tmp_path / "full") and "keeps 100.0% of its full update" in row.warnings[0]


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
