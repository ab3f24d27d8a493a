"""Every variant of a candidate against peft's own forward with that adapter: taken in exactly, or rejected."""

import json
import os
from functools import partial

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mashup_callback.candidates import as_candidate
from mashup_callback.errors import AdapterError
from mashup_callback.lora import LoraUpdate, merge_factors
from mashup_callback.trainee import admit_to
from tests.tiny import llama


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(7, 31).view(2, 12)


def made(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


ATTENTION = ["q_proj", "v_proj", "down_proj"]
# A tiny model of each family, and layers of it that are adapted.
MODELS = {
    "llama": (llama, ATTENTION),
    "gpt2": (
        partial(made, GPT2LMHeadModel, GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        ["c_attn", "c_fc", "c_proj"],
    ),
    "gemma3": (
        partial(
            made,
            Gemma3ForCausalLM,
            Gemma3TextConfig(vocab_size=96, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, **SIZES),
        ),
        ATTENTION,
    ),
    "qwen3_moe": (
        partial(
            made,
            Qwen3MoeForCausalLM,
            Qwen3MoeConfig(
                vocab_size=96,
                num_key_value_heads=2,
                head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                **SIZES,
            ),
        ),
        ["q_proj", "v_proj"],
    ),
    "t5": (
        partial(
            made,
            T5ForConditionalGeneration,
            T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
        ),
        ["q", "v", "wo"],
    ),
    "bert": (partial(made, BertModel, BertConfig(vocab_size=96, **SIZES)), ["query", "value", "output.dense"]),
}
LORA = partial(LoraConfig, r=4, lora_alpha=8)
# Every variant of a candidate, how it is trained, and how it is taken in.
CANDIDATES = {
    "LoRA": (LORA, "exact"),
    "rsLoRA": (partial(LORA, use_rslora=True), "exact"),
    "DoRA": (partial(LORA, use_dora=True), "dense"),
    "AdaLoRA": (partial(AdaLoraConfig, init_r=5, target_r=2, lora_alpha=8, total_step=10), "exact"),
    "LoHa": (partial(LoHaConfig, r=2, alpha=4), "exact"),
    "LoHa of high rank": (partial(LoHaConfig, r=6, alpha=4), "dense"),
    "LoKr": (partial(LoKrConfig, r=1, alpha=4, decompose_both=True), "exact"),
    "LoKr of high rank": (partial(LoKrConfig, r=6, alpha=4), "dense"),
}


def save_random(directory, model, config, scale=0.3):
    """Saves an adapter of random tensors as peft saves it."""
    torch.manual_seed(1)
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                noise = scale * torch.randn_like(parameter)
                parameter.copy_(parameter + noise if "magnitude" in name else noise)
    tuned.save_pretrained(directory)
    return directory


def output(model):
    inputs = {"decoder_input_ids": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model(IDS, **inputs)[0]


def by_peft(path, make):
    return output(PeftModel.from_pretrained(make(), path).eval())


def admitted(path, model):
    return admit_to(model)(as_candidate(path))


def close(found, expected):
    return ((found - expected).norm() / expected.norm()).item() < 1e-5


def check(path, make):
    """Scored, and merged alone with weight 1, it computes what peft computes; returns its updates."""
    model, expected = make().eval(), by_peft(path, make)
    plain = output(model)
    assert not torch.allclose(expected, plain, atol=1e-3)
    update = admitted(path, model).load()
    with update.applied(model):
        assert close(output(model), expected)
    merged = merge_factors([update.factors], weights=[1.0], ranks=1000)
    with LoraUpdate(merged.factors).applied(model):
        assert close(output(model), expected)
    assert torch.equal(output(model), plain)
    return update.factors


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("variant", CANDIDATES)
def test_a_candidate_of_weight_one_is_what_peft_computes(tmp_path, variant, family):
    (config, how), (make, targets) = CANDIDATES[variant], MODELS[family]
    if family == "gpt2" and variant.startswith("Lo") and variant != "LoRA":
        pytest.skip("peft has no LoHa or LoKr of Conv1D")
    save_random(tmp_path, make(), config(target_modules=targets))
    updates = check(tmp_path, make)
    assert any(update.dense for update in updates.values()) == (how == "dense")
