"""Parameters that were trained whole besides an adapter: taken in where the run trains them too, else rejected."""

import pickle
from functools import partial

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts
from peft import PeftModel, get_peft_model

from mashup_callback import MashupCallback, MashupConfig, merge_adapters, score_candidates, swap
from mashup_callback.candidates import as_candidate
from mashup_callback.errors import AdapterError
from mashup_callback.model import clean_name, whole_parameters
from mashup_callback.trainee import find_trainee
from tests.kernels import FusedAttention, FusedMLP, fused
from tests.lora.test_trainees import check
from tests.lora.variants import ATTENTION, BESIDES, IDS, LORA, MODELS, admitted, by_peft, close, output, save_random
from tests.tiny import llama, lora, losses, trained


BIASED = partial(llama, attention_bias=True)
# What is trained besides LoRA, and the models on which it is tried.
KINDS = {
    BESIDES[0]: [
        (llama, {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
        (partial(llama, tie_word_embeddings=True), {"modules_to_save": ["embed_tokens"]}),
        (partial(llama, tie_word_embeddings=True), {"modules_to_save": ["lm_head"]}),
        (MODELS["gemma3"][0], {"modules_to_save": ["embed_tokens", "norm"]}),
        (MODELS["gpt2"][0], {"modules_to_save": ["wte", "ln_f", "c_proj"], "target_modules": ["c_attn"]}),
        (MODELS["bert"][0], {"modules_to_save": ["pooler"], "target_modules": ["query"]}),
    ],
    BESIDES[1]: [
        (BIASED, {"bias": "lora_only"}),
        (BIASED, {"bias": "all"}),
        (MODELS["bert"][0], {"bias": "all", "target_modules": ["query"]}),
    ],
    BESIDES[2]: [(llama, {"lora_bias": True, "alpha_pattern": {"v_proj": 3}}), (BIASED, {"lora_bias": True})],
}
CASES = [(make, {"target_modules": ATTENTION, **settings}) for cases in KINDS.values() for make, settings in cases]


def adapted(make, settings):
    torch.manual_seed(2)
    # Names of modules begin with the adapter's.
    return get_peft_model(make(), LORA(**{**settings, "r": 6}), adapter_name="q").eval()


@pytest.mark.parametrize(("make", "settings"), CASES, ids=lambda value: str(value)[:60] * isinstance(value, dict))
def test_they_are_what_peft_computes_where_the_run_trains_them(tmp_path, make, settings):
    path, model = save_random(tmp_path / "one", make(), LORA(**settings)), adapted(make, settings)
    expected, source = by_peft(path, make), admitted(path, model)
    update = source.load()
    assert source.rank == 4 and any(one.whole for one in update.factors.values())
    parameters = [*model.parameters()]
    with model.disable_adapter():
        plain = output(model)
        with update.applied(model):
            assert close(output(model), expected)
        assert torch.equal(output(model), plain)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    trainee, merge = check(model, update, expected)
    trainee.save(merge, tmp_path / "saved", None)
    assert close(by_peft(tmp_path / "saved", make), expected)
    other = get_peft_model(make(), LORA(target_modules=settings["target_modules"]))
    with pytest.raises(AdapterError, match="was trained besides the adapter, which needs a LoRA run"):
        find_trainee(other).admit(as_candidate(path))


@pytest.mark.parametrize("space", ["delta", "core"])
@pytest.mark.parametrize("method", ["linear", "ties", "task_arithmetic"])
def test_they_are_merged_as_mergekit_merges_full_models(tmp_path, method, space):
    settings, weights = CASES[0][1], [0.3, 0.6]
    model, base = adapted(llama, settings), llama().state_dict()
    trainee, sources, tuned = find_trainee(model, MashupConfig(merge_space=space)), [], {}
    for seed in range(2):
        path = save_random(tmp_path / str(seed), llama(), LORA(**settings), seed=seed)
        sources.append(trainee.admit(as_candidate(path)))
        tuned[str(seed)] = PeftModel.from_pretrained(llama(), path).merge_and_unload().state_dict()
    wholes = whole_parameters(model)
    given = tuned if method == "linear" else {"base": base, **tuned}
    expected = merge_state_dicts(
        {which: {name: state[name] for name in wholes} for which, state in given.items()},
        method,
        parameters={"weight": weights},
        base=None if method == "linear" else "base",
    )
    merge, _ = trainee.merge(sources, weights, method, {})
    # As it reaches the other processes of a run.
    trainee.write(pickle.loads(pickle.dumps(merge)))
    held = {clean_name(name): value for name, value in model.named_parameters()}
    assert len(wholes) == 7
    for name, whole in wholes.items():
        assert close(held[whole.name], expected[name]), name


def test_a_failed_swap_leaves_every_bit(tmp_path, monkeypatch):
    settings = {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"], "bias": "all"}
    path, model = save_random(tmp_path, BIASED(), LORA(**settings)), adapted(BIASED, settings)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainee = find_trainee(model)
    merge, info = trainee.merge([trainee.admit(as_candidate(path))], [1.0], "linear", {})
    assert info.rank == 4
    seen = []

    def fail(found, values):
        seen.extend(values)
        raise RuntimeError("broken")

    monkeypatch.setattr(swap, "_check_written", fail)
    with pytest.raises(RuntimeError, match="broken"):
        trainee.write(merge)
    assert "lm_head.modules_to_save.q.weight" in seen
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_training_continues_from_them(tmp_path):
    settings = {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}
    path = save_random(tmp_path / "mine", llama(), LORA(**settings, task_type="CAUSAL_LM"))
    callback = MashupCallback(str(path), top_k=1, guard=False, on_error="raise")
    started = trained(tmp_path / "out", callback, peft_config=lora(r=5, **settings), max_steps=1)
    model = PeftModel.from_pretrained(llama(), path, is_trainable=True)
    alone = trained(tmp_path / "alone", model=model, max_steps=1)
    assert callback.report.decision == "single"
    assert losses(started)[0] == pytest.approx(losses(alone)[0], rel=1e-5)
    assert close(by_peft(tmp_path / "out/mashup", llama), by_peft(path, llama))


@pytest.mark.parametrize("targets", [ATTENTION, [*ATTENTION, "embed_tokens"]], ids=["plain", "embeddings"])
def test_those_that_were_trained_before_are_overwritten_too(tmp_path, targets):
    path = save_random(tmp_path / "one", llama(), LORA(target_modules=targets))
    settings = {"target_modules": targets, "lora_bias": targets == ATTENTION}
    model = adapted(llama, {**settings, "modules_to_save": ["lm_head", "norm"]})
    for name, value in model.named_parameters():
        if "modules_to_save" in name or name.endswith("bias"):
            value.data += 0.1
    plain, trainee, expected = output(model), find_trainee(model, MashupConfig(overwrite=True)), by_peft(path, llama)
    merge, _ = trainee.merge([trainee.admit(as_candidate(path))], [1.0], "linear", {})
    with trainee.written(merge), torch.no_grad():
        assert close(output(model), expected)
    trainee.write(merge)
    assert close(output(model), expected)
    trainee.save(merge, tmp_path / "saved", None)
    assert close(by_peft(tmp_path / "saved", llama), expected)
    trainee.undo()
    assert torch.equal(output(model), plain)


def test_they_are_scored_under_fused_kernels(tmp_path):
    settings = {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}
    path, batch = save_random(tmp_path, llama(), LORA(**settings)), {"input_ids": IDS, "labels": IDS}
    with torch.no_grad():
        expected = PeftModel.from_pretrained(llama(), path).eval()(**batch).loss.item()
    for model in (adapted(llama, settings), fused(adapted(llama, settings), FusedMLP, FusedAttention)):
        [score] = score_candidates(model, [path], [batch])
        assert score.loss == pytest.approx(expected, rel=1e-5) and not score.warnings


def test_a_merge_without_a_model_refuses_them(tmp_path):
    save_random(tmp_path / "biased", BIASED(), LORA(target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(ValueError, match="a bias, which is supported where a LoRA adapter is trained"):
        merge_adapters([tmp_path / "biased"], output_dir=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
