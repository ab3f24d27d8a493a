"""Where each kind of LoRA layer keeps its factors: their parameters as updates of layers, and back."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight

from ..lowrank import Factors, LoraFactors
from ..model import layer_shape


Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Target:
    """A layer that the trainee changes, with whole copies of A and B; of a fresh one B is zero, or A if `reverse`."""

    name: str
    A: torch.Tensor
    B: torch.Tensor
    rank: int
    scaling: float
    reverse: bool = False


class LinearPlace:
    """The factors of a linear layer, with the magnitude that DoRA trains besides them."""

    reverse = False

    def __init__(self, name: str, prefix: str, layer: LoraLayer, adapter: str) -> None:
        self.name, self.layer, self.adapter = name, layer, adapter
        self.rank, self.scaling = layer.r[adapter], float(layer.scaling[adapter])
        self.A, self.B = (f"{prefix}.{key.format(adapter)}" for key in self._KEYS)
        held = getattr(layer, "lora_magnitude_vector", None) or {}
        self.magnitude = f"{prefix}.lora_magnitude_vector.{adapter}.weight" if adapter in held else None
        bias = getattr(layer.lora_B[adapter], "bias", None) if adapter in layer.lora_B else None
        self.bias = None if bias is None else self.B.replace(".weight", ".bias")

    _KEYS = ("lora_A.{}.weight", "lora_B.{}.weight")

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for name in (self.A, self.B, self.magnitude, self.bias) if name is not None)

    def targets(self, held: Tensors) -> list[Target]:
        """Returns what the parameters hold."""
        return [Target(self.name, held[self.A], held[self.B], self.rank, self.scaling, self.reverse)]

    def values(self, factors: Factors, held: Tensors) -> dict[str, torch.Tensor]:
        """Returns what the parameters hold when the layer computes with an update."""
        update = factors[self.name]
        values = {self.A: update.A, self.B: update.B}
        if self.magnitude is not None:
            values[self.magnitude] = self._norms(update).to(held[self.magnitude])
        if self.bias is not None:
            values[self.bias] = torch.zeros_like(held[self.bias])
        return values

    @torch.no_grad()
    def _norms(self, update: LoraFactors) -> torch.Tensor:
        """Returns the magnitude with which DoRA leaves the weight as the update makes it."""
        weight = dequantize_module_weight(self.layer.get_base_layer())
        low_rank = update.B.to(weight.device) @ update.A.to(weight.device)
        return self.layer.lora_magnitude_vector[self.adapter].get_weight_norm(weight, low_rank, update.scaling)


class EmbeddingPlace(LinearPlace):
    """The factors of an embedding, a linear layer of one-hot tokens; a fresh one has its zeros in A."""

    reverse = True
    _KEYS = ("lora_embedding_A.{}", "lora_embedding_B.{}")


class ExpertsPlace(LinearPlace):
    """The factors of a parameter that holds the weights of experts, each an update of its own."""

    def __init__(self, name: str, prefix: str, layer: ParamWrapper, adapter: str) -> None:
        super().__init__(f"{name}.{layer.parameter_name}", prefix, layer, adapter)
        self.count = layer.num_experts

    def targets(self, held: Tensors) -> list[Target]:
        A = held[self.A].unflatten(0, (self.count, self.rank))
        B = held[self.B].unflatten(1, (self.rank, self.count))
        return [Target(name, A[i], B[:, :, i], self.rank, self.scaling) for i, name in enumerate(self.names)]

    def values(self, factors: Factors, held: Tensors) -> dict[str, torch.Tensor]:
        updates = [factors[name] for name in self.names]
        A, B = torch.cat([update.A for update in updates]), torch.stack([update.B for update in updates], 2)
        return {self.A: A, self.B: B.flatten(1)}

    @property
    def names(self) -> list[str]:
        return [f"{self.name}.{index}" for index in range(self.count)] if self.count > 1 else [self.name]


_VARIANTS = (DoraLinearVariant, DoraEmbeddingVariant)


def find_place(name: str, prefix: str, layer: LoraLayer, adapter: str) -> LinearPlace | None:
    """Returns where a layer keeps its factors, None if no merge changes it; raises `ValueError` if it cannot be."""
    variant = layer.lora_variant.get(adapter)
    if variant is not None and type(variant) not in _VARIANTS and variant not in _VARIANTS:
        found = getattr(variant, "__name__", type(variant).__name__)
        raise ValueError(
            f"Layer {name} is trained as {found}, whose update is more than scaling·B·A. A mashup can be written into "
            "LoRA and DoRA layers only."
        )
    if isinstance(layer, ParamWrapper):
        return ExpertsPlace(name, prefix, layer, adapter)
    if isinstance(layer, Embedding):
        return EmbeddingPlace(name, prefix, layer, adapter)
    return None if layer_shape(layer.get_base_layer()) is None else LinearPlace(name, prefix, layer, adapter)
