"""An adapter on disk as a candidate, and its update as hooks on the live model."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..formats import Adapter, adapter_hash, load_factors
from ..lowrank import Factors
from ..model import refuse_huge
from .hooks import applied


@dataclass(frozen=True, eq=False)
class LoraUpdate:
    """Low-rank updates by layer, added to the layers' outputs by forward hooks."""

    factors: Factors

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        return applied(model, self.factors)


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """A LoRA adapter that fits the model, named as the model names its layers; `norms` are those of its weights."""

    adapter: Adapter
    norms: Mapping[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.adapter.rank

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.adapter.warnings

    def load(self, device: torch.device | str = "cpu") -> LoraUpdate:
        factors = load_factors(self.adapter, device)
        refuse_huge(factors, self.norms)
        return LoraUpdate(factors)

    def fingerprint(self) -> str | None:
        return adapter_hash(self.adapter)
