"""The layers of a live model: which ones an adapter can change, and the LoRA layers that are being trained."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import AdapterError
from ..factors import Factors, in_float64
from .parameters import clean_name, read_parameters
from .tensors import FullTrainee, find_full_trainee


# Initialisations that move part of the weights into the adapter, so that the base is no longer the candidates' base.
ALTERS_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
FREEZES_A_FACTOR = ("mica",)
# Trained adapters changed a trained base by at most 0.65 of a weight's norm, and one with fresh weights by 4.6.
MAX_UPDATE = 100.0
# B·A counts as zero below this share of |A|·|B|: orthogonal initialisations reach zero only approximately.
_ZERO = 1e-5


@dataclass(frozen=True, eq=False)
class Target:
    """
    One LoRA layer of the trainee.

    Args:
        name (`str`): Name of the layer in the base model.
        A (`torch.Tensor`): Copy of its down projection, shape (rank, in_features), whole even where it is sharded.
        B (`torch.Tensor`): Copy of its up projection, shape (out_features, rank).
        scaling (`float`): What B·A is multiplied by in the forward pass.
        alpha (`float`): LoRA alpha that the scaling comes from.
    """

    name: str
    A: torch.Tensor
    B: torch.Tensor
    rank: int
    scaling: float
    alpha: float


@dataclass(frozen=True, eq=False)
class Trainee:
    """
    The adapter that the Trainer trains.

    Args:
        adapter_name (`str`): Its name on the model.
        targets (`Mapping[str, Target]`): Its layers, by name in the base model.
        config (`peft.LoraConfig`): Its configuration.
    """

    adapter_name: str
    targets: Mapping[str, Target]
    config: object

    def parameter_names(self, layer: str) -> tuple[str, str]:
        """Returns the names of A and B of one layer, as [`read_parameters`] takes them."""
        return _parameter_names(layer, self.adapter_name)

    @property
    def ranks(self) -> dict[str, int]:
        return {name: target.rank for name, target in self.targets.items()}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """
    Returns the layers that a LoRA adapter can change, by their name in the base model.

    Layers that already carry adapters are given as their base layer: what a hook on it adds is added with the
    adapters switched off.

    Args:
        model (`torch.nn.Module`):
            Any model: bare, a `PeftModel`, or with adapters added by transformers; wrapped or not.
    """
    layers = {}
    for name, module in extract_model_from_parallel(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[clean_name(name)] = module.get_base_layer()
        elif clean_name(name) not in layers and "lora_" not in name and layer_shape(module) is not None:
            layers[clean_name(name)] = module
    return {name: layer for name, layer in layers.items() if layer_shape(layer) is not None}


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns (in_features, out_features) of a model's linear layers, by their name in the base model."""
    return {name: layer_shape(layer) for name, layer in linear_layers(model).items()}


def layer_shape(layer: nn.Module) -> tuple[int, int] | None:
    """Returns (in_features, out_features) of a linear layer of any kind, quantized ones too; None for other layers."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    shape = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return shape if all(isinstance(size, int) for size in shape) else None


@torch.no_grad()
def weight_norms(model: nn.Module) -> dict[str, float]:
    """Returns the Frobenius norms of a model's linear layers, without those that are quantized, sharded or zero."""
    weights = {name: getattr(layer, "weight", None) for name, layer in linear_layers(model).items()}
    norms = {
        name: torch.linalg.vector_norm(w.data, dtype=torch.float32) for name, w in weights.items() if _is_plain(w)
    }
    return {name: norm.item() for name, norm in norms.items() if norm > 0}


def _is_plain(weight: torch.Tensor | None) -> bool:
    # Quantized and sharded weights are of other types or hold integers, offloaded ones are on the meta device.
    plain = weight is not None and type(weight.data) is torch.Tensor and not weight.is_meta
    return plain and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse_huge(update: Factors, norms: Mapping[str, float]) -> None:
    """
    Refuses an update that leaves nothing of the weights it changes, as training from it fails.

    Args:
        update (`Mapping[str, LoraFactors]`):
            The update.
        norms (`Mapping[str, float]`):
            From [`weight_norms`]; layers without a norm are not judged.

    Raises:
        AdapterError: It is more than a hundred times as large as the weight of a layer.
    """
    for name, factors in update.items():
        limit = MAX_UPDATE * norms.get(name, math.inf)
        # The product of the norms bounds the norm of the product at a fraction of the cost.
        bound = abs(factors.scaling) * factors.A.norm().item() * factors.B.norm().item()
        if not bound <= limit and (norm := factors.norm()) > limit:
            raise AdapterError(
                f"its update of {name} is {norm / norms[name]:.1f} times as large as the weight (Frobenius norms), "
                f"expected at most {MAX_UPDATE:g} times: it is broken, or of another base model"
            )


