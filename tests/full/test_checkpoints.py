"""Reading, merging and writing full checkpoints, against from_pretrained and the mergekit command."""

import random
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from mashup_callback.candidates import as_candidate
from mashup_callback.config import MashupConfig
from mashup_callback.errors import AdapterError, CheckpointError
from mashup_callback.formats import BaseModel, load_factors, read_adapter, read_checkpoint, read_tensor
from mashup_callback.full import FullUpdate
from mashup_callback.full.merge import ModelInput, merge_models
from mashup_callback.model import write_parameters
from mashup_callback.trainee import find_trainee
from tests.full.damage import BAD
from tests.full_model import run_mergekit, same, weights
from tests.tiny import llama, lora, save_random_adapter


def whole(model, path):
    """Returns all weights of a checkpoint as an update of the model."""
    checkpoint = read_checkpoint(path).fit(BaseModel.of(model))
    return FullUpdate(checkpoint, frozenset(checkpoint.tensors))


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


def test_a_failure_within_gives_the_weights_back(untied):
    model = llama()
    before = weights(model)
    with pytest.raises(KeyError), whole(model, untied / "model-0").applied(model):
        assert not same(before, weights(model))
        raise KeyError
    assert same(before, weights(model))


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
    generators = random.getstate(), torch.get_rng_state()
    update, info = trainee.merge([full, adapter], [0.5, 0.5], "linear", {})
    assert random.getstate() == generators[0] and torch.equal(torch.get_rng_state(), generators[1])
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


@pytest.mark.parametrize("name", [name for name in BAD if name != "pickled"])
def test_bad_checkpoints_are_not_read(tmp_path, untied, name):
    damage, reason = BAD[name]
    shutil.copytree(untied / "model-0", tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=reason):
        checkpoint = read_checkpoint(tmp_path / "bad").fit(BaseModel.of(llama()))
        [read_tensor(checkpoint, name) for name in checkpoint.tensors]


def test_checkpoint_that_changes_while_in_use(tmp_path, untied):
    shutil.copytree(untied / "model-0", tmp_path / "model")
    update = whole(llama(), tmp_path / "model")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    model = llama()
    before = weights(model)
    with pytest.raises(CheckpointError, match="changed while it was in use"), update.applied(model):
        pass
    assert same(before, weights(model))
