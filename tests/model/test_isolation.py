"""Looking at a model leaves no trace, also when looking fails."""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from mashup_callback.model.isolation import undisturbed, without_adapters
from tests.tiny import LINEAR, llama, lora


def state(model):
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        model.config.use_cache,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_undisturbed(fails):
    model = get_peft_model(llama(), lora()).train()
    model.base_model.model.model.layers[0].eval()
    before = state(model)
    try:
        with undisturbed(model):
            assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
            random.random(), np.random.rand(), torch.rand(1)
            if fails:
                raise RuntimeError("while looking")
    except RuntimeError:
        assert fails
    assert state(model) == before and torch.is_grad_enabled()


def test_rotary_embeddings_that_grow_with_the_longest_row():
    growing = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model, tokens = llama(max_position_embeddings=16, rope_parameters=growing).eval(), torch.arange(7, 67)[None]
    with torch.no_grad():
        expected = model(tokens[:, :20]).logits
        with undisturbed(model):
            model(tokens)
        assert torch.equal(model(tokens[:, :20]).logits, expected)


def with_peft():
    model = get_peft_model(llama(), lora(init_lora_weights=False))
    model.add_adapter("frozen", lora(init_lora_weights=False))
    return model


def with_transformers():
    model = llama()
    model.add_adapter(LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=False))
    return model


def within_another():
    """As sentence-transformers holds its models: what is trained is around the model with the adapters."""

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = with_transformers()

        def forward(self, tokens):
            return self.inner(tokens)

    return Outer()


@pytest.mark.parametrize("make", [with_peft, with_transformers, within_another, llama])
def test_without_adapters(make):
    torch.manual_seed(0)
    model = make().eval()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    tokens = torch.arange(7, 20)[None]
    with torch.no_grad():
        own = model(tokens).logits
        with without_adapters(model):
            assert torch.equal(model(tokens).logits, llama().eval()(tokens).logits)
        assert torch.equal(model(tokens).logits, own)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
