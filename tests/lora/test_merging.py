"""Merges against mergekit's merge of dense updates: of many adapters, of one, of absent and of degenerate ones."""

import math

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts, merge_tensors

from mashup_callback.lora import merge_factors
from mashup_callback.lowrank import LoraFactors
from mashup_callback.methods import MergeRule, merge_methods
from tests.lora.updates import IN, MODULE, OUT, adapter, best, dense, library, merged_delta, relative, updates


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "model_stock"])
@pytest.mark.parametrize("rank", [4, 64])
def test_merge_equals_mergekit_on_full_models(method, count, rank):
    inputs = library(count)
    base = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    weights = [(index + 1) / (count * (count + 1) / 2) for index in range(count)]
    models = {str(index): {MODULE: base + update} for index, update in enumerate(updates(inputs))}
    if method == "linear":
        full = merge_state_dicts(models, method, parameters={"weight": weights})
    else:
        parameters = {} if method == "model_stock" else {"weight": weights}
        full = merge_state_dicts({"base": {MODULE: base}, **models}, method, parameters=parameters, base="base")
    result = merge_factors(inputs, weights=weights, method=method, ranks=rank)
    assert relative(merged_delta(result), best(full[MODULE] - base, rank)) < 1e-4


@pytest.mark.parametrize(
    ("method", "count", "parameters"),
    [
        ("slerp", 2, {"t": 0.3}),
        ("nuslerp", 2, {}),
        ("nuslerp", 2, {"nuslerp_flatten": False}),
        ("multislerp", 4, {}),
        ("karcher", 4, {}),
        ("linear", 3, {"normalize": False}),
        ("dare_linear", 3, {}),
        ("ties", 3, {"density": 0.4}),
        ("ties", 2, {"density": [0.4, 0.8]}),
        ("breadcrumbs", 3, {"density": 0.6, "gamma": 0.02}),
        ("sce", 3, {"select_topk": 0.5}),
        ("ram", 3, {"epsilon": 1e-2}),
        ("ramplus_tl", 3, {}),
        ("nearswap", 2, {"t": 0.01}),
        ("arcee_fusion", 2, {}),
        ("model_stock", 3, {"filter_wise": True}),
    ],
)
@pytest.mark.parametrize("rank", [3, 40])
def test_merge_equals_mergekit_on_dense_updates(method, count, parameters, rank):
    inputs = library(count)
    weights = [0.5, 0.2, 0.7, 0.4][:count]
    given = dict(parameters)
    if MergeRule.create(method, parameters).takes_weights:
        given["weight"] = weights
    tensors = [update.float() for update in updates(inputs)]
    base = 0 if method in ("slerp", "nearswap", "arcee_fusion") else None
    needs_zeros = ["ties", "dare_linear", "breadcrumbs", "sce", "ram", "ramplus_tl", "model_stock"]
    if method in needs_zeros:
        tensors, base = [torch.zeros(OUT, IN), *tensors], 0
    expected = merge_tensors(tensors, method, parameters=given, base_index=base).double()
    result = merge_factors(inputs, weights=weights, method=method, parameters=parameters, ranks=rank)
    truncated = best(expected, rank)
    assert relative(merged_delta(result), truncated) < 1e-4
    lost = ((expected - truncated).norm() / expected.norm()).item() ** 2
    assert result.kept_energy[MODULE] == pytest.approx(1 - lost, abs=1e-5)


def test_large_dense_merges_keep_the_energy_of_a_full_svd():
    inputs = [adapter(seed, 8, out_features=700, in_features=640) for seed in range(3)]
    tensors = [torch.zeros(700, 640), *(update.float() for update in updates(inputs))]
    parameters = {"density": 0.3, "weight": [1 / 3] * 3}
    expected = merge_tensors(tensors, "ties", parameters=parameters, base_index=0)
    S = torch.linalg.svdvals(expected.double())
    result = merge_factors(inputs, weights=[1 / 3] * 3, method="ties", parameters={"density": 0.3})
    optimum = (S[:8].square().sum() / S.square().sum()).item()
    assert result.kept_energy[MODULE] == pytest.approx(optimum, rel=1e-4)
    lost = relative(merged_delta(result), expected.double()) ** 2
    assert result.kept_energy[MODULE] == pytest.approx(1 - lost, abs=1e-5)


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "della"])
def test_random_methods_use_their_own_seed_and_ignore_the_order_of_modules(method):
    names = ["a.q_proj", "b.v_proj"]
    inputs = [adapter(seed, modules=names) for seed in range(2)]
    flipped = [dict(reversed(one.items())) for one in inputs]
    options = {"weights": [0.5, 0.5], "method": method, "parameters": {"density": 0.5}, "ranks": 30}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = merge_factors(inputs, **options)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = merge_factors(flipped, **options), merge_factors(inputs, seed=7, **options)
    for name in names:
        torch.testing.assert_close(first.factors[name].delta(), second.factors[name].delta(), rtol=0, atol=0)
        assert relative(other.factors[name].delta(), first.factors[name].delta()) > 0.1
    same = [dict.fromkeys(names, one[names[0]]) for one in inputs]
    drawn = merge_factors(same, **options).factors
    assert relative(drawn[names[0]].delta(), drawn[names[1]].delta()) > 0.1


