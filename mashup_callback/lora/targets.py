"""The LoRA layers that are trained: found in the live model, and checked that a merge can be written into them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.lora import LoraLayer
from torch import nn

from ..lowrank import product_norm
from ..model import adapter_host, clean_name, layer_shape, read_parameters


# Initializations that move part of the weights into the adapter, so that the base is no longer the candidates' base.
ALTERS_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
FREEZES_A_FACTOR = ("mica",)
# B·A counts as zero below this share of |A|·|B|: orthogonal initializations reach zero only approximately.
_ZERO = 1e-5


@dataclass(frozen=True, eq=False)
class Target:
    """One LoRA layer of the trainee by its name in the base model, with copies of A and B, whole even if sharded."""

    name: str
    A: torch.Tensor
    B: torch.Tensor
    rank: int
    scaling: float
    alpha: float


@dataclass(frozen=True, eq=False)
class TrainedAdapter:
    """The adapter that is trained as it was before a write: its name on the model, layers and `peft.LoraConfig`."""

    name: str
    targets: Mapping[str, Target]
    config: Any

    @property
    def ranks(self) -> dict[str, int]:
        return {name: target.rank for name, target in self.targets.items()}

    def values(self, factors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Returns the A and B of some layers by the names of their parameters, as [`write_parameters`] takes them."""
        named = [(_parameter_names(layer, self.name), factor) for layer, factor in factors.items()]
        return {name: value for (a, b), factor in named for name, value in ((a, factor.A), (b, factor.B))}


def find_adapter(model: nn.Module, overwrite: bool = False) -> TrainedAdapter | None:
    """Returns the adapter that is trained, None without one; raises `ValueError` if a merge cannot be its start."""
    modules = extract_model_from_parallel(model).named_modules()
    layers = {clean_name(name): layer for name, layer in modules if isinstance(layer, LoraLayer)}
    names = sorted({name for layer in layers.values() for name in layer.active_adapters if _is_trained(layer, name)})
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(
            f"The model trains {len(names)} adapters at once ({', '.join(names)}), expected one. Activate and "
            "unfreeze only the adapter that the mashup is for, with `model.set_adapter(name)`."
        )
    adapter = names[0]
    config = adapter_host(model).peft_config[adapter]
    _refuse_initialization(config)
    # What the user froze is left alone, the adapter of a whole layer too.
    held = {name: layer for name, layer in layers.items() if _is_trained(layer, adapter)}
    fitting = {name: layer for name, layer in held.items() if layer_shape(layer.get_base_layer()) is not None}
    values = read_parameters(model, [key for name in fitting for key in _parameter_names(name, adapter)])
    targets = {name: _target(name, layer, adapter, values) for name, layer in fitting.items()}
    if not overwrite:
        _refuse_trained(targets.values())
    return TrainedAdapter(adapter, targets, config)


def _is_trained(layer: LoraLayer, adapter: str) -> bool:
    return adapter in layer.lora_A and layer.lora_B[adapter].weight.requires_grad


def _refuse_initialization(config: Any) -> None:
    kind = str(config.init_lora_weights).lower()
    if kind.startswith(ALTERS_BASE):
        problem = "alters the base weights, so adapters of the original base no longer fit it"
    elif kind.startswith(FREEZES_A_FACTOR):
        problem = "freezes a factor that a mashup must write"
    else:
        return
    raise ValueError(
        f"`init_lora_weights={config.init_lora_weights!r}` {problem}. Use the default `init_lora_weights=True`, or "
        "train without the mashup."
    )


def _parameter_names(layer: str, adapter: str) -> tuple[str, str]:
    return f"{layer}.lora_A.{adapter}.weight", f"{layer}.lora_B.{adapter}.weight"


def _target(name: str, layer: LoraLayer, adapter: str, values: Mapping[str, torch.Tensor]) -> Target:
    if adapter in layer.lora_variant:
        raise ValueError(
            f"Layer {name} is trained as {type(layer.lora_variant[adapter]).__name__}, whose update is more than "
            "scaling·B·A. A mashup can be written into plain LoRA layers only (`use_dora=False`)."
        )
    A, B = (values[key] for key in _parameter_names(name, adapter))
    return Target(name, A, B, layer.r[adapter], float(layer.scaling[adapter]), float(layer.lora_alpha[adapter]))


def _refuse_trained(targets: Iterable[Target]) -> None:
    norms = ((target.name, product_norm(target.A, target.B), target.A.norm() * target.B.norm()) for target in targets)
    trained = [name for name, norm, bound in norms if not norm <= _ZERO * bound]
    if trained:
        raise ValueError(
            f"The adapter to be trained is not fresh: B·A is not zero in {len(trained)} layers (the first is "
            f"{trained[0]}). A mashup replaces a fresh initialization. Start from a new adapter, or pass "
            "`overwrite=True` to let the mashup replace this one where the mashup is better."
        )