def find_trainee(model: nn.Module, overwrite: bool = False) -> Trainee | FullTrainee:
    """
    Finds what is being trained, a LoRA adapter or the model's own weights, and checks that a merge can be written into
    it.

    Args:
        model (`torch.nn.Module`):
            A `PeftModel`, a model with an adapter added by transformers' `add_adapter`, or one without adapters.
        overwrite (`bool`, *optional*, defaults to `False`):
            Accept an adapter whose update B·A is not zero.

    Raises:
        ValueError: The model trains nothing, or adapters without LoRA layers, or several adapters, its initialisation
            alters the base or freezes a factor, it is a variant such as DoRA, or it is already trained.
    """
    modules = extract_model_from_parallel(model).named_modules()
    layers = {clean_name(name): layer for name, layer in modules if isinstance(layer, LoraLayer)}
    names = sorted({name for layer in layers.values() for name in _trained_adapters(layer)})
    if not names:
        full = find_full_trainee(model)
        if full is not None:
            return full
        raise ValueError(
            "The model trains no LoRA layers, and none of its own weights. A mashup is written into what is trained: "
            "give the Trainer a `peft_config=LoraConfig(...)`, wrap the model with `peft.get_peft_model`, call "
            "`model.add_adapter`, or leave the weights trainable for full fine-tuning."
        )
    if len(names) > 1:
        raise ValueError(
            f"The model trains {len(names)} adapters at once ({', '.join(names)}), expected one. Activate and "
            "unfreeze only the adapter that the mashup is for, with `model.set_adapter(name)`."
        )
    config = adapter_host(model).peft_config[names[0]]
    _refuse_initialisation(config)
    fitting = {
        name: layer
        for name, layer in layers.items()
        if names[0] in layer.lora_A and layer_shape(layer.get_base_layer()) is not None
    }
    values = read_parameters(model, [key for name in fitting for key in _parameter_names(name, names[0])])
    targets = {name: _target(name, layer, names[0], values) for name, layer in fitting.items()}
    if not overwrite:
        _refuse_trained(targets.values())
    return Trainee(names[0], targets, config)


def adapter_host(model: nn.Module) -> nn.Module | None:
    """
    Returns the module that the adapters were added to, None if there are none.

    Args:
        model (`torch.nn.Module`):
            A `PeftModel` or a model with adapters added by transformers, or one around it, as sentence-transformers
            builds; wrapped or not.
    """
    modules = extract_model_from_parallel(model).modules()
    return next((module for module in modules if getattr(module, "peft_config", None)), None)


def _trained_adapters(layer: LoraLayer) -> Iterator[str]:
    for name in layer.active_adapters:
        if name in layer.lora_A and layer.lora_B[name].weight.requires_grad:
            yield name


def _refuse_initialisation(config: object) -> None:
    kind = str(config.init_lora_weights).lower()
    if kind.startswith(ALTERS_BASE):
        raise ValueError(
            f"`init_lora_weights={config.init_lora_weights!r}` alters the base weights, so adapters of the original "
            "base no longer fit it. Use the default `init_lora_weights=True`, or train without the mashup."
        )
    if kind.startswith(FREEZES_A_FACTOR):
        raise ValueError(
            f"`init_lora_weights={config.init_lora_weights!r}` freezes a factor that a mashup must write. Use the "
            "default `init_lora_weights=True`, or train without the mashup."
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


def _refuse_trained(targets: Iterator[Target]) -> None:
    trained = [target.name for target in targets if not _is_zero(target)]
    if trained:
        raise ValueError(
            f"The adapter to be trained is not fresh: B·A is not zero in {len(trained)} layers (the first is "
            f"{trained[0]}). A mashup replaces a fresh initialisation. Start from a new adapter, or pass "
            "`overwrite=True` to let the mashup replace this one where the mashup is better."
        )


@torch.no_grad()
def _is_zero(target: Target) -> bool:
    A, B = in_float64(target.A.detach()), in_float64(target.B.detach())
    # |B·A|² from the two Gram matrices, which are rank x rank; its terms cancel, hence double precision.
    squared = ((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0)
    return bool(squared.sqrt() <= _ZERO * A.norm() * B.norm())


def base_model_name(model: nn.Module) -> str | None:
    """Returns the name or path that the model was loaded from, None if it was built from a configuration."""
    config = getattr(extract_model_from_parallel(model), "config", None)
    return getattr(config, "_name_or_path", None) or None


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the layer that turns hidden states into logits; None where the model does not tell."""
    return unwrapped(model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model in a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
