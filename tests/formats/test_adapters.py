"""Adapters that peft wrote, read as peft reads them."""

import math
import os

import pytest
import torch
from peft import get_peft_model

from mashup_callback.errors import AdapterError
from mashup_callback.formats import adapter_hash, header_end, load_factors, parse_adapter, read_adapter
from tests.formats.conftest import SHAPES, fitted
from tests.hostile.cases.case import QA, Q
from tests.hostile.damage import fields, filled, tensors
from tests.tiny import LINEAR, llama, lora, save_random_adapter


def train_in_peft(directory, dtype=torch.float32, **settings):
    """Saves a random adapter with peft; returns peft's own delta weights, the oracle."""
    torch.manual_seed(1)
    model = get_peft_model(llama(), lora(**{"target_modules": list(SHAPES)} | settings))
    deltas = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            torch.nn.init.normal_(layer.lora_B["default"].weight)
            for factor in (layer.lora_A, layer.lora_B):
                factor["default"].weight.data = factor["default"].weight.data.to(dtype)
            deltas[name] = layer.get_delta_weight("default").detach().float().clone()
    model.save_pretrained(directory)
    return deltas


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"self_attn.v_proj": 32}},
        {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 3}, "alpha_pattern": {Q: 5}, "use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"target_modules": r".*\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
)
def test_factors_are_what_peft_computes(tmp_path, settings):
    deltas = train_in_peft(tmp_path, **settings)
    adapter = fitted(tmp_path)
    factors = load_factors(adapter)
    assert factors.keys() == deltas.keys() == adapter.modules.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(factors[name].delta(), delta)
        assert adapter.modules[name].rank == factors[name].rank
    assert adapter.rank == 4
    assert adapter.warnings == ()


def test_bfloat16_is_read_and_converted(tmp_path):
    deltas = train_in_peft(tmp_path, dtype=torch.bfloat16)
    adapter = read_adapter(tmp_path)
    assert adapter.dtype == "bfloat16"
    factors = load_factors(adapter)[Q]
    assert factors.A.dtype == torch.float32
    torch.testing.assert_close(factors.delta(), deltas[Q], rtol=2e-2, atol=2e-2)
    assert load_factors(adapter, dtype=torch.float64)[Q].B.dtype == torch.float64


def test_an_adapter_that_learnt_nothing_is_sound(sound):
    tensors(lambda found: [found[key].zero_() for key in found if "lora_B" in key])(sound)
    assert all(factor.norm() == 0 for factor in load_factors(read_adapter(sound)).values())


def test_an_adapter_knows_where_it_is(sound):
    assert read_adapter(str(sound)).path == sound
    config, weights = ((sound / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
    head = weights[: header_end(weights)]
    remote = parse_adapter(config, head, len(weights))
    here = read_adapter(sound)
    assert remote.path is None
    assert all(getattr(remote, name) == getattr(here, name) for name in ("config", "modules", "dtype", "warnings"))
    for use in (load_factors, adapter_hash):
        with pytest.raises(AdapterError, match="not been downloaded"):
            use(remote)
    with pytest.raises(AdapterError, match="truncated"):
        parse_adapter(config, head, len(weights) - 1)


def test_the_update_as_a_whole_is_bounded(sound):
    fields(lora_alpha=1e5)(sound)
    tensors(lambda found: [tensor.fill_(1e4) for tensor in found.values()])(sound)
    factors = load_factors(read_adapter(sound))
    assert all(math.isfinite(factor.delta().abs().max()) for factor in factors.values())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files_directories_and_pipes_are_refused(sound, name):
    (sound / name).unlink()
    with pytest.raises(AdapterError, match=f"{name} cannot be read"):
        read_adapter(sound)
    (sound / name).mkdir()
    with pytest.raises(AdapterError, match=f"{name} is not a regular file"):
        read_adapter(sound)
    (sound / name).rmdir()
    os.mkfifo(sound / name)
    with pytest.raises(AdapterError, match=f"{name} is not a regular file"):
        read_adapter(sound)


@pytest.mark.parametrize("change", ["grow", "truncate", "rewrite", "remove"])
def test_a_file_that_changed_since_it_was_read_is_refused(sound, change):
    adapter = read_adapter(sound)
    path = sound / "adapter_model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if change != "remove":
        path.write_bytes({"grow": data + b"0", "truncate": data[:-1], "rewrite": data}[change])
        os.utime(path, ns=(adapter.stamp.modified + 1, adapter.stamp.modified + 1))
    for use in (load_factors, adapter_hash):
        with pytest.raises(AdapterError, match=r"changed while it was in use|cannot be read"):
            use(adapter)


def test_the_hash_depends_on_what_is_computed_only(sound):
    before = adapter_hash(read_adapter(sound))
    fields(base_model_name_or_path="other", peft_version="0.1", lora_dropout=0.5)(sound)
    assert adapter_hash(read_adapter(sound)) == before
    fields(lora_alpha=9)(sound)
    changed = adapter_hash(read_adapter(sound))
    assert changed != before
    filled(QA, 0.5)(sound)
    assert adapter_hash(read_adapter(sound)) not in (before, changed)


@pytest.mark.parametrize(
    ("extra", "dropped", "warning"),
    [
        (["nothing"], [], "`target_modules` contradicts the weights: nothing has no tensors"),
        ([], ["q_proj"], "such as model.layers.0.self_attn.q_proj, that it does not name"),
    ],
)
def test_target_modules_that_contradict_the_tensors_are_a_warning(tmp_path, extra, dropped, warning):
    adapter = save_random_adapter(tmp_path / "adapter", 0)
    assert read_adapter(adapter).warnings == ()
    fields(target_modules=[name for name in LINEAR + extra if name not in dropped])(adapter)
    [found] = read_adapter(adapter).warnings
    assert warning in found


def test_regular_expressions_are_not_compared_with_the_tensors(sound):
    fields(target_modules="all-linear")(sound)
    assert read_adapter(sound).warnings == ()
