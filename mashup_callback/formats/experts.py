"""Adapters of parameters that hold the weights of several experts: one layer for each expert of the model."""

import dataclasses
from collections.abc import Mapping

import torch

from ..errors import AdapterError
from ..lowrank import LoraFactors
from .adapter_config import AdapterConfig
from .adapter_modules import ModuleShape, Stack
from .files import quote
from .variants import Form, Parts


# Layers of one expert as older models have them: which parameter of all experts holds them now, and which part of it.
_APART = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
_APART |= {"gate_proj": _APART["w1"], "up_proj": _APART["w3"], "down_proj": _APART["w2"]}


def put_together(modules: Mapping[str, ModuleShape], layers: Mapping[str, object]) -> dict[str, ModuleShape]:
    """Returns modules, with layers of single experts under the names of a model that has experts in one parameter."""
    found: dict[str, ModuleShape] = {}
    apart: dict[str, dict[int, ModuleShape]] = {}
    for name, shape in modules.items():
        holder, index, layer = ["", "", *name.rsplit(".", 2)][-3:]
        parameter, half = _APART.get(layer, ("", 0))
        now = f"{holder.replace('.block_sparse_moe.', '.mlp.')}.{parameter}.{index}"
        if name in layers or now not in layers or shape.form.of_weight:
            found[name] = shape
        elif apart.setdefault(now, {}).setdefault(half, shape) is not shape:
            raise AdapterError(f"{quote(name)} is in it under two names")
    return found | {now: _whole_of(own) if ".gate_up_proj." in now else own[0] for now, own in apart.items()}


def _whole_of(halves: Mapping[int, ModuleShape]) -> ModuleShape:
    """Returns the update of one weight of which the updates of two layers are the halves."""
    sizes = {(shape.in_features, shape.out_features) for shape in halves.values()}
    if len(sizes) > 1:
        raise AdapterError("its gate and up projections of one expert have different shapes")
    [(width, height)] = sizes

    def factors(parts: Parts) -> LoraFactors:
        own = {
            half: shape.form.factors({part: parts[f"{half} {part}"] for part in shape.keys})
            for half, shape in sorted(halves.items())
        }
        A = torch.cat([one.A for one in own.values()])
        Bs = [halves[half].scaling * own[half].B if half in own else A.new_zeros(height, 0) for half in (0, 1)]
        return LoraFactors(A, torch.block_diag(*Bs), 1.0)

    keys = {f"{half} {part}": key for half, shape in halves.items() for part, key in shape.keys.items()}
    rank = sum(shape.rank for shape in halves.values())
    return ModuleShape(rank, width, 2 * height, 1.0, keys, Form(frozenset(keys), factors))


def expert_modules(
    module: str, shape: ModuleShape, config: AdapterConfig, layers: Mapping[str, object]
) -> dict[str, ModuleShape]:
    """Returns the experts' layers that a module's factors are of, as the model names them; raises `AdapterError`."""
    stack = shape.stack
    held = dict.fromkeys(name.rpartition(".")[0] for name in layers if name.startswith(f"{module}."))
    # peft wraps the adapted parameters of a module one around the other, in the order in which the module has them.
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
