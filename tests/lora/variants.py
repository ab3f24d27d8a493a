"""The kinds of adapters, tiny models of several families, and what peft computes with the one on the other."""

from functools import partial

import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertModel,
    Gemma3ForCausalLM,
    GPT2LMHeadModel,
    GptOssForCausalLM,
    MixtralForCausalLM,
    Qwen3MoeForCausalLM,
    T5ForConditionalGeneration,
)

from mashup_callback.candidates import as_candidate
from mashup_callback.lora import LoraUpdate, merge_factors
from mashup_callback.trainee import admit_to
from tests.tiny import llama


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(7, 31).view(2, 12)


def made(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


def tiny(kind, **settings):
    """What makes a model of this class, always the same."""
    return partial(made, kind, kind.config_class(vocab_size=96, **settings))


ATTENTION = ["q_proj", "v_proj", "down_proj"]
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, **SIZES}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# A tiny model of each family, and layers of it that are adapted.
MODELS = {
    "llama": (llama, ATTENTION),
    "gpt2": (tiny(GPT2LMHeadModel, n_embd=32, n_layer=2, n_head=4, n_positions=64), ["c_attn", "c_fc", "c_proj"]),
    "gemma3": (tiny(Gemma3ForCausalLM, query_pre_attn_scalar=8, **GROUPED), ATTENTION),
    "qwen3_moe": (tiny(Qwen3MoeForCausalLM, **QWEN, **GROUPED), ["q_proj", "v_proj"]),
    "t5": (tiny(T5ForConditionalGeneration, **T5), ["q", "v", "wo"]),
    "bert": (tiny(BertModel, **SIZES), ["query", "value", "output.dense"]),
}
EXPERTS = {
    "qwen3_moe": MODELS["qwen3_moe"][0],
    "mixtral": tiny(MixtralForCausalLM, num_key_value_heads=2, num_local_experts=3, **SIZES),
    # Its parameters are the other way round.
    "gpt_oss": tiny(GptOssForCausalLM, num_local_experts=4, **GROUPED),
}
LORA = partial(LoraConfig, r=4, lora_alpha=8)
# What is trained besides LoRA's factors, and is tried in test_wholes.
BESIDES = ("modules_to_save of embeddings, head and norms", "bias", "lora_bias")
# How every variant of a candidate is taken in: as factors, as a dense update of one layer at a time, or not at all.
CANDIDATES = {
    "LoRA": "exact",
    "rsLoRA": "exact",
    "DoRA": "dense",
    "AdaLoRA": "exact",
    "LoHa": "exact",
    "LoHa of high rank": "dense",
    "LoKr": "exact",
    "LoKr of high rank": "dense",
    "rank_pattern and alpha_pattern": "exact",
    "layers_to_transform": "exact",
    "exclude_modules": "exact",
    "target_modules as a regular expression": "exact",
    "target_modules=all-linear": "exact",
    "init_lora_weights=orthogonal": "exact",
    "LoRA of lm_head": "exact",
    "LoRA of embeddings": "exact",
    "DoRA of embeddings": "dense",
    "LoHa with patterns": "exact",
    "LoKr with patterns": "dense",
    "target_parameters of experts": "exact",
    **{f"{kind}, trained here too": "exact" for kind in BESIDES},
    **dict.fromkeys(BESIDES, "rejected: was trained besides the adapter, which needs a LoRA run"),
    "trainable_token_indices": "rejected: embeddings were trained",
    "layer_replication": "rejected: the base model's layers are repeated",
    "aLoRA": "rejected: the update applies to a part of each sequence",
    "init_lora_weights=pissa": "rejected: may have changed the base model",
    "other methods, such as IA3": "rejected: what other methods train is no update of linear layers",
}
# What was trained: the first on layers of every model, the others on Llama.
EVERYWHERE = {
    "LoRA": LORA,
    "rsLoRA": partial(LORA, use_rslora=True),
    "DoRA": partial(LORA, use_dora=True),
    "AdaLoRA": partial(AdaLoraConfig, init_r=5, target_r=2, lora_alpha=8, total_step=10),
    "LoHa": partial(LoHaConfig, r=2, alpha=4),
    "LoHa of high rank": partial(LoHaConfig, r=6, alpha=4),
    "LoKr": partial(LoKrConfig, r=1, alpha=4, decompose_both=True),
    "LoKr of high rank": partial(LoKrConfig, r=6, alpha=4),
}
CONFIGURED = {
    "rank_pattern and alpha_pattern": partial(
        LORA, rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 6}, alpha_pattern={"v_proj": 32}
    ),
    "layers_to_transform": partial(LORA, layers_to_transform=[1]),
    "exclude_modules": partial(LORA, exclude_modules=["layers.0.self_attn.q_proj"]),
    "target_modules as a regular expression": partial(LORA, target_modules=r".*\.1\.self_attn\.[kv]_proj"),
    "target_modules=all-linear": partial(LORA, target_modules="all-linear"),
    "init_lora_weights=orthogonal": partial(LORA, init_lora_weights="orthogonal"),
    "LoRA of lm_head": partial(LORA, target_modules=["lm_head", "q_proj"]),
    "LoRA of embeddings": partial(LORA, target_modules=["embed_tokens", "q_proj"]),
    "DoRA of embeddings": partial(LORA, use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "LoHa with patterns": partial(LoHaConfig, r=2, alpha=4, rank_pattern={"v_proj": 1}),
    "LoKr with patterns": partial(LoKrConfig, r=6, alpha=4, alpha_pattern={"q_proj": 2}),
    "trainable_token_indices": partial(LORA, trainable_token_indices=[3]),
    "layer_replication": partial(LORA, layer_replication=[[0, 2], [0, 2]]),
    "aLoRA": partial(LORA, alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
    "init_lora_weights=pissa": partial(LORA, init_lora_weights="pissa"),
    "other methods, such as IA3": partial(IA3Config, feedforward_modules=["down_proj"]),
}


def save_random(directory, model, config, scale=0.3, seed=1):
    """Saves an adapter of random tensors as peft saves it."""
    torch.manual_seed(seed)
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


def edit(path, change):
    """Changes the tensors of an adapter's file."""
    file = path / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file)
