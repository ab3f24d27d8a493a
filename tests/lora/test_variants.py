"""Every variant of a candidate against peft's own forward with that adapter: taken in exactly, or rejected."""

import re
from functools import partial

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mashup_callback.candidates import as_candidate
from mashup_callback.errors import AdapterError
from mashup_callback.lora import LoraUpdate, merge_adapters, merge_factors
from mashup_callback.trainee import admit_to, find_trainee
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


EXPERTS = {
    "qwen3_moe": MODELS["qwen3_moe"][0],
    "mixtral": partial(
        made, MixtralForCausalLM, MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=3, **SIZES)
    ),
    # Its parameters are the other way round.
    "gpt_oss": partial(
        made,
        GptOssForCausalLM,
        GptOssConfig(vocab_size=96, num_key_value_heads=2, head_dim=8, num_local_experts=4, **SIZES),
    ),
}


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("parameters", [["down_proj", "gate_up_proj"], ["down_proj"]], ids="-".join)
def test_experts_that_are_parts_of_one_parameter(tmp_path, family, parameters):
    named = [f"mlp.experts.{name}" for name in parameters]
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"experts.down_proj": 6}}
    config = LORA(target_modules=["q_proj"] * (len(named) - 1), target_parameters=named, **patterns)
    save_random(tmp_path, EXPERTS[family](), config)
    updates = check(tmp_path, EXPERTS[family])
    assert {update.rank for name, update in updates.items() if "down_proj" in name} == {2}
    with pytest.raises(AdapterError, match="several experts at once, and there is no base model"):
        merge_adapters([tmp_path])
    with pytest.raises(AdapterError, match="no weights of experts|no linear layers"):
        admitted(tmp_path, MODELS["gemma3"][0]())
    save_random(tmp_path, EXPERTS[family](), config, scale=5)
    with pytest.raises(AdapterError, match=r"experts\.\w+\.0 is .* times as large as the weight"):
        admitted(tmp_path, EXPERTS[family]()).load()


def apart(family, layers):
    """Tensors of layers of single experts, as models had them before."""
    generator = torch.Generator().manual_seed(1)
    holder, inner, count = {"mixtral": ("block_sparse_moe", 64, 3), "qwen3_moe": ("mlp", 16, 4)}[family]
    names = [f"{holder}.experts.{expert}.{layer}" for expert in range(count) for layer in layers]
    for name in (f"base_model.model.model.layers.{place}.{name}" for place in range(2) for name in names):
        sizes = (inner, 32) if name.endswith(("w2", "down_proj")) else (32, inner)
        yield f"{name}.lora_A.weight", 0.3 * torch.randn(4, sizes[0], generator=generator)
        yield f"{name}.lora_B.weight", 0.3 * torch.randn(sizes[1], 4, generator=generator)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("mixtral", ["w1", "w2", "w3"]),
        ("qwen3_moe", ["up_proj", "gate_proj", "down_proj"]),
        ("mixtral", ["w2"]),
    ],
)
def test_layers_of_single_experts_on_a_model_that_has_them_in_one_parameter(tmp_path, family, layers):
    LORA(target_modules=layers).save_pretrained(tmp_path)
    save_file(dict(apart(family, layers)), tmp_path / "adapter_model.safetensors")
    check(tmp_path, EXPERTS[family])
    # peft takes no half of a parameter, so one without an update stands for none.
    edit(
        tmp_path, lambda tensors: {k: 0 * v if re.search("(w1|up_proj).lora_B", k) else v for k, v in tensors.items()}
    )
    expected, model = by_peft(tmp_path, EXPERTS[family]), EXPERTS[family]()
    edit(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if not re.search(r"w1|\.up_proj", k)})
    with admitted(tmp_path, model).load().applied(model):
        assert close(output(model), expected)


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


def edit(path, change):
    """Changes the tensors of an adapter's file."""
    file = path / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file)


def with_prefix(tensors, prefix):
    return {prefix + key.removeprefix("base_model.model."): value for key, value in tensors.items()}


SPELLINGS = {
    "no base_model.model": lambda tensors: with_prefix(tensors, ""),
    "another class": lambda tensors: with_prefix(tensors, "base_model.model.language_model."),
    "with the adapter's name": lambda tensors: {k.replace("weight", "default.weight"): v for k, v in tensors.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_names(tmp_path, spelling):
    save_random(tmp_path, llama(), LORA(target_modules=ATTENTION))
    expected = by_peft(tmp_path, llama)
    edit(tmp_path, SPELLINGS[spelling])
    if spelling == "another class":
        edit(
            tmp_path,
            lambda tensors: {k.replace("language_model.model", "language_model"): tensors[k] for k in tensors},
        )
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
