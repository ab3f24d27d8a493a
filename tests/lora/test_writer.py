"""Adapters that are written: what peft computes with them, and what becomes of what was there."""

import math
import os
from functools import partial

import pytest
import torch
from peft import PeftModel

from mashup_callback.formats import adapter_hash, load_factors, read_adapter
from mashup_callback.lora import save_adapter, writer
from mashup_callback.lowrank import LoraFactors
from tests.formats.conftest import LAYERS, fitted
from tests.hostile.cases.case import Q
from tests.tiny import llama


def random_factors(*ranks, scalings=(1.0,) * 4, seed=0):
    """Those of the first layers."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    layers = zip(LAYERS.items(), ranks, scalings, strict=False)
    return {name: LoraFactors(draw(r, wide), draw(high, r), scaling) for (name, (wide, high)), r, scaling in layers}


@pytest.mark.parametrize("ranks", [[4, 4, 4, 4], [2, 4, 4, 3], [1, 2, 3, 4]])
@pytest.mark.parametrize("scalings", [[1.0] * 4, [0.5, 2.0, 1 / 3, 0.5]])
def test_a_saved_adapter_gives_the_same_logits_in_peft(tmp_path, ranks, scalings):
    factors = random_factors(*ranks, scalings=scalings)
    path = save_adapter(tmp_path / "new" / "adapter", factors, base_model="org/base", task_type="CAUSAL_LM")
    ids = torch.arange(12).reshape(2, 6)
    merged = llama()
    with torch.no_grad():
        for name, factor in factors.items():
            merged.get_submodule(name).weight += factor.delta()
        expected, found = merged(ids).logits, PeftModel.from_pretrained(llama(), path)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    loaded = load_factors(fitted(path, base_model="org/base"))
    for name, factor in factors.items():
        torch.testing.assert_close(loaded[name].A, factor.A, rtol=0, atol=0)
        assert math.isclose(loaded[name].scaling, factor.scaling, rel_tol=1e-12)


def test_a_name_that_ends_like_another_keeps_its_own_rank_and_scaling(tmp_path):
    ranks = {"q_proj": 2, "layers.q_proj": 3, "decoder.layers.q_proj": 3, "x.q_proj": 3}
    factors = {n: LoraFactors(torch.ones(r, 4), torch.ones(4, r), 2.0 if r == 2 else 1.0) for n, r in ranks.items()}
    adapter = read_adapter(save_adapter(tmp_path / "x", factors, base_model=None))
    assert {name: (shape.rank, shape.scaling) for name, shape in adapter.modules.items()} == {
        name: (factor.rank, factor.scaling) for name, factor in factors.items()
    }


def test_views_of_one_tensor_and_a_dtype_are_saved(tmp_path):
    block = torch.randn(64, 32)
    factors = {Q: LoraFactors(block[:4], block[:32].T[:, :4], 1.0)}
    adapter = read_adapter(save_adapter(tmp_path / "x", factors, base_model=None, dtype=torch.bfloat16))
    assert adapter.dtype == "bfloat16"
    assert adapter.config.base_model is None
    torch.testing.assert_close(load_factors(adapter)[Q].A, block[:4].bfloat16().float(), rtol=0, atol=0)


def test_saving_replaces_an_adapter_and_leaves_nothing_else(tmp_path):
    for seed in (0, 1):
        factors = random_factors(4, seed=seed)
        save_adapter(tmp_path / "x", factors, base_model=None)
    torch.testing.assert_close(load_factors(read_adapter(tmp_path / "x"))[Q].A, factors[Q].A)
    assert os.listdir(tmp_path) == ["x"]
    assert sorted(os.listdir(tmp_path / "x")) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("failing", ["write_adapter", "rename"])
def test_a_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch, failing):
    save_adapter(tmp_path / "x", random_factors(4), base_model=None)
    before = adapter_hash(read_adapter(tmp_path / "x"))

    def fail(source, *args, **settings):
        if failing == "write_adapter" or (".x." in str(source) and not str(source).endswith(".old")):
            raise OSError(28, "No space left on device")
        return rename(source, *args)

    rename = os.rename
    monkeypatch.setattr(*((writer, "write_adapter") if failing == "write_adapter" else (os, "rename")), fail)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tmp_path / "x", random_factors(2), base_model=None)
    assert adapter_hash(read_adapter(tmp_path / "x")) == before
    assert os.listdir(tmp_path) == ["x"]


def test_saving_never_removes_other_files(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    factors = random_factors(4)
    with pytest.raises(ValueError, match="holds checkpoint-1 and would be replaced"):
        save_adapter(tmp_path, factors, base_model=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_adapter(tmp_path / "file", factors, base_model=None)
    with pytest.raises(ValueError, match="no factors"):
        save_adapter(tmp_path / "x", {}, base_model=None)
