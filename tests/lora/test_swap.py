"""Fitting a merge to a trainee and writing it, against the dense update it stands for."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from mashup_callback.formats import load_factors, read_adapter
from mashup_callback.lora import LoraUpdate, find_adapter, fit
from mashup_callback.lowrank import LoraFactors
from mashup_callback.model import linear_layers
from mashup_callback.trainee import find_trainee
from tests.tiny import llama, lora, save_random_adapter


NAME = "model.layers.0.self_attn.q_proj"


def update(rank, scaling=1.0, seed=0, sizes=(32, 32)):
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(
        torch.randn(rank, sizes[0], generator=generator), torch.randn(sizes[1], rank, generator=generator), scaling
    )


@settings(max_examples=20, deadline=None)
@given(
    rank=st.integers(1, 6),
    extra=st.integers(0, 4),
    alpha=st.integers(1, 40),
    rslora=st.booleans(),
    scaling=st.floats(-3, 3).filter(lambda value: abs(value) > 0.05),
)
def test_fitted_update_is_the_merge(rank, extra, alpha, rslora, scaling):
    trainee = find_adapter(get_peft_model(llama(), lora(r=rank + extra, lora_alpha=alpha, use_rslora=rslora)))
    merged = update(rank, scaling)
    fitted = fit({NAME: merged}, trainee)
    delta = fitted[NAME].delta()
    assert (delta - merged.delta()).norm() <= 1e-5 * merged.delta().norm()
    fresh = trainee.targets[NAME].A.detach()
    assert fitted[NAME].A[:rank].norm().item() == pytest.approx(fresh[:rank].norm().item(), rel=1e-4)
    assert torch.equal(fitted[NAME].A[rank:], fresh[rank:])
    assert not fitted[NAME].B[:, rank:].any()


def losses_from(start, learning_rate, steps=8):
    """Losses of training the tiny model from an update of each layer."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), lora())
    trainee = find_trainee(model)
    trainee.write(LoraUpdate(fit(start, trainee.adapter)))
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=learning_rate)
    tokens = torch.randint(7, 87, (4, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("learning_rate", [2e-4, 1e-2])
@pytest.mark.parametrize("times", [1 / 30, 30.0, 1000.0])
def test_an_unbalanced_start_trains_as_the_balanced_one(tmp_path, times, learning_rate):
    balanced = load_factors(read_adapter(save_random_adapter(tmp_path / "one", 0)))
    unbalanced = {n: LoraFactors(one.A * times, one.B / times, one.scaling) for n, one in balanced.items()}
    expected = losses_from(balanced, learning_rate)
    assert expected[-1] < expected[0]
    assert losses_from(unbalanced, learning_rate) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scaling", [0.0, 2.0])
def test_an_update_of_zero_leaves_the_trainee_fresh(scaling):
    trainee = find_adapter(get_peft_model(llama(), lora()))
    zero = LoraFactors(torch.ones(4, 32), torch.full((32, 4), 0.0 if scaling else 1.0), scaling)
    found = fit({NAME: zero}, trainee)[NAME]
    assert torch.equal(found.A, trainee.targets[NAME].A) and not found.B.any()


def test_a_trainee_with_zero_rows_gets_an_even_balance():
    trainee = find_adapter(get_peft_model(llama(), lora(r=4)))
    trainee.targets[NAME].A.data.zero_()
    merged = update(4)
    found = fit({NAME: merged}, trainee)[NAME]
    assert (found.delta() - merged.delta()).norm() <= 1e-5 * merged.delta().norm()
    assert found.A.norm().item() == pytest.approx(2 * found.B.norm().item(), rel=1e-4)


def given_update(factors):
    """Stands for an adapter on disk."""
    return SimpleNamespace(load=lambda: LoraUpdate(factors))


def test_layers_without_a_merge_stay_fresh():
    trainee = find_trainee(get_peft_model(llama(), lora()))
    fitted, info = trainee.merge([given_update({NAME: update(2)})], [1.0], "linear", {})
    targets = trainee.adapter.targets
    assert set(fitted.factors) == set(targets) and info.lost_energy == 0 and info.lost_layers == ()
    other = "model.layers.1.mlp.up_proj"
    assert torch.equal(fitted.factors[other].A, targets[other].A) and not fitted.factors[other].B.any()


def test_lost_energy_is_that_of_layers_the_trainee_lacks():
    trainee = find_trainee(get_peft_model(llama(), lora(target_modules=["q_proj"])))
    merged = {NAME: update(2), "model.layers.0.self_attn.o_proj": update(2, scaling=2.0, seed=1)}
    energies = [value.delta().square().sum().item() for value in merged.values()]
    fitted, info = trainee.merge([given_update(merged)], [1.0], "linear", {})
    assert set(fitted.factors) == set(trainee.adapter.targets)
    assert info.lost_layers == ("model.layers.0.self_attn.o_proj",)
    assert info.lost_energy == pytest.approx(energies[1] / sum(energies))


def test_larger_rank_than_the_trainees_is_refused():
    with pytest.raises(ValueError, match="rank 5 .* the trained adapter 4"):
        fit({NAME: update(5)}, find_adapter(get_peft_model(llama(), lora(r=4))))


def test_linear_layers_have_the_names_of_the_base_model():
    model = llama()
    names = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Embedding)}
    assert set(linear_layers(model)) == names
    wrapped = linear_layers(get_peft_model(llama(), lora(target_modules=["q_proj"])))
    assert set(wrapped) == names
    assert not any(hasattr(layer, "lora_A") for layer in wrapped.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_orthogonal_initialization_is_fresh(dtype):
    model = get_peft_model(llama().to(dtype), lora(init_lora_weights="orthogonal"))
    assert any(target.B.any() for target in find_adapter(model).targets.values())


def test_two_trained_adapters_are_refused():
    model = get_peft_model(llama(), lora())
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 adapters at once"):
        find_trainee(model)
