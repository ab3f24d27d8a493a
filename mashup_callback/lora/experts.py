"""Updates of experts that are parts of one parameter: they are added to it while its module runs."""

from collections.abc import Mapping

import torch
from torch import nn

from ..lowrank import Factors, LoraFactors


class ChangedExperts:
    """The updates of experts that are parts of one parameter of a module."""

    def __init__(self, module: nn.Module, name: str, updates: Mapping[int, LoraFactors]) -> None:
        self.module, self.name, self.updates = module, name, updates
        self.weights: nn.Parameter | None = None

    def change(self, module: nn.Module, args: tuple) -> None:
        self.weights = module._parameters[self.name]
        changed = [self._weight(weight, index) for index, weight in enumerate(self.weights)]
        # A tensor, as a parameter would be cut off from the gradients of the factors.
        module._parameters[self.name] = torch.stack(changed)

    def restore(self, module: nn.Module, args: tuple, output: object) -> None:
        if self.weights is not None:
            module._parameters[self.name], self.weights = self.weights, None

    def _weight(self, weight: torch.Tensor, index: int) -> torch.Tensor:
        if index not in self.updates:
            return weight
        delta = self.updates[index].delta().to(weight.device)
        return (weight + (delta.T if getattr(self.module, "is_transposed", False) else delta)).to(weight.dtype)


def experts_changed(parameters: Mapping[str, tuple[nn.Module, str]], factors: Factors) -> list[ChangedExperts]:
    """Returns updates, named by a parameter and the number of an expert in it, by parameter."""
    groups: dict[str, dict[int, LoraFactors]] = {}
    for name, update in factors.items():
        parameter, _, index = name.rpartition(".")
        groups.setdefault(parameter, {})[int(index)] = update
    return [ChangedExperts(*parameters[parameter], updates) for parameter, updates in groups.items()]