def test_dare_keeps_the_mean_of_the_updates():
    inputs = library(2)
    runs = [
        merge_factors(inputs, weights=[1, 1], method="dare_linear", parameters={"density": 0.7}, ranks=32, seed=seed)
        for seed in range(300)
    ]
    mean = sum(merged_delta(run) for run in runs) / len(runs)
    assert relative(mean, sum(updates(inputs))) < 0.1


def test_slerp_goes_half_way_unless_told_otherwise():
    inputs = library(2)
    half = merge_factors(inputs, weights=[0.5, 0.5], method="slerp")
    assert half.parameters == {"t": 0.5}
    end = merge_factors(inputs, weights=[0.5, 0.5], method="slerp", parameters={"t": 1.0})
    assert relative(merged_delta(end), updates(inputs)[1]) < 1e-5


@pytest.mark.parametrize("method", merge_methods())
@pytest.mark.parametrize("scaling", [0.25, 2.0, 16 / math.sqrt(4), -1.0])
def test_one_adapter_is_its_own_merge(method, scaling):
    # ram drops what is below its threshold, all others keep every entry.
    parameters = {"nearswap": {"t": 0.01}, "ram": {"epsilon": 0.0}, "ramplus_tl": {"epsilon": 1e-30}}.get(method)
    single = adapter(0, scaling=scaling)
    result = merge_factors([single], weights=[1.0], method=method, parameters=parameters, ranks=16)
    assert relative(merged_delta(result), dense(single[MODULE])) < 1e-5
    assert result.factors[MODULE].rank == 4 or method in ("ram", "ramplus_tl", "sce", "ties")
    assert result.kept_energy[MODULE] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("zero", ["absent", "zero B"])
def test_linear_counts_an_adapter_without_the_module(zero):
    inputs = [adapter(0), adapter(1), adapter(2)]
    if zero == "absent":
        inputs[1] = adapter(1, modules=("other",))
    else:
        inputs[1] = {MODULE: LoraFactors(inputs[1][MODULE].A, torch.zeros(OUT, 4), 2.0)}
    result = merge_factors(inputs, weights=[1 / 3] * 3, ranks=8)
    expected = (dense(inputs[0][MODULE]) + dense(inputs[2][MODULE])) / 3
    assert relative(merged_delta(result), expected) < 1e-5


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_direction_means_keep_the_direction_of_a_lone_update_and_average_the_norms(method):
    inputs = [adapter(0), adapter(1, modules=("other",)), adapter(2, modules=("other",))]
    result = merge_factors(inputs, weights=[1 / 3] * 3, method=method)
    assert relative(merged_delta(result), dense(inputs[0][MODULE]) / 3) < 1e-4


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "arcee_fusion"])
def test_a_lone_update_is_copied_where_mergekit_copies_lone_tensors(method):
    inputs = [adapter(0), adapter(1, modules=("other",))]
    result = merge_factors(inputs, weights=[0.5, 0.5], method=method)
    assert relative(merged_delta(result), dense(inputs[0][MODULE])) < 1e-5


@pytest.mark.parametrize("space", ["delta", "core", "factors"])
@pytest.mark.parametrize("method", [m for m in merge_methods() if m not in ("passthrough", "nearswap")])
def test_zero_updates_merge_to_zero(method, space):
    zero = {MODULE: LoraFactors(torch.randn(4, IN), torch.zeros(OUT, 4), 1.0)}
    result = merge_factors([zero, zero], weights=[0.5, 0.5], method=method, space=space, ranks=4)
    assert merged_delta(result).norm() == 0
    assert result.factors[MODULE].rank == 0
    assert result.kept_energy == {MODULE: 1.0} and result.total_kept_energy == 1.0


def test_updates_that_cancel_merge_to_zero():
    one = adapter(0)
    other = {MODULE: LoraFactors(one[MODULE].A, one[MODULE].B, -one[MODULE].scaling)}
    result = merge_factors([one, other], weights=[0.5, 0.5])
    assert result.factors[MODULE].rank == 0 and result.kept_energy[MODULE] == 1.0


@pytest.mark.parametrize("method", ["linear", "karcher", "ties"])
def test_stacks_wider_than_the_layer_and_of_deficient_rank(method):
    shared = adapter(0, rank=6, out_features=9, in_features=7)
    inputs = [shared, dict(shared), *(adapter(seed, 6, 1.0, 9, 7) for seed in (1, 2))]
    tensors = [torch.zeros(9, 7).double(), *updates(inputs)]
    if method == "ties":
        expected = merge_tensors(tensors, method, parameters={"weight": [0.25] * 4}, base_index=0)
    else:
        expected = merge_tensors(tensors[1:], method, parameters={} if method == "karcher" else {"weight": [0.25] * 4})
    result = merge_factors(inputs, weights=[0.25] * 4, method=method, ranks=32)
    assert relative(merged_delta(result), expected) < 1e-4
    assert result.factors[MODULE].rank <= 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_merged_in_full_precision(dtype):
    inputs = [adapter(seed, dtype=dtype) for seed in range(3)]
    result = merge_factors(inputs, weights=[1 / 3] * 3, ranks=12)
    assert relative(merged_delta(result), sum(updates(inputs)) / 3) < 1e-5
    assert result.factors[MODULE].A.dtype == torch.float32
