import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts, merge_tensors

from mashup_callback.formats import load_factors, read_adapter
from mashup_callback.lora import merge_adapters, merge_factors, save_adapter
from mashup_callback.lowrank import LoraFactors
from mashup_callback.methods import MergeRule, check_merge, merge_methods
from tests.tiny import llama, save_random_adapter


OUT, IN = 40, 32
MODULE = "model.layers.0.mlp.up_proj"


def adapter(seed, rank=4, scaling=2.0, out_features=OUT, in_features=IN, modules=(MODULE,), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            (torch.randn(rank, in_features, generator=generator) * 0.3).to(dtype),
            (torch.randn(out_features, rank, generator=generator) * 0.05).to(dtype),
            scaling,
        )
        for name in modules
    }


def library(count, mixed=True):
    """Adapters of mixed ranks and scalings, one of them negative."""
    ranks, scalings = (4, 2, 7, 3), (2.0, 0.5, 1.0, -1.5, 8.0)
    return [
        adapter(seed, ranks[seed % 4] if mixed else 4, scalings[seed % 5] if mixed else 2.0) for seed in range(count)
    ]


def dense(factors):
    return factors.scaling * torch.einsum("or,ri->oi", factors.B.double(), factors.A.double())


def updates(inputs):
    return [dense(adapter[MODULE]) for adapter in inputs]


def best(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def relative(result, expected):
    return ((result - expected).norm() / expected.norm()).item()


def merged_delta(result):
    return dense(result.factors[MODULE])


# Equality with mergekit's merge of full models.


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


# Random methods.


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


# One adapter, absent modules, degenerate inputs.


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


# The other spaces.


@pytest.mark.parametrize("absent", [False, True])
def test_factors_space_averages_a_and_b(absent):
    inputs = library(3, mixed=False)
    mean_a = sum(one[MODULE].A for one in inputs) / 3
    mean_b = sum(one[MODULE].B for one in inputs) / 3
    if absent:
        inputs[2] = adapter(2, modules=("other",))
        mean_a = (inputs[0][MODULE].A + inputs[1][MODULE].A) / 2
        mean_b = (inputs[0][MODULE].B + inputs[1][MODULE].B) / 3
    merged = merge_factors(inputs, weights=[1 / 3] * 3, space="factors").factors[MODULE]
    torch.testing.assert_close(merged.A / merged.A.norm(), mean_a / mean_a.norm())
    torch.testing.assert_close(merged.B / merged.B.norm(), mean_b / mean_b.norm())
    torch.testing.assert_close(merged.delta(), 2.0 * mean_b @ mean_a)


def test_factors_space_truncates_to_the_wanted_rank():
    inputs = library(3, mixed=False)
    whole = merge_factors(inputs, weights=[1 / 3] * 3, space="factors")
    cut = merge_factors(inputs, weights=[1 / 3] * 3, space="factors", ranks=2)
    assert relative(merged_delta(cut), best(merged_delta(whole), 2)) < 1e-5
    assert cut.kept_energy[MODULE] < 1


def test_factors_space_needs_one_rank():
    with pytest.raises(ValueError, match=r"needs one rank, found \[2, 4\].*delta"):
        merge_factors(library(2), weights=[0.5, 0.5], space="factors")


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "sce"])
def test_core_space_merges_in_the_singular_basis_shared_by_the_adapters(method):
    inputs = library(3)
    weights, parameters = [0.5, 0.2, 0.3], {} if method == "sce" else {"density": 0.5}
    left = torch.linalg.svd(torch.cat([one[MODULE].B.double() * one[MODULE].scaling for one in inputs], dim=1))[0]
    right = torch.linalg.svd(torch.cat([one[MODULE].A.double() for one in inputs]))[2].T
    left, right = left[:, :13], right[:, :13]
    cores = [torch.zeros(13, 13).double(), *(left.T @ update @ right for update in updates(inputs))]
    given = parameters if method == "sce" else parameters | {"weight": weights}
    core = merge_tensors(cores, method, parameters=given, base_index=0)
    options = {"method": method, "parameters": parameters, "space": "core", "ranks": 13}
    result = merge_factors(inputs, weights=weights, **options)
    assert relative(merged_delta(result), left @ core @ right.T) < 1e-5
    flipped = merge_factors(inputs[::-1], weights=weights[::-1], **options)
    assert relative(merged_delta(flipped), merged_delta(result)) < 1e-5


# Ranks, energy and balance.


