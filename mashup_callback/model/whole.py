"""Parameters that are trained whole besides an adapter's factors: those of peft's `modules_to_save`, and biases."""

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
from .layers import adapter_host, is_plain
from .parameters import clean_name, is_sharded


_IN_ADAPTER = re.compile("lora_|modules_to_save")


@dataclass(frozen=True, eq=False)
class WholeParameter:
    """
    One of them: the parameter that is trained and its clean name, and the base model's module, key and values.

    `added` is the factor with which the trained one is added to the base model's, None where it takes its place.
    """

    module: nn.Module
    key: str
    base: torch.Tensor
    trained: nn.Parameter
    name: str
    added: float | None

    @property
    def matrix(self) -> torch.Tensor:
        """The base model's values, those of a vector as one column."""
        return self.base.reshape(len(self.base), -1)

    def changed(self, update: LoraFactors) -> torch.Tensor:
        """Returns the base model's values with an update."""
        return self.base + update.delta().to(self.base.device).view_as(self.base)

    def value(self, update: LoraFactors) -> torch.Tensor:
        """Returns the values of the trained parameter with which the model computes an update."""
        return self.changed(update) if self.added is None else update.delta().flatten() / self.added

    @property
    def fresh(self) -> torch.Tensor:
        """Values of the trained parameter with which the model computes what its base does."""
        return self.base if self.added is None else torch.zeros_like(self.trained)

    def held(self) -> torch.Tensor:
        """Returns what the trained parameter holds, a fresh copy as the base model's values themselves."""
        return self.base if torch.equal(self.base.to(self.trained), self.trained) else self.trained.detach().clone()


def whole_parameters(model: nn.Module) -> dict[str, WholeParameter]:
    """Returns those of a model with an adapter by their name in the base model, none where they are sharded."""
    if adapter_host(model) is None or is_sharded(model):
        return {}
    modules = extract_model_from_parallel(model).named_modules()
    found = dict(one for name, module in modules for one in _of_module(name, module))
    # Of a copy that two modules share, each would be the base model's alone while candidates are scored.
    times = Counter(id(whole.trained) for whole in found.values())
    return {name: whole for name, whole in found.items() if is_plain(whole.base) and times[id(whole.trained)] == 1}


def _of_module(name: str, module: nn.Module) -> Iterator[tuple[str, WholeParameter]]:
    if isinstance(module, ModulesToSaveWrapper):
        for adapter in set(module.active_adapters) & set(module.modules_to_save):
            for path, trained in module.modules_to_save[adapter].named_parameters():
                owner, _, key = path.rpartition(".")
                base = module.original_module.get_submodule(owner)
                yield _whole(f"{name}.{path}", base, key, trained, f"{name}.modules_to_save.{adapter}.{path}")
    elif isinstance(module, LoraLayer):
        for adapter in set(module.active_adapters) & set(module.lora_B):
            base, trained = module.get_base_layer(), module.lora_B[adapter].bias
            if trained is not None and "bias" in base._parameters:
                path = f"{name}.lora_B.{adapter}.bias"
                yield _whole(f"{name}.bias", base, "bias", trained, path, module.scaling[adapter])
    elif (bias := module._parameters.get("bias")) is not None and bias.requires_grad and not _IN_ADAPTER.search(name):
        yield _whole(f"{name}.bias", module, "bias", bias, f"{name}.bias")


def _whole(
    name: str, module: nn.Module, key: str, trained: nn.Parameter, path: str, added: float | None = None
) -> tuple[str, WholeParameter]:
    base = module._parameters[key]
    # A layer may have no bias, and one that is trained in place is copied before it is.
    values = torch.zeros_like(trained.data) if base is None else base.data.clone() if base is trained else base.data
    return clean_name(name), WholeParameter(module, key, values, trained, clean_name(path), added)


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
