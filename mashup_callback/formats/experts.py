"""Adapters of parameters that hold the weights of several experts: one layer for each expert of the model."""

import dataclasses
from collections.abc import Mapping

import torch

from ..errors import AdapterError
from .adapter_config import AdapterConfig
from .adapter_modules import ModuleShape, Stack


def expert_modules(
    module: str, shape: ModuleShape, config: AdapterConfig, layers: Mapping[str, object]
) -> dict[str, ModuleShape]:
    """
    Returns the experts' layers that a module's factors are of, by the names that the model has for them.

    peft wraps the adapted parameters of a module one around the other, in the order in which the module has them.

    Raises:
        AdapterError: The model has no such experts, or another number of them.
    """
    stack = shape.stack
    held = dict.fromkeys(name.rpartition(".")[0] for name in layers if name.startswith(f"{module}."))
    adapted = [name for name in held if name.rpartition(".")[2] in stack.parameters and f"{name}.0" in layers]
    if stack.depth >= len(adapted):
        raise AdapterError(
            f"`target_parameters` adapts {stack.parameters} of {module}, which are no weights of experts in this model"
        )
    parameter = adapted[-1 - stack.depth]
    rank, count = config.rank_of(parameter), sum(name.rpartition(".")[0] == parameter for name in layers)
    if shape.rank != rank * count:
        raise AdapterError(f"{parameter} has {count} experts of rank {rank}, and the factors have {shape.rank} ranks")
    scaling = config.scaling_of(parameter, rank)
    return {
        f"{parameter}.{index}": dataclasses.replace(
            shape, rank=rank, scaling=scaling, stack=Stack(expert=(index, count))
        )
        for index in range(count)
    }


def of_expert(part: str, tensor: torch.Tensor, stack: Stack | None) -> torch.Tensor:
    """Returns one expert's share of a factor: A has its ranks side by side, B has them apart."""
    if stack is None:
        return tensor
    index, count = stack.expert
    return tensor.unflatten(0, (count, -1))[index] if part == "A" else tensor.unflatten(1, (-1, count))[..., index]
