"""Whole parameters of a model on one process: read, written, named."""

import pytest
import torch
from peft import get_peft_model

from mashup_callback.config import MashupConfig
from mashup_callback.lora import LoraUpdate, fit
from mashup_callback.model import clean_name, is_sharded, read_parameters, write_parameters
from mashup_callback.trainee import find_trainee
from tests.tiny import llama, lora


NAME = "model.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{NAME}",
        f"_fsdp_wrapped_module.base_model.model.model.layers.0._fsdp_wrapped_module{NAME[len('model.layers.0') :]}",
        f"_orig_mod.base_model.model.{NAME}",
        f"base_model.model.{NAME.replace('self_attn', '_checkpoint_wrapped_module.self_attn')}",
    ],
)
def test_names_without_what_wrappers_add(name):
    assert clean_name(name) == NAME


def test_what_is_written_is_read_and_nothing_else_changes():
    model = get_peft_model(llama(), lora())
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    value = torch.randn(read_parameters(model, [NAME])[NAME].shape)
    write_parameters(model, {NAME: value})
    assert torch.equal(read_parameters(model, [NAME])[NAME], value)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1]) == (clean_name(name) != NAME)
    with pytest.raises(KeyError):
        read_parameters(model, ["model.nothing"])


def test_what_is_read_is_a_copy():
    model = get_peft_model(llama(), lora())
    values = read_parameters(model, [NAME])
    values[NAME].fill_(7)
    assert not (read_parameters(model, [NAME])[NAME] == 7).any()
    assert not is_sharded(model)


def random_merge(trainee):
    """What the trainee's parameters would hold of some merge."""
    fitted = fit({}, trainee.adapter)
    for factor in fitted.values():
        factor.B.normal_()
    return LoraUpdate(fitted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_swap_in_half_precision_holds_the_rounded_merge(dtype):
    model = get_peft_model(llama(), lora()).to(dtype)
    trainee = find_trainee(model)
    name = "model.layers.0.self_attn.q_proj"
    fitted = fit({}, trainee.adapter)
    exact = torch.randn(32, 4)
    fitted[name].B.copy_(exact)
    trainee.write(LoraUpdate(fitted))
    assert torch.equal(find_trainee(model, MashupConfig(overwrite=True)).adapter.targets[name].B, exact.to(dtype))


def test_what_was_written_is_undone():
    model = get_peft_model(llama(), lora())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainee = find_trainee(model)
    trainee.write(random_merge(trainee))
    assert not all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    trainee.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_failed_write_gives_back_what_was_there(monkeypatch):
    model = get_peft_model(llama(), lora())
    trainee = find_trainee(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    monkeypatch.setattr("mashup_callback.swap.gather", lambda checksum: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainee.write(random_merge(trainee))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_processes_that_read_something_else_give_back_what_was_there(monkeypatch):
    model = get_peft_model(llama(), lora())
    trainee = find_trainee(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    monkeypatch.setattr("mashup_callback.swap.gather", lambda checksum: [checksum, "another"])
    with pytest.raises(RuntimeError, match=r"written on the processes \[1\] differ"):
        trainee.write(random_merge(trainee))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_values_of_another_shape_are_refused():
    model, other = get_peft_model(llama(), lora()), get_peft_model(llama(), lora(r=2))
    with pytest.raises(ValueError, match=r"shape \(2, 32\) for .*, the trainee \(4, 32\)"):
        find_trainee(model).write(LoraUpdate(fit({}, find_trainee(other).adapter)))


def test_write_that_is_lost_raises(monkeypatch):
    model = get_peft_model(llama(), lora())
    trainee = find_trainee(model)
    fitted = fit({}, trainee.adapter)
    next(iter(fitted.values())).B.normal_()
    monkeypatch.setattr("mashup_callback.swap.write_parameters", lambda *args: None)
    with pytest.raises(RuntimeError, match="1 of 28 parameters do not hold the merge"):
        trainee.write(LoraUpdate(fitted))


def test_what_the_trainee_holds_for_a_while():
    model = get_peft_model(llama(), lora())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainee = find_trainee(model)
    merge, name = random_merge(trainee), "model.layers.0.self_attn.q_proj"
    with pytest.raises(KeyError), trainee.written(merge):
        held = find_trainee(model, MashupConfig(overwrite=True)).adapter.targets[name]
        torch.testing.assert_close(held.scaling * held.B @ held.A, merge.factors[name].delta())
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
