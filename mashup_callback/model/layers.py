"""The linear layers of a live model, by their name in the base model."""

import os

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .parameters import clean_name, whole_shape


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that LoRA can change, without the adapters on them, by their name in the base model."""
    layers = {}
    for name, module in extract_model_from_parallel(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[clean_name(name)] = module.get_base_layer()
        elif clean_name(name) not in layers and "lora_" not in name and layer_shape(module) is not None:
            layers[clean_name(name)] = module
    return {name: layer for name, layer in layers.items() if layer_shape(layer) is not None}


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns (in_features, out_features) of linear layers, and of experts by their parameter's name and number."""
    shapes = {name: layer_shape(layer) for name, layer in linear_layers(model).items()}
    for name, (module, parameter) in expert_parameters(model).items():
        count, rows, columns = whole_shape(module._parameters[parameter])
        sizes = (rows, columns) if getattr(module, "is_transposed", False) else (columns, rows)
        shapes |= {f"{name}.{index}": sizes for index in range(count)}
    return shapes


def expert_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Returns the parameters that hold the weights of several experts, by their name in the base model."""
    modules = extract_model_from_parallel(model).named_modules()
    return {
        clean_name(f"{name}.{key}"): (module, key)
        for name, module in modules
        if "experts" in name.split(".")
        for key, value in module._parameters.items()
        if value is not None and len(whole_shape(value)) == 3 and value.dtype.is_floating_point
    }


def layer_shape(layer: nn.Module) -> tuple[int, int] | None:
    """Returns (in_features, out_features) of a linear layer or embedding, quantized too; None for other layers."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    shape = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return shape if all(isinstance(size, int) for size in shape) else None


def is_plain(weight: torch.Tensor | None) -> bool:
    """Whether a weight is in memory as numbers, all of it."""
    # Quantized and sharded weights are of other types or hold integers, offloaded ones are on the meta device.
    plain = weight is not None and type(weight.data) is torch.Tensor and not weight.is_meta
    return plain and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_device(model: nn.Module) -> torch.device:
    """Returns the device of the model's weights, or the CPU where matrices cannot be decomposed on that."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type in ("meta", "mps") else device


def adapter_host(model: nn.Module) -> nn.Module | None:
    """Returns the module that the adapters were added to, None if there are none."""
    # Not always the model itself: sentence-transformers builds one around it.
    modules = extract_model_from_parallel(model).modules()
    return next((module for module in modules if getattr(module, "peft_config", None)), None)


def base_model_name(model: nn.Module) -> str | None:
    """Returns the name or path that the model was loaded from, None if it was built from a configuration."""
    config = getattr(extract_model_from_parallel(model), "config", None)
    return located(getattr(config, "_name_or_path", None))


def located(name: str | None) -> str | None:
    """Returns a model's name; of a directory the absolute path, as a relative one is elsewhere a name on the Hub."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name or None


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the layer that turns hidden states into logits; None where the model does not tell."""
    return unwrapped(model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model in a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
