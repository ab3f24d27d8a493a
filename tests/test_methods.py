"""What is said of mergekit's methods is measured, mergekit reads their configuration, and settings are checked."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from mergekit.config import MergeConfiguration

from mashup_callback.methods import COMMUTING, MergeRule, check_merge, merge_methods, mergekit_config


# Methods with absolute thresholds seem to commute at any single magnitude.
SCALES = (1e-6, 1e-3, 1.0, 1e3)
PARAMETERS = {
    "karcher": [{}, {"max_iter": 3, "tol": 1e-3}],
    "linear": [{}, {"normalize": False}],
    "multislerp": [{}, {"normalize_weights": False}],
    "nearswap": [{"t": 0.01}],
    "passthrough": [{}, {"scale": 0.5}],
    "slerp": [{}, {"t": 0.2}],
    "task_arithmetic": [{}, {"lambda": 0.7, "normalize": True}],
    "ties": [{}, {"normalize": False}],
}
CASES = [(method, values) for method in merge_methods() for values in PARAMETERS.get(method, [{}])]


def made(method, parameters):
    """The rule, random cores, orthonormal bases that lift them, and uneven weights."""
    rule = MergeRule.create(method, parameters)
    low, high = rule.input_range
    count = int(min(high, max(low, 3)))
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = (torch.linalg.qr(randn(rows, columns))[0] for rows, columns in ((24, 7), (20, 6)))
    return rule, randn(count, 7, 6), left, right, [2 * (index + 1) / (count * (count + 1)) for index in range(count)]


def commutes(method, parameters):
    rule, cores, left, right, weights = made(method, parameters)
    for scale in SCALES:
        merged = left @ rule.merge(list(cores * scale), weights) @ right.T
        dense = rule.merge(list(left @ (cores * scale) @ right.T), weights)
        if (merged - dense).norm() > 1e-6 * dense.norm():
            return False
    return True


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=str)
def test_methods_said_to_commute_with_a_change_of_basis_do(method, parameters):
    assert MergeRule.create(method, parameters).commutes == (method in COMMUTING)
    assert commutes(method, parameters) or method not in COMMUTING


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("nuslerp", {"nuslerp_flatten": False}),
        ("model_stock", {"filter_wise": True}),
        ("ties", {"density": 0.5}),
        ("dare_ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.8}),
        ("della_linear", {"density": 0.5}),
        ("breadcrumbs", {"density": 0.8}),
    ],
)
def test_options_that_depend_on_the_basis_are_merged_dense(method, parameters):
    assert not commutes(method, parameters)
    assert not MergeRule.create(method, parameters).commutes


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=str)
def test_methods_said_to_normalize_the_weights_do(method, parameters):
    rule, cores, _, _, weights = made(method, parameters)
    merged = []
    for factor in (1, 2):
        torch.manual_seed(0)
        merged.append(rule.merge(list(cores), [factor * weight for weight in weights]))
    assert rule.normalizes == (rule.takes_weights and torch.allclose(*merged))


@pytest.mark.parametrize("method", merge_methods())
def test_every_method_passes_the_check_of_settings_and_leaves_the_random_numbers(method):
    parameters = PARAMETERS.get(method, [{}])[0]
    state = torch.get_rng_state()
    check_merge(method, parameters)
    assert torch.equal(state, torch.get_rng_state())
    rule = MergeRule.create(method, parameters)
    names = [f"acme/{index}" for index in range(int(min(rule.input_range[1], max(rule.input_range[0], 3))))]
    config = MergeConfiguration.model_validate(
        mergekit_config(rule, names, [0.5] * len(names), "acme/base", dtype="float32")
    )
    assert (config.merge_method, [str(entry.model) for entry in config.models]) == (method, names)
    assert str(config.base_model) in ("acme/base", "acme/0", "None")


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
        check_merge(**arguments)


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


def test_importing_the_settings_does_not_wait_for_mergekit():
    code = "import sys, mashup_callback.config, mashup_callback.methods; print('mergekit' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
