"""Every variant of a candidate against peft's own forward with that adapter: taken in exactly, or rejected."""

from functools import partial

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

from mashup_callback.candidates import as_candidate
from mashup_callback.errors import AdapterError
from mashup_callback.lora import merge_adapters
from mashup_callback.trainee import find_trainee
from tests.lora.variants import (
    ATTENTION,
    CANDIDATES,
    CONFIGURED,
    EVERYWHERE,
    LORA,
    MODELS,
    admitted,
    by_peft,
    check,
    close,
    edit,
    output,
    save_random,
)
from tests.tiny import llama


def is_dense(updates):
    return any(update.dense for update in updates.values())


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("variant", EVERYWHERE)
def test_a_candidate_of_weight_one_is_what_peft_computes(tmp_path, variant, family):
    make, targets = MODELS[family]
    if family == "gpt2" and variant.startswith(("LoHa", "LoKr")):
        pytest.skip("peft has no LoHa or LoKr of Conv1D")
    save_random(tmp_path, make(), EVERYWHERE[variant](target_modules=targets))
    assert is_dense(check(tmp_path, make)) == (CANDIDATES[variant] == "dense")


@pytest.mark.parametrize("variant", CONFIGURED)
def test_what_a_configuration_can_say(tmp_path, variant):
    config, how = CONFIGURED[variant], CANDIDATES[variant]
    targets = {} if "target_modules" in config.keywords else {"target_modules": ATTENTION}
    save_random(tmp_path, llama(), config(**targets))
    if how not in ("exact", "dense"):
        with pytest.raises(AdapterError, match=how.removeprefix("rejected: ")):
            admitted(tmp_path, llama()).load()
    else:
        assert is_dense(check(tmp_path, llama)) == (how == "dense")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_embeddings_that_the_head_shares_or_not(tmp_path, family, tied):
    """Gemma scales its embeddings; peft stores copies of the base model's, which must not have been trained."""
    make = MODELS[family][0]
    if family == "llama":
        make = partial(llama, tie_word_embeddings=tied)
    save_random(tmp_path, make(), LORA(target_modules=["embed_tokens", "v_proj"]))
    check(tmp_path, make)
    with pytest.raises(AdapterError, match="embed_tokens, an embedding or experts"):
        find_trainee(make()).admit(as_candidate(tmp_path))
    with pytest.raises(AdapterError, match="embed_tokens, an embedding or experts"):
        merge_adapters([tmp_path], output_dir=tmp_path / "merged")
    edit(tmp_path, lambda tensors: {k: v + 1e-3 if "base_layer" in k else v for k, v in tensors.items()})
    with pytest.raises(AdapterError, match=r"embed_tokens.*would overwrite a weight of the base model"):
        admitted(tmp_path, make()).load()


SPELLINGS = {
    "no base_model.model": lambda name: name.removeprefix("base_model.model."),
    "another class": lambda name: name.replace("base_model.model.model.", "base_model.model.language_model."),
    "with the adapter's name": lambda name: name.replace("weight", "default.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_names(tmp_path, spelling):
    save_random(tmp_path, llama(), LORA(target_modules=ATTENTION))
    expected = by_peft(tmp_path, llama)
    edit(tmp_path, lambda tensors: {SPELLINGS[spelling](name): value for name, value in tensors.items()})
    model = llama().eval()
    with admitted(tmp_path, model).load().applied(model):
        assert close(output(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["LoRA", "DoRA", "LoHa"])
def test_half_precision_is_read_exactly(tmp_path, variant, dtype):
    save_random(tmp_path, llama(), EVERYWHERE[variant](target_modules=ATTENTION))
    edit(tmp_path, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    check(tmp_path, llama)


def test_adalora_after_its_allocation(tmp_path):
    """Each layer keeps some of its rows, or none, and all are divided by the rank before."""
    generator = torch.manual_seed(0)
    tuned = get_peft_model(llama(), AdaLoraConfig(init_r=5, target_r=2, total_step=10, target_modules=ATTENTION))
    names = [name for name, _ in tuned.base_model.model.named_parameters() if "lora_E" in name]
    kept = {name: [index < left for left in range(5)] for index, name in enumerate(names)}
    with torch.no_grad():
        for parameter in (p for p in tuned.parameters() if p.requires_grad):
            parameter.normal_(0, 0.3, generator=generator)
    tuned.peft_config["default"].rank_pattern = {name: rows[::-1] for name, rows in kept.items()}
    tuned.save_pretrained(tmp_path)
    updates = check(tmp_path, llama)
    assert len(updates) < len(names) and {update.rank for update in updates.values()} == {1, 2, 3, 4}


@pytest.mark.parametrize("variant", ["DoRA", "LoHa", "LoKr of high rank"])
def test_a_full_model_is_merged_with_the_update_of_a_variant(tmp_path, variant):
    save_random(tmp_path / "adapter", llama(), EVERYWHERE[variant](target_modules=ATTENTION))
    expected = by_peft(tmp_path / "adapter", llama)
    trainee = find_trainee(llama(), directory=tmp_path / "mashup")
    source = trainee.admit(as_candidate(tmp_path / "adapter"))
    assert close(by_peft(trainee.adapter_directory(source.adapter, source.load), llama), expected)
    trainee.close()


def test_dora_needs_the_base_model(tmp_path):
    save_random(tmp_path, llama(), LORA(target_modules=ATTENTION, use_dora=True))
    with pytest.raises(AdapterError, match="DoRA rescales the base model's weights"):
        merge_adapters([tmp_path])
    model = llama()
    model.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(torch.empty(32, 32, device="meta"))
    source = admitted(tmp_path, model)
    with pytest.raises(AdapterError, match="sharded or offloaded"):
        source.load()
