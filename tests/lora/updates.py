"""Random updates of one layer, and the dense matrices that they stand for."""

import torch

from mashup_callback.lowrank import LoraFactors


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
