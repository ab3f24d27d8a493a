"""Whole parameters of a live model, read and written however they are kept: plain, sharded, with fp32 masters."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor


# What wrappers put into the middle of a parameter's or module's name.
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def clean_name(name: str) -> str:
    """Returns a module's or parameter's name as it is in the base model, without what wrappers add to it."""
    name = re.sub(r"^(base_model\.model\.)+", "", _unwrapped_name(name))
    # LoRA of several parameters of one module is wrapped one in the other, and only their names tell them apart.
    return re.sub(r"(\.base_layer)+(?!(\.base_layer)*\.lora_)", "", name)


def _unwrapped_name(name: str) -> str:
    for part in _WRAPPERS:
        name = f"{name}.".replace(part, "").removesuffix(".")
    return name


def is_sharded(model: nn.Module) -> bool:
    """Whether no process holds the whole model (FSDP, ZeRO-3), so that all of them must join every forward pass."""
    wrapped = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return wrapped or any(_is_partitioned(parameter) for parameter in model.parameters())


@torch.no_grad()
def read_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Returns copies of whole parameters by their clean names, on every process; every process must call it."""
    names = list(names)
    found = dict(stream_parameters(model, set(names)))
    return {name: found[name] for name in names}


@torch.no_grad()
def stream_parameters(model: nn.Module, names: Container[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields copies of whole parameters with their names, one at a time; every process must go through all of them."""
    for parameters in _gathered(model, writeback=False):
        yield from ((name, _whole(parameter)) for name, parameter in parameters.items() if name in names)


def fill_master(parameter: nn.Parameter, value: torch.Tensor | None = None) -> None:
    """Gives the fp32 master that ZeRO keeps of a parameter, if any, a value: by default the parameter's own."""
    if _is_partitioned(parameter) or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        value = _whole(parameter) if value is None else value
        safe_set_full_fp32_param(parameter, value.float().to(parameter.device))


@torch.no_grad()
def write_parameters(model: nn.Module, values: Mapping[str, torch.Tensor], masters: bool = True) -> None:
    """
    Fills parameters in place, and the fp32 masters from which ZeRO would undo that in its first step.

    Every process must call it with the same values, each looked up once, when its turn comes. What is put back before
    the next step needs no `masters`.
    """
    for parameters in _gathered(model, writeback=True):
        for name, parameter in parameters.items():
            if name in values:
                _fill(parameter, values[name], masters)


def _gathered(model: nn.Module, writeback: bool) -> Iterator[dict[str, nn.Parameter]]:
    """Yields the parameters by their clean names, those of FSDP1 one unit at a time while the unit is whole."""
    reshard(model)
    units = {
        _unwrapped_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, FullyShardedDataParallel)
    }
    for prefix, unit in units.items():
        within = tuple(
            f"{other}." for other in units if other != prefix and (not prefix or other.startswith(f"{prefix}."))
        )
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writeback):
            named = {_unwrapped_name(name): value for name, value in unit.named_parameters(prefix=prefix)}
            yield {clean_name(name): value for name, value in named.items() if not name.startswith(within)}
    if not units:
        yield {clean_name(name): value for name, value in model.named_parameters()}


def reshard(model: nn.Module) -> None:
    """Lets go of the units that a forward pass of FSDP leaves whole: what is written into shards would be lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        # Before its first forward pass a unit of FSDP1 has no shard set apart, and is not whole.
        elif isinstance(module, FullyShardedDataParallel) and hasattr(module._flat_param, "_local_shard"):
            module._handle.reshard(free_unsharded_flat_param=module._handle.uses_sharded_strategy)


def flattened_shapes(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Returns the shapes of the parameters of which FSDP1 keeps a flat part in each process, by the `id` of these."""
    handles = [module._handle for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    flat = [handle.flat_param for handle in handles if handle is not None and handle._use_orig_params]
    return {id(p): tuple(shape) for item in flat for p, shape in zip(item._params, item._shapes, strict=True)}


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Returns a parameter's shape, also under ZeRO-3, which keeps an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what this process holds of a tensor (FSDP2, ZeRO-3): all of one that is not sharded."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    value = tensor.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def regather(parameter: nn.Parameter) -> None:
    """Makes a parameter that ZeRO-3 keeps whole between steps agree with its shards; every process must call it."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if parameter.ds_status == ZeroParamStatus.AVAILABLE:
        parameter.partition()
    if parameter.ds_persist:
        parameter.all_gather()


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    if _is_partitioned(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            whole = parameter.detach().clone()
        regather(parameter)
        return whole
    value = parameter.detach()
    return value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()


def _fill(parameter: nn.Parameter, value: torch.Tensor, masters: bool) -> None:
    if _is_partitioned(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        regather(parameter)
    elif isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        # Every process has the value, so each cuts out its own shard and nothing is sent.
        shard = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(value)
    if masters:
        fill_master(parameter, value)
