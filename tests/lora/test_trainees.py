"""Every variant of the trainee: one candidate of weight 1 is computed as by peft itself, or it is turned away."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from peft import AdaLoraConfig, EvaConfig, LoHaConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file, save_file

from mashup_callback import MashupCallback, MashupConfig
from mashup_callback.candidates import as_candidate
from mashup_callback.formats import load_factors, read_adapter
from mashup_callback.lora import LoraUpdate, find_adapter
from mashup_callback.lowrank import LoraFactors
from mashup_callback.trainee import find_trainee
from tests.lora.variants import ATTENTION, IDS, LORA, MODELS, admitted, by_peft, close, output, save_random
from tests.tiny import llama, losses, trained
from tests.tiny import lora as tiny_lora


REJECTED, WEIGHTS = "rejected: ", "adapter_model.safetensors"


def second(model, active=False):
    """Adds an adapter with an update of its own."""
    torch.manual_seed(3)
    model.add_adapter("second", LORA(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"] if active else "default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name)
    return model


def eva(model):
    initialize_lora_eva_weights(model, [{"input_ids": IDS + shift} for shift in range(4)], show_progress_bar=False)
    return model


def merged(model):
    second(model).base_model.merge_adapter(["second"])
    return model


def nested(model):
    attention = model.base_model.model.model.layers[0].self_attn
    attention.q_proj = Linear(attention.q_proj, "default", LORA(), r=2, lora_alpha=4)
    return model


def frozen(model):
    return model.requires_grad_(False)


# Of every model: how it is trained.
TRAINEES = {
    "LoRA": (LORA, "exact"),
    "rsLoRA": (partial(LORA, use_rslora=True), "exact"),
    "DoRA": (partial(LORA, use_dora=True), "exact"),
    "init_lora_weights gaussian": (partial(LORA, init_lora_weights="gaussian"), "exact"),
    "init_lora_weights orthogonal": (partial(LORA, init_lora_weights="orthogonal"), "exact"),
    "lora_bias": (partial(LORA, lora_bias=True), "exact"),
}
# Of Llama: the targets where they are no usual ones, and what is done to the model then.
CONFIGURED = {
    "init_lora_weights eva": (
        partial(LORA, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)),
        eva,
        "exact",
    ),
    "rank_pattern and alpha_pattern": (
        partial(LORA, rank_pattern={"q_proj": 7}, alpha_pattern={"v_proj": 3}),
        None,
        "exact",
    ),
    "modules_to_save": (partial(LORA, modules_to_save=["embed_tokens", "lm_head", "norm"]), None, "exact"),
    "a second adapter, not active": (LORA, second, "exact"),
    "embeddings": (partial(LORA, target_modules=[*ATTENTION, "embed_tokens"]), None, "exact"),
    "embeddings, DoRA": (partial(LORA, use_dora=True, target_modules=[*ATTENTION, "embed_tokens"]), None, "exact"),
    "lm_head": (partial(LORA, target_modules=[*ATTENTION, "lm_head"]), None, "exact"),
    "a second adapter, active": (LORA, partial(second, active=True), "rejected: 'second' is active besides 'default'"),
    "a second adapter, merged": (LORA, merged, "rejected: 'second' is merged besides 'default'"),
    "LoRA of LoRA layers": (LORA, nested, "rejected: LoRA layers one inside the other"),
    "a frozen adapter": (LORA, frozen, "rejected: is_trainable=True.*prepare_model_for_kbit_training"),
    "AdaLoRA": (partial(AdaLoraConfig, total_step=10), None, "rejected: of the type ADALORA, expected LORA"),
    "other methods": (LoHaConfig, None, "rejected: trains no LoRA layers"),
    "init_lora_weights pissa, olora, loftq or corda": (
        partial(LORA, init_lora_weights="pissa"),
        None,
        "rejected: alters the base weights",
    ),
    "init_lora_weights mica": (partial(LORA, init_lora_weights="mica"), None, "rejected: freezes a factor"),
    "aLoRA": (
        partial(LORA, alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
        None,
        "rejected: more than scaling·B·A",
    ),
}


def check(model, update, expected):
    """Written for a while, and for good, a trainee computes what is expected; taken back, every bit is as it was."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainee, plain = find_trainee(model), output(model)
    with trainee.written(update), torch.no_grad():
        assert close(output(model), expected)
    merge, info = trainee.merge([Given(update)], [1.0], "linear", {})
    assert info.kept_energy == pytest.approx(1.0) and info.lost_energy == 0.0
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    trainee.write(merge)
    assert close(output(model), expected) and not torch.allclose(expected, plain, atol=1e-3)
    for one in find_adapter(model, overwrite=True).targets.values():
        # A rank of which both factors are zero would never learn.
        assert (one.A.any(1) | one.B.any(0)).all()
    trainee.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    return trainee, merge


class Given:
    def __init__(self, update):
        self.load = lambda device="cpu": update


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("variant", TRAINEES)
def test_a_trainee_starts_from_what_peft_computes(tmp_path, variant, family):
    (config, how), (make, targets) = TRAINEES[variant], MODELS[family]
    assert how == "exact"
    save_random(tmp_path, make(), LORA(r=3, target_modules=targets))
    torch.manual_seed(2)
    model = get_peft_model(make(), config(target_modules=targets)).eval()
    check(model, admitted(tmp_path, model).load(), by_peft(tmp_path, make))


