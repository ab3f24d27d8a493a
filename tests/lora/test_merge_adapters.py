"""Adapters on disk, read, merged and saved; what does not fit is refused."""

import math

import pytest

from mashup_callback.formats import load_factors, read_adapter
from mashup_callback.lora import merge_adapters, merge_factors, save_adapter
from mashup_callback.lowrank import LoraFactors
from tests.lora.updates import IN, MODULE, adapter, dense, library, relative
from tests.tiny import llama, save_random_adapter


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ([], {"weights": []}, "Nothing to merge"),
        (library(2), {"weights": [1.0]}, "1 weights for 2 adapters"),
        (library(2), {"weights": [1.0, 1.0], "ranks": 0}, "at least 1, found 0"),
        (library(3), {"weights": [1.0] * 3, "method": "slerp"}, "exactly 2 adapters, found 3"),
        ([adapter(0), adapter(1, in_features=8)], {"weights": [1.0, 1.0]}, "same base model"),
        (library(2), {"weights": [0.5, 0.5], "space": "factors"}, r"needs one rank, found \[2, 4\].*delta"),
    ],
)
def test_merge_factors_refuses_what_does_not_fit(inputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        merge_factors(inputs, **arguments)


def test_a_module_that_mergekit_refuses_is_named():
    one = adapter(0)
    opposite = {MODULE: LoraFactors(one[MODULE].A, -one[MODULE].B, one[MODULE].scaling)}
    with pytest.raises(ValueError, match=f"'{MODULE}'.*weighted sum of the input tensors is zero"):
        inputs = [one, opposite, adapter(1, modules=("other",))]
        merge_factors(inputs, weights=[1 / 3] * 3, method="multislerp", parameters={"eps": 1e-6})


def test_merge_adapters_reads_merges_and_saves_without_a_base_model(tmp_path):
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    inputs = [adapter(0, 4, modules=names), adapter(1, 2, modules=names[:1])]
    base = {"base_model": "org/base", "revision": "a" * 40}
    paths = [save_adapter(tmp_path / str(index), one, **base) for index, one in enumerate(inputs)]
    merged = merge_adapters(paths, rank=8, output_dir=tmp_path / "merged")
    expected = (dense(inputs[0][names[0]]) + dense(inputs[1][names[0]])) / 2
    assert relative(dense(merged.factors[names[0]]), expected) < 1e-5
    assert merged.weights == (0.5, 0.5) and merged.path == tmp_path / "merged"
    read = read_adapter(merged.path)
    assert (read.config.base_model, read.config.revision) == ("org/base", "a" * 40)
    saved = load_factors(read)
    for name in names:
        assert relative(dense(saved[name]), dense(merged.factors[name])) < 1e-5
        assert saved[name].rank == 8
        unfilled = saved[name].A[merged.factors[name].rank :]
        # A zero row of A together with a zero column of B would never learn.
        assert (unfilled.norm(dim=1) > 0).all() and unfilled.abs().max() <= 1 / math.sqrt(IN)


def test_merge_adapters_refuses_weights_that_need_losses(tmp_path):
    with pytest.raises(ValueError, match="needs the losses"):
        merge_adapters([tmp_path], weights="softmax")


def test_merge_adapters_warns_of_different_base_models(tmp_path, caplog):
    for base in ("a", "b"):
        save_adapter(tmp_path / base, adapter(0), base_model=f"org/{base}")
    merge_adapters([tmp_path / "a", tmp_path / "b"])
    assert "different base models" in caplog.text


def test_merge_adapters_names_the_one_that_does_not_fit(tmp_path):
    good, broken, wide = (
        save_random_adapter(tmp_path / name, 0, base=llama(hidden_size=size))
        for name, size in (("good", 32), ("broken", 32), ("wide", 64))
    )
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"/broken cannot be merged: the weights file is truncated"):
        merge_adapters([good, broken])
    with pytest.raises(ValueError, match=r"/wide does not fit .*/good: its .* maps \d+ features to .*expected \d+"):
        merge_adapters([good, wide])
