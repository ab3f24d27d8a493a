"""Probes against training with peft and AdamW on the same batches, and that they leave no trace."""

import copy
import math

import pytest
import torch
from peft import PeftModel, get_peft_model

from mashup_callback import score_candidates
from mashup_callback.model.isolation import undisturbed
from mashup_callback.scoring import SampleRows, language_model_losses, losses, race
from mashup_callback.trainee import find_trainee
from tests.tiny import llama, lora, rows, save_random_adapter, save_scaled_adapter, sft_trainer


@pytest.fixture
def data(tmp_path):
    loader = sft_trainer(tmp_path / "out", train_rows=rows("text", 64)).get_train_dataloader()
    return SampleRows([loader.dataset[i] for i in range(64)], loader.collate_fn, 16)


def trained_by_peft(path, data, learning_rate, steps=16):
    model = PeftModel.from_pretrained(llama(), path, is_trainable=True).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0)
    batches = [batch for _, batch in data.part(0, 48).batches()]
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
    with torch.no_grad():
        [(_, judge)] = data.part(48, 64).batches()
        return model(**judge).loss.item()


def test_equals_training_with_peft(tmp_path, data):
    paths = [save_random_adapter(tmp_path / f"a{seed}", seed, scale=0.1) for seed in range(3)]
    scores = score_candidates(llama(), paths, data, "probe", learning_rate=1e-2)
    for score in scores:
        expected = trained_by_peft(score.candidate.path, data, 1e-2)
        assert score.probe_loss == pytest.approx(expected, abs=1e-3)
        assert score.probe_loss < score.loss - 0.05
    assert [score.probe_loss for score in scores] == sorted(score.probe_loss for score in scores)
    by_loss = score_candidates(llama(), paths, data)
    assert {s.candidate.name: s.loss for s in scores} == {s.candidate.name: s.loss for s in by_loss}


def test_the_trainees_rank_and_layers_count(tmp_path, data):
    """A trainee of rank 1 on one layer can keep only a part of a candidate, and learns less from it."""
    path = save_random_adapter(tmp_path / "a", 0, scale=0.3)
    found = [
        score_candidates(model, [path], data, "probe", learning_rate=1e-2)[0].probe_loss
        for model in (llama(), get_peft_model(llama(), lora(r=1, target_modules=["q_proj"])))
    ]
    assert found[1] > found[0] + 0.02


def test_leaves_no_trace(tmp_path, data):
    model = get_peft_model(llama(), lora())
    model.train()
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    state = torch.get_rng_state()
    score_candidates(model, [save_random_adapter(tmp_path / "a", 0)], data, "probe", learning_rate=1e-2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0]) and value.requires_grad == before[name][1] and value.grad is None
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert find_trainee(model) is not None


def test_only_the_best_are_probed(tmp_path, data, library):
    factors = [1 - 0.25 * place for place in range(12)]
    paths = [save_scaled_adapter(tmp_path / str(i), library / "trained-0", f) for i, f in enumerate(factors)]
    scores = score_candidates(llama(), paths, data, "probe", keep=2, learning_rate=1e-3)
    probed = [score for score in scores if score.probe_loss is not None]
    by_loss = score_candidates(llama(), paths, data)
    assert {s.candidate.name for s in probed} == {s.candidate.name for s in by_loss[:8]}
    others = [score for score in scores if score.probe_loss is None]
    assert len(others) == 4
    assert all(score.status == "eliminated" and "before the probe" in score.reason for score in others)


def test_too_little_time_or_data_leaves_the_ranking_by_loss(tmp_path, data, monkeypatch, caplog):
    paths = [save_random_adapter(tmp_path / f"a{seed}", seed, scale=0.5 * seed) for seed in range(3)]
    model = llama()
    expected = [score.candidate.name for score in score_candidates(model, paths, data.part(0, 1))]
    scores = score_candidates(model, paths, data.part(0, 1), "probe")
    assert [score.candidate.name for score in scores] == expected
    assert "too few" in caplog.text
    caplog.clear()
    original = race.probe
    monkeypatch.setattr(race, "probe", lambda *args: original(*args[:-1], -math.inf))
    scores = score_candidates(model, paths, data, "probe", max_seconds=60)
    assert [score.probe_loss for score in scores] == [None] * 3 and {score.status for score in scores} == {"scored"}
    assert "max_seconds" in caplog.text


def test_out_of_memory_halves_the_step(tmp_path, data):
    model, sizes = llama(), []

    def forward(module, args, kwargs):
        if torch.is_grad_enabled():
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > 8:
                raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(forward, with_kwargs=True)
    [score] = score_candidates(model, [save_random_adapter(tmp_path / "a", 0)], data, "probe", learning_rate=1e-2)
    assert score.probe_loss is not None
    assert sizes[:3] == [16, 8, 8] and sizes.count(8) == 16


def test_a_step_never_keeps_the_logits_of_the_batch(monkeypatch, data):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 2**12 * 4)
    model, saved = llama().eval(), []
    [(_, batch), *_] = data.batches()
    with undisturbed(model), torch.enable_grad():
        model.lm_head.weight.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
            found = language_model_losses(model, batch)
        gradient = torch.autograd.grad(found.loss.sum() / found.tokens.sum(), model.model.norm.weight)[0]
    # (32, 96) is the head's own weight.
    assert saved and not [shape for shape in saved if len(shape) > 1 and shape[-1] == 96 and shape[0] != 32]
    reference = copy.deepcopy(model).requires_grad_()
    expected = torch.autograd.grad(reference(**batch).loss, reference.model.norm.weight)[0]
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
