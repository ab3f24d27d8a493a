"""The spaces of factors and of cores; ranks, kept energy and balance of what is merged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors

from mashup_callback.lora import merge_factors
from mashup_callback.lowrank import LoraFactors
from tests.lora.updates import MODULE, adapter, best, dense, library, merged_delta, relative, updates


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