def test_ranks_are_the_wanted_ones_and_never_beyond_the_merge():
    names = ("a", "b", "c")
    inputs = [adapter(seed, rank, modules=names) for seed, rank in enumerate((3, 5))]
    merged = merge_factors(inputs, weights=[0.5, 0.5], ranks={"a": 2, "b": 16})
    assert {name: merged.factors[name].rank for name in names} == {"a": 2, "b": 8, "c": 5}
    assert merged.rank == 8
    assert merged.kept_energy["b"] == pytest.approx(1.0) and merged.kept_energy["a"] < 1


def test_total_kept_energy_weighs_modules_by_their_energy():
    inputs = [adapter(0, 4, 1.0, modules=("small",)) | adapter(1, 4, 30.0, modules=("large",))]
    exact = {name: dense(inputs[0][name]) for name in inputs[0]}
    merged = merge_factors(inputs, weights=[1.0], ranks={"small": 1, "large": 3})
    lost = sum((dense(merged.factors[name]) - exact[name]).norm() ** 2 for name in exact)
    total = sum(update.norm() ** 2 for update in exact.values())
    assert merged.total_kept_energy == pytest.approx((1 - lost / total).item(), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    ranks=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    wanted=st.integers(1, 10),
    shape=st.tuples(st.integers(2, 15), st.integers(2, 15)),
    factor=st.floats(0.01, 100),
    data=st.data(),
)
def test_properties_of_the_linear_merge(seeds, ranks, wanted, shape, factor, data):
    inputs = [adapter(seed, rank, 1.0 + seed, *shape) for seed, rank in zip(seeds, ranks, strict=False)]
    weights = data.draw(st.lists(st.floats(0.1, 1), min_size=len(inputs), max_size=len(inputs)))
    result = merge_factors(inputs, weights=weights, ranks=wanted)
    merged = result.factors[MODULE]
    assert merged.rank <= min(wanted, *shape, sum(one[MODULE].rank for one in inputs))
    assert 0 <= result.kept_energy[MODULE] <= 1
    # Directions of the update, whose singular values are shared evenly.
    gram = merged.A.double() @ merged.A.double().T
    assert torch.allclose(gram, merged.B.double().T @ merged.B.double(), atol=1e-4 * gram.max().item())
    assert torch.allclose(gram, gram.diag().diag(), atol=1e-4 * gram.max().item())
    exact = sum(w * u for w, u in zip(weights, updates(inputs), strict=True)) / sum(weights)
    # Eckart-Young: the error is compared, because the best approximation is not unique when singular values tie.
    error = (merged_delta(result) - exact).norm() ** 2 / exact.norm() ** 2
    assert 1 - result.kept_energy[MODULE] == pytest.approx(error.item(), abs=1e-5)
    assert error == pytest.approx((torch.linalg.svdvals(exact)[wanted:].norm() / exact.norm()).item() ** 2, abs=1e-5)

    order = data.draw(st.permutations(range(len(inputs))))
    whole = merge_factors(inputs, weights=weights, ranks=99)
    permuted = merge_factors([inputs[i] for i in order], weights=[weights[i] for i in order], ranks=99)
    assert relative(merged_delta(permuted), merged_delta(whole)) < 1e-4
    scaled = [{MODULE: LoraFactors(one[MODULE].A, one[MODULE].B, one[MODULE].scaling * factor)} for one in inputs]
    assert relative(merged_delta(merge_factors(scaled, weights=weights, ranks=99)), factor * exact) < 1e-4


