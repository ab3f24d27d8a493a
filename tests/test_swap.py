"""Fitting a merge to a trainee and writing it, against the dense update it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from mashup_callback.factors import LoraFactors
from mashup_callback.layers import find_trainee, linear_layers
from mashup_callback.swap import fit
from tests.tiny import llama, lora


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
    trainee = find_trainee(get_peft_model(llama(), lora(r=rank + extra, lora_alpha=alpha, use_rslora=rslora)))
    merged = update(rank, scaling)
    fitted = fit({NAME: merged}, trainee).factors
    delta = fitted[NAME].delta()
    assert (delta - merged.delta()).norm() <= 1e-5 * merged.delta().norm()
    ratio = merged.A.norm() / merged.B.norm()
    A, B = fitted[NAME].A[:rank], fitted[NAME].B[:, :rank]
    assert (A.norm() / B.norm()).item() == pytest.approx(ratio.item(), rel=1e-4)
    assert torch.equal(fitted[NAME].A[rank:], trainee.targets[NAME].A.detach()[rank:])
    assert not fitted[NAME].B[:, rank:].any()


def test_layers_without_a_merge_stay_fresh():
    trainee = find_trainee(get_peft_model(llama(), lora()))
    fitted = fit({NAME: update(2)}, trainee)
    assert set(fitted.factors) == set(trainee.targets) and fitted.lost_energy == 0
    other = "model.layers.1.mlp.up_proj"
    assert torch.equal(fitted.factors[other].A, trainee.targets[other].A) and not fitted.factors[other].B.any()


def test_lost_energy_is_that_of_layers_the_trainee_lacks():
    trainee = find_trainee(get_peft_model(llama(), lora(target_modules=["q_proj"])))
    merged = {NAME: update(2), "model.layers.0.self_attn.o_proj": update(2, scaling=2.0, seed=1)}
    energies = [value.delta().square().sum().item() for value in merged.values()]
    fitted = fit(merged, trainee)
    assert fitted.lost_layers == ("model.layers.0.self_attn.o_proj",)
    assert fitted.lost_energy == pytest.approx(energies[1] / sum(energies))


def test_larger_rank_than_the_trainees_is_refused():
    with pytest.raises(ValueError, match="rank 5 .* the trainee 4"):
        fit({NAME: update(5)}, find_trainee(get_peft_model(llama(), lora(r=4))))


def test_linear_layers_have_the_names_of_the_base_model():
    model = llama()
    names = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert set(linear_layers(model)) == names
    wrapped = linear_layers(get_peft_model(llama(), lora(target_modules=["q_proj"])))
    assert set(wrapped) == names
    assert not any(hasattr(layer, "lora_A") for layer in wrapped.values())


def test_orthogonal_initialisation_is_fresh():
    model = get_peft_model(llama(), lora(init_lora_weights="orthogonal"))
    assert any(target.B.any() for target in find_trainee(model).targets.values())


def test_two_trained_adapters_are_refused():
    model = get_peft_model(llama(), lora())
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 adapters at once"):
        find_trainee(model)
