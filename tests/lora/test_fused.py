"""Candidates on a model whose kernels multiply by the weights themselves, against the same model without kernels."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from mashup_callback import MashupCallback, score_candidates
from mashup_callback.errors import BypassedError
from mashup_callback.formats import load_factors, read_adapter
from mashup_callback.lora import applied
from tests.kernels import FusedAttention, FusedMLP, fused
from tests.tiny import LINEAR, llama, lora, lora_parameters, losses, save_random_adapter, trained


BATCH = {"input_ids": torch.arange(7, 55).view(4, 12), "labels": torch.arange(7, 55).view(4, 12)}


def trainee(**settings):
    torch.manual_seed(0)
    return get_peft_model(llama(), lora(**settings)).eval()


def scored(model, paths, **settings):
    return {score.candidate.path: score for score in score_candidates(model, paths, [BATCH], **settings)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fused")
    for seed in range(3):
        save_random_adapter(directory / str(seed), seed, scale=0.3)
    return sorted(directory.iterdir())


@pytest.mark.parametrize("kinds", [(FusedMLP,), (FusedAttention,), ()], ids=["mlp", "attention", "both"])
def test_candidates_are_scored_as_without_kernels(runs, kinds):
    model, expected = fused(trainee(), *kinds), scored(llama(), runs)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    found = scored(model, runs)
    for path, score in found.items():
        assert score.loss == pytest.approx(expected[path].loss, rel=1e-5) and not score.warnings
    assert len({round(score.loss, 4) for score in found.values()}) == 3
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) and value.requires_grad == flags[name]
    assert not any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("rank", "targets"), [(2, LINEAR), (4, ["q_proj", "up_proj", "o_proj"])])
def test_what_the_trainee_cannot_hold_is_told(runs, rank, targets):
    model, factors = fused(trainee(r=rank, target_modules=targets)), load_factors(read_adapter(runs[0]))
    reference, whole, kept = llama().eval(), 0.0, 0.0
    for name, update in factors.items():
        U, S, Vh = torch.linalg.svd(update.delta())
        whole += S.square().sum().item()
        if name.rpartition(".")[2] in targets:
            kept += S[:rank].square().sum().item()
            reference.get_submodule(name).weight.data += (U[:, :rank] * S[:rank]) @ Vh[:rank]
    found = scored(model, runs[:1])[runs[0]]
    assert f"keep {kept / whole:.1%} of its update" in found.warnings[0]
    with torch.no_grad():
        assert found.loss == pytest.approx(reference(**BATCH).loss.item(), rel=1e-4)


def test_layers_that_are_reached_keep_their_whole_update(runs):
    """Attention is hooked, at any rank; only the MLP's updates go into the trainee."""
    path = runs[0]
    model = fused(trainee(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]), FusedMLP)
    assert scored(model, [path])[path].loss == pytest.approx(scored(llama(), [path])[path].loss, rel=1e-5)


def test_without_a_trainee_the_run_says_why(runs):
    with pytest.raises(BypassedError, match="14 layers .*none is.*Switch the kernels off"):
        scored(fused(llama()), runs)


def test_a_run_is_that_without_kernels(tmp_path, runs):
    def train(model, name, guard):
        callback = MashupCallback([str(path) for path in runs], guard=guard, on_error="raise")
        trainer = trained(tmp_path / name, callback, model=model)
        return callback.report, losses(trainer), lora_parameters(trainer.model)

    for guard in (False, True):
        (found, steps, weights), (expected, wanted, others) = (
            train(model, f"{name}-{guard}", guard)
            for name, model in (("fused", fused(trainee())), ("plain", trainee()))
        )
        assert found.decision == expected.decision
        assert steps == pytest.approx(wanted, rel=1e-4)
        for name in ("base_loss", "single_loss", "merged_loss"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5)
        torch.testing.assert_close(weights, others, atol=1e-4, rtol=1e-3)


def test_compiled_blocks_are_scored_as_they_are_and_not_compiled_again(runs):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model, expected = trainee(), scored(llama(), runs)
    for block in model.base_model.model.model.layers:
        block.compile(backend=backend)
    with torch.no_grad():
        before = model(**BATCH).loss
        count = len(compiled)
        for kernels in (False, True):
            found = scored(fused(model) if kernels else model, runs)
            for path, score in found.items():
                assert score.loss == pytest.approx(expected[path].loss, rel=1e-5)
        assert count and len(compiled) == count
        assert model(**BATCH).loss == pytest.approx(before.item(), rel=1e-5)


def test_a_trainee_in_a_trainee_is_scored_by_its_base(runs):
    with pytest.warns(UserWarning):
        model = get_peft_model(trainee(), lora(r=8))
    expected = scored(llama(), runs)
    for kernels in (False, True):
        found = scored(fused(model) if kernels else model, runs)
        for path, score in found.items():
            assert score.loss == pytest.approx(expected[path].loss, rel=1e-5)


def test_candidates_that_change_nothing_are_told_from_those_that_do(tmp_path, runs):
    model = llama()
    model.tower = llama().model
    for seed in range(2):
        save_random_adapter(tmp_path / str(seed), seed, base=model, target_modules=r"tower.*q_proj")
    found = scored(model, [tmp_path / "0", tmp_path / "1"])
    assert all("all 2 candidates have the same loss on every row" in score.warnings[-1] for score in found.values())
    assert not any(score.warnings for score in scored(model, runs).values())


def test_an_adapter_that_was_never_trained_is_scored_too(tmp_path, runs):
    save_random_adapter(tmp_path / "zero", 0, scale=0.0)
    found = scored(fused(trainee()), [tmp_path / "zero", runs[0]])
    assert {score.status for score in found.values()} == {"scored"}


def test_hooks_alone_tell_what_they_do_not_reach(runs):
    model, factors = fused(llama(), FusedMLP).eval(), load_factors(read_adapter(runs[0]))
    with pytest.raises(BypassedError) as raised, torch.no_grad(), applied(model, factors):
        model(**BATCH)
    assert raised.value.layers == {name for name in factors if ".mlp." in name}
