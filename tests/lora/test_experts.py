"""Adapters of experts, of whole parameters or layer by layer, against peft's own forward with them."""

import re

import pytest
import torch
from safetensors.torch import save_file

from mashup_callback.errors import AdapterError
from mashup_callback.lora import merge_adapters
from tests.lora.variants import EXPERTS, LORA, MODELS, admitted, by_peft, check, close, edit, output, save_random


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