# Settings and errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "linaer"}, r"did you mean 'linear'\?.*slerp"),
        ({"method": "linear", "space": "dense"}, "Valid: delta, core, factors"),
        ({"method": "ties", "parameters": {"desnity": 0.5}}, r"did you mean 'density'\?.*lambda"),
        ({"method": "karcher", "parameters": {"density": 0.5}}, "It takes: max_iter, tol"),
        ({"method": "nearswap", "top_k": 2}, "nearswap needs t"),
        ({"method": "slerp", "top_k": 3}, "slerp merges exactly 2 adapters, found 3"),
        ({"method": "slerp", "top_k": "auto"}, "exactly 2 adapters"),
        ({"method": "passthrough", "top_k": 2}, "exactly 1 adapters"),
        ({"method": "model_stock", "top_k": 1}, "at least 2"),
        ({"method": "linear", "weights": [1, 2], "top_k": 3}, "2 weights for top_k=3"),
        ({"method": "linear", "weights": [1, 2], "top_k": "auto"}, "2 weights for top_k=auto"),
        ({"method": "linear", "weights": [1, -1]}, "divides by the sum of the weights"),
        ({"method": "nuslerp", "weights": [1, -1]}, "divides by the sum of the weights"),
        ({"method": "task_arithmetic", "weights": [0, 0]}, "not all zero"),
        ({"method": "linear", "weights": [1, math.nan]}, "finite"),
        ({"method": "linear", "weights": "best"}, '"equal", "softmax" or one number'),
        ({"method": "karcher", "weights": [1, 2]}, "karcher has no weights"),
        ({"method": "linear", "parameters": {"weight": [1, 2]}}, "setting `weights`"),
        ({"method": "ties", "parameters": {"density": "half"}}, "expected a number"),
        ({"method": "ties", "parameters": {"density": math.nan}}, "finite"),
        ({"method": "ties", "parameters": {"density": [0.5, 0.5]}, "top_k": 3}, "density expects 3 values; got 2"),
        ({"method": "della", "parameters": {"density": 0.95}}, "Epsilon must be chosen"),
        ({"method": "ties", "parameters": {"density": 2}}, r"'density'\] of ties is 2, expected a number above 0"),
        ({"method": "ties", "parameters": {"density": [0.5, 0]}}, r"'density'\] of ties is 0, expected a number"),
        ({"method": "slerp", "parameters": {"t": 1.5}}, r"'t'\] of slerp is 1\.5, expected a number from 0 to 1"),
        ({"method": "breadcrumbs", "parameters": {"gamma": -1}}, r"'gamma'\] of breadcrumbs is -1"),
        ({"method": "karcher", "parameters": {"max_iter": 0}}, "a whole number of at least 1"),
        ({"method": "auto", "parameters": {"density": 0.5}}, 'merge_method="auto" takes no merge_parameters'),
    ],
)
def test_check_merge_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_merge(
            arguments["method"],
            arguments.get("parameters", {}),
            arguments.get("weights", "equal"),
            arguments.get("space", "delta"),
            arguments.get("top_k"),
        )


@pytest.mark.parametrize(
    ("method", "parameters", "weights", "top_k"),
    [
        ("auto", {}, "equal", 3),
        ("linear", {}, "softmax", "auto"),
        ("slerp", {}, "equal", 2),
        ("task_arithmetic", {"lambda": 0.5}, [1, -1], 2),
        ("ties", {"density": [0.5, 0.2, 1.0]}, [1, 2, 3], 3),
        ("model_stock", {}, "equal", "auto"),
        ("karcher", {}, [1, 1], 2),
    ],
)
def test_check_merge_accepts_what_mergekit_accepts(method, parameters, weights, top_k):
    check_merge(method, parameters, weights, "delta", top_k)


def test_slerp_goes_half_way_unless_told_otherwise():
    inputs = library(2)
    half = merge_factors(inputs, weights=[0.5, 0.5], method="slerp")
    assert half.parameters == {"t": 0.5}
    end = merge_factors(inputs, weights=[0.5, 0.5], method="slerp", parameters={"t": 1.0})
    assert relative(merged_delta(end), updates(inputs)[1]) < 1e-5


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ([], {"weights": []}, "Nothing to merge"),
        (library(2), {"weights": [1.0]}, "1 weights for 2 adapters"),
        (library(2), {"weights": [1.0, 1.0], "ranks": 0}, "at least 1, found 0"),
        (library(3), {"weights": [1.0] * 3, "method": "slerp"}, "exactly 2 adapters, found 3"),
        ([adapter(0), adapter(1, in_features=8)], {"weights": [1.0, 1.0]}, "same base model"),
    ],
)
def test_merge_factors_refuses_what_does_not_fit(inputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        merge_factors(inputs, **arguments)


def test_a_module_that_mergekit_refuses_is_named():
    one = adapter(0)
    opposite = {MODULE: LoraFactors(one[MODULE].A, -one[MODULE].B, one[MODULE].scaling)}
    with pytest.raises(ValueError, match=f"'{MODULE}'.*weighted sum of the input tensors is zero"):
        merge_factors(
            [one, opposite, adapter(1, modules=("other",))],
            weights=[1 / 3] * 3,
            method="multislerp",
            parameters={"eps": 1e-6},
        )


# From disk.


def save(directory, factors):
    return save_adapter(directory, factors, base_model="org/base", revision="a" * 40)


def test_merge_adapters_reads_merges_and_saves_without_a_base_model(tmp_path):
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    inputs = [adapter(0, 4, modules=names), adapter(1, 2, modules=names[:1])]
    paths = [save(tmp_path / str(index), one) for index, one in enumerate(inputs)]
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