@pytest.mark.parametrize("variant", CONFIGURED)
def test_what_a_trainee_can_be(tmp_path, variant):
    config, prepare, how = CONFIGURED[variant]
    targets = config.keywords.get("target_modules", ATTENTION) if isinstance(config, partial) else ATTENTION
    model = get_peft_model(llama(), config(target_modules=targets)).eval()
    model = prepare(model) if prepare else model
    if how.startswith(REJECTED):
        with pytest.raises(ValueError, match=how.removeprefix(REJECTED)):
            find_trainee(model)
        return
    path = save_random(tmp_path / "one", llama(), LORA(r=3, target_modules=targets))
    expected = by_peft(path, llama)
    trainee, merge = check(model, admitted(path, model).load(), expected)
    trainee.save(merge, tmp_path / "saved", None)
    assert close(by_peft(tmp_path / "saved", llama), expected)


@pytest.mark.parametrize("parameters", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]])
def test_experts(tmp_path, parameters):
    """Parameters of one module are wrapped one in the other."""
    make = MODELS["qwen3_moe"][0]
    config = partial(LORA, target_modules=["q_proj", "v_proj"], target_parameters=parameters)
    path = save_random(tmp_path / "one", make(), config())
    expected = by_peft(path, make)
    held = find_adapter(PeftModel.from_pretrained(make(), path, is_trainable=True), overwrite=True).targets
    assert len(held) == 4 + 2 * 4 * len(parameters)
    update = LoraUpdate({name: LoraFactors(one.A, one.B, one.scaling) for name, one in held.items()})
    plain = make()
    with torch.no_grad(), update.applied(plain):
        assert close(output(plain), expected)
    assert torch.equal(output(plain), output(make()))
    trainee, merge = check(get_peft_model(make(), config(r=6)).eval(), update, expected)
    trainee.save(merge, tmp_path / "saved", None)
    assert close(by_peft(tmp_path / "saved", make), expected)


@pytest.mark.parametrize("rank", [8, 4, 2])
def test_training_continues_from_an_adapter_at_any_rank(tmp_path, rank):
    path = save_random(tmp_path / "mine", llama(), LORA(target_modules=ATTENTION, task_type="CAUSAL_LM"))
    energies, kept = [], []
    model = llama().eval()
    for name, update in load_factors(read_adapter(path)).items():
        U, S, Vh = torch.linalg.svd(update.delta())
        energies.append(S.square().sum().item()), kept.append(S[:rank].square().sum().item())
        model.get_submodule(name).weight.data += (U[:, :rank] * S[:rank]) @ Vh[:rank]
    callback = MashupCallback(str(path), top_k=1, guard=False, on_error="raise")
    started = trained(tmp_path / "out", callback, peft_config=tiny_lora(r=rank, target_modules=ATTENTION), max_steps=1)
    assert callback.report.decision == "single" and callback.report.candidates[0].weight == 1.0
    assert callback.report.merge.kept_energy == pytest.approx(sum(kept) / sum(energies), abs=1e-6)
    expected = output(model)
    assert rank < 4 or close(expected, by_peft(path, llama))
    alone = trained(tmp_path / "alone", model=model, max_steps=1)
    assert losses(started)[0] == pytest.approx(losses(alone)[0], rel=1e-5)
    assert close(by_peft(tmp_path / "out/mashup", llama), expected)


def test_a_model_that_is_split_by_tensor_parallelism_is_refused():
    model = get_peft_model(llama(), tiny_lora())
    find_trainee(model)
    model.get_base_model()._tp_size = 2
    with pytest.raises(ValueError, match="tensor parallelism"):
        find_trainee(model)


@pytest.mark.parametrize("size, kind", [("cp_size", "context"), ("sp_size", "sequence")])
def test_sequences_that_are_split_are_refused(monkeypatch, size, kind):
    model = get_peft_model(llama(), tiny_lora())
    for value in (1, 2):
        settings = ParallelismConfig(**{size: value})
        monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", settings)
        with pytest.raises(ValueError, match=f"{kind} parallelism") if value > 1 else nullcontext():
            find_trainee(model)


KEPT = {
    "trainable_token_indices": ({"trainable_token_indices": [3]}, "trainable_tokens_delta"),
    "ensure_weight_tying": (
        {"ensure_weight_tying": True, "target_modules": ["embed_tokens", "q_proj"]},
        "embedding_A",
    ),
}


@pytest.mark.parametrize("settings, part", KEPT.values(), ids=KEPT)
def test_what_a_mashup_cannot_overwrite_is_refused_once_it_is_trained(settings, part):
    model = get_peft_model(llama(tie_word_embeddings=True), tiny_lora(**settings))
    find_trainee(model, MashupConfig(overwrite=True))
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data += 0.1
    with pytest.raises(ValueError, match="cannot replace them"):
        find_trainee(model, MashupConfig(overwrite=True))


def test_factors_that_two_layers_share_stay_fresh(tmp_path):
    tied = partial(llama, tie_word_embeddings=True)
    path = save_random(tmp_path / "one", tied(), LORA(target_modules=["embed_tokens", *ATTENTION]))
    plain = save_random(tmp_path / "two", tied(), LORA(target_modules=ATTENTION))
    saved = load_file(path / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in saved.items() if "embed" not in name}, plain / "adapter_model.safetensors"
    )
    settings = {"target_modules": ["embed_tokens", *ATTENTION], "ensure_weight_tying": True}
    model = get_peft_model(tied(), LORA(**settings)).eval()
    trainee = find_trainee(model)
    merge, info = trainee.merge([trainee.admit(as_candidate(path))], [1.0], "linear", {})
    trainee.write(merge)
    assert close(output(model), by_peft(plain, tied)) and info.lost_layers
