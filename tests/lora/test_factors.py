import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mashup_callback.lowrank import LoraFactors


def random_factors(rank, out_features, in_features, scaling=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(
        A=torch.randn(rank, in_features, generator=generator).to(dtype),
        B=torch.randn(out_features, rank, generator=generator).to(dtype),
        scaling=scaling,
    )


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 9),
    out_features=st.integers(1, 12),
    in_features=st.integers(1, 12),
    scaling=st.floats(-50, 50),
    seed=st.integers(0, 999),
)
def test_norm_is_the_frobenius_norm_of_the_dense_update(rank, out_features, in_features, scaling, seed):
    factors = random_factors(rank, out_features, in_features, scaling, seed, torch.float64)
    expected = torch.linalg.matrix_norm(scaling * torch.einsum("or,ri->oi", factors.B, factors.A)).item()
    assert factors.norm() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_norm_of_updates_that_cancel():
    half = random_factors(3, 10, 8)
    cancelling = LoraFactors(torch.cat([half.A, half.A]), torch.cat([half.B, -half.B], dim=1), scaling=2.0)
    assert cancelling.norm() <= 1e-6 * half.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_does_not_overflow_or_round_in_half_precision(dtype):
    factors = LoraFactors(torch.full((4, 64), 30.0, dtype=dtype), torch.full((32, 4), 30.0, dtype=dtype), 2.0)
    assert factors.norm() == pytest.approx(2.0 * 4 * 900 * (64 * 32) ** 0.5)
    assert factors.delta().dtype == dtype


def test_delta_is_what_a_lora_layer_adds_to_its_output():
    factors = random_factors(4, 6, 5, scaling=1.5)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    lora_a, lora_b = torch.nn.Linear(5, 4, bias=False), torch.nn.Linear(4, 6, bias=False)
    lora_a.weight.data, lora_b.weight.data = factors.A, factors.B
    torch.testing.assert_close(x @ factors.delta().T, lora_b(lora_a(x)) * 1.5)


def test_sizes_are_read_from_the_factors():
    factors = random_factors(4, 6, 5)
    assert (factors.rank, factors.out_features, factors.in_features) == (4, 6, 5)


@pytest.mark.parametrize(
    ("shape_a", "shape_b"), [((4, 5), (6, 3)), ((4,), (6, 4)), ((4, 5), (4, 6)), ((2, 4, 5), (6, 2))]
)
def test_factors_that_share_no_rank_are_refused(shape_a, shape_b):
    with pytest.raises(ValueError, match="one rank"):
        LoraFactors(torch.zeros(shape_a), torch.zeros(shape_b), 1.0)


def test_factors_are_frozen_and_hashable():
    factors = random_factors(2, 3, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        factors.scaling = 2.0
    assert len({factors, factors}) == 1
