"""Full checkpoints as candidates of a LoRA trainee: the low-rank part of their update of the base."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..distributed import is_main_process, on_main_process
from ..errors import AdapterError, CheckpointError
from ..formats import Adapter, Checkpoint, read_adapter, read_tensor, write_adapter
from ..lowrank import LoraFactors, exact_dtype, truncate_dense
from ..model import linear_layers, random_state, stream_parameters


def extract(
    model: nn.Module, checkpoint: Checkpoint, ranks: Mapping[str, int], min_kept_energy: float, path: Path
) -> Adapter:
    """
    Writes the best low-rank approximation of a checkpoint's update of the model's base as an adapter.

    Every process must call it; an `AdapterError` is raised where it keeps less than `min_kept_energy`.
    """
    factors, kept = low_rank_update(model, checkpoint, ranks)
    rank = max(ranks.values())
    if kept < min_kept_energy:
        raise CheckpointError(
            f"rank {rank} keeps {kept:.1%} of its update's squared norm, less than min_kept_energy="
            f"{min_kept_energy:.1%}: raise the rank, lower `min_kept_energy` to accept it, or train all weights"
        )
    on_main_process(lambda: write_adapter(path, factors, base_model=None))
    adapter = read_adapter(path)
    warning = f"rank {rank} keeps {kept:.1%} of its full update"
    return dataclasses.replace(adapter, warnings=(*adapter.warnings, warning))


@torch.no_grad()
def low_rank_update(
    model: nn.Module, checkpoint: Checkpoint, ranks: Mapping[str, int]
) -> tuple[dict[str, LoraFactors], float]:
    """
    Approximates a checkpoint's update of the model's weights by factors (Eckart-Young), one tensor at a time.

    The model's adapters are left out, and so is what other weights than those with a rank changed. Every process must
    call it. Returns the factors by layer, with scaling 1.0, and the share of the squared Frobenius norm of the whole
    update, embeddings and all, that they keep; raises an `AdapterError` where no layer has an update.
    """
    factors, kept, total = {}, 0.0, 0.0
    layers = linear_layers(model)
    for name, base in stream_parameters(model, checkpoint.tensors):
        update = read_tensor(checkpoint, name).to(base.device, torch.float32) - base.float()
        energy = torch.linalg.vector_norm(update, dtype=exact_dtype(update.device)).item() ** 2
        total += energy
        layer = name.removesuffix(".weight")
        if layer in ranks and energy > 0 and is_main_process():
            # Conv1D keeps its weight the other way round.
            update = update.T if isinstance(layers[layer], Conv1D) else update
            with random_state(0):
                truncated = truncate_dense(update, ranks[layer], width=ranks[layer])
            # What is sent to the other processes would take memory of this one's device there.
            factors[layer] = truncated.factors.to("cpu")
            kept += truncated.kept_energy * energy
    factors, kept = on_main_process(lambda: (factors, kept))
    if not factors:
        raise AdapterError("its update is zero in every layer that the trainee has: it is the base model itself")
    return factors, min(1.0, kept / total)
