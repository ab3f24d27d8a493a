"""Parameters that are trained whole besides an adapter: those of peft's `modules_to_save`, and biases."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..lowrank import Factors, LoraFactors
from .layers import adapter_host
from .parameters import clean_name, is_sharded


@dataclass(frozen=True, eq=False)
class WholeParameter:
    """
    One of them: the base model's module, key and values, and the parameter that is trained, with its clean name.

    `added` is the factor with which the trained one is added to the base model's, None where it takes its place.
    """

    module: nn.Module
    key: str
    base: torch.Tensor
    trained: nn.Parameter
    name: str
    added: float | None = None

    @property
    def matrix(self) -> torch.Tensor:
        """The base model's values, those of a vector as one column."""
        return self.base.reshape(len(self.base), -1)

    def changed(self, update: LoraFactors | None) -> torch.Tensor:
        """Returns the base model's values with an update."""
        base = self.base
        return base if update is None else base + update.delta().to(base.device).view_as(base)

    def value(self, update: LoraFactors | None) -> torch.Tensor:
        """Returns the values of the trained parameter with which the model computes an update."""
        if self.added is None:
            return self.changed(update)
        return torch.zeros_like(self.base) if update is None else update.delta().flatten() / self.added

    def held(self) -> torch.Tensor:
        """Returns what the trained parameter holds, a fresh copy as the base model's values themselves."""
        fresh = self.value(None)
        return fresh if torch.equal(fresh.to(self.trained), self.trained) else self.trained.detach().clone()


def is_plain(weight: torch.Tensor | None) -> bool:
    """Whether a weight is in memory as numbers, all of it."""
    # Quantized and sharded weights are of other types or hold integers, offloaded ones are on the meta device.
    plain = weight is not None and type(weight.data) is torch.Tensor and not weight.is_meta
    return plain and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def whole_parameters(model: nn.Module) -> dict[str, WholeParameter]:
    """Returns those of a model with an adapter by their name in the base model, none where they are sharded."""
    if adapter_host(model) is None or is_sharded(model):
        return {}
    found: dict[str, WholeParameter] = {}
    for name, module in extract_model_from_parallel(model).named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            found |= _copies(name, module)
        elif isinstance(module, LoraLayer):
            found |= _added(name, module)
        elif _trains_bias(module) and not re.search(r"lora_|modules_to_save", name):
            bias = module._parameters["bias"]
            path = clean_name(f"{name}.bias")
            found[path] = WholeParameter(module, "bias", bias.detach().clone(), bias, path)
    # Of a copy that two modules share, each would be the base model's alone while candidates are scored.
    times = Counter(id(whole.trained) for whole in found.values())
    return {name: whole for name, whole in found.items() if is_plain(whole.base) and times[id(whole.trained)] == 1}


def _trains_bias(module: nn.Module) -> bool:
    bias = module._parameters.get("bias")
    return bias is not None and bias.requires_grad


def _copies(name: str, wrapper: ModulesToSaveWrapper) -> dict[str, WholeParameter]:
    found = {}
    for adapter in set(wrapper.active_adapters) & set(wrapper.modules_to_save):
        for path, parameter in wrapper.modules_to_save[adapter].named_parameters():
            owner, _, key = path.rpartition(".")
            module = wrapper.original_module.get_submodule(owner)
            trained = clean_name(f"{name}.modules_to_save.{adapter}.{path}")
            whole = WholeParameter(module, key, module._parameters[key].data, parameter, trained)
            found[clean_name(f"{name}.{path}")] = whole
    return found


def _added(name: str, layer: LoraLayer) -> dict[str, WholeParameter]:
    found, base = {}, layer.get_base_layer()
    for adapter in set(layer.active_adapters) & set(layer.lora_B):
        bias, own = layer.lora_B[adapter].bias, getattr(base, "bias", None)
        if bias is not None and "bias" in base._parameters:
            values = torch.zeros_like(bias.data) if own is None else own.data
            trained = clean_name(f"{name}.lora_B.{adapter}.bias")
            scaling = layer.scaling[adapter]
            found[clean_name(f"{name}.bias")] = WholeParameter(base, "bias", values, bias, trained, scaling)
    return found


@contextmanager
def replaced(wholes: Mapping[str, WholeParameter], updates: Factors) -> Iterator[None]:
    """Context in which the base model computes with updates of such parameters."""
    changed = [(wholes[name], wholes[name].changed(update)) for name, update in updates.items()]
    before = [whole.module._parameters[whole.key] for whole, _ in changed]
    try:
        for whole, value in changed:
            whole.module._parameters[whole.key] = nn.Parameter(value.to(whole.base), requires_grad=False)
        yield
    finally:
        for (whole, _), parameter in zip(changed, before, strict=True):
            whole.module._parameters[whole.key] = parameter
