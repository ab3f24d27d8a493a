"""The weights of a live model as a checkpoint on disk would name them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from .layers import unwrapped
from .parameters import clean_name, flattened_shapes, whole_shape


# Parameters of adapters, which are no part of the model.
_ADAPTERS = ("lora_", "modules_to_save", "original_module")


@dataclass(frozen=True)
class ModelTensors:
    """Names and shapes of a model's weights; the shape of a shared parameter is there once."""

    model_type: str
    tied: bool
    shapes: Mapping[str, tuple[int, ...]]
    # From the further names of a shared parameter to the one in `shapes`.
    aliases: Mapping[str, str]
    # One row for each token.
    embeddings: frozenset[str]
    buffers: frozenset[str]
    # The widest where the parameters differ.
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of all parameters in `dtype`."""
        return sum(map(self.bytes_of, self.shapes))

    def bytes_of(self, name: str) -> int:
        """Size of one parameter in `dtype`."""
        return torch.Size(self.shapes[name]).numel() * self.dtype.itemsize


def describe_model(model: nn.Module) -> ModelTensors:
    """Describes the weights of a model, wrapped or sharded in any way, without its adapters; `ValueError` why not."""
    # FSDP1's outermost unit is a wrapper like any other, and gone after the next line.
    flattened = flattened_shapes(model)
    model = extract_model_from_parallel(model)
    names: dict[int, list[str]] = {}
    shapes, dtypes = {}, []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(part in name for part in _ADAPTERS):
            continue
        known = names.setdefault(id(parameter), [])
        known.append(clean_name(name))
        shapes[known[0]] = flattened.get(id(parameter)) or whole_shape(parameter)
        dtypes.append(parameter.dtype)
    _refuse_quantized(dtypes)
    base = unwrapped(model)
    _refuse_other_libraries(base)
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    ends = [getattr(end, "weight", None) for end in (base.get_input_embeddings(), base.get_output_embeddings())]
    return ModelTensors(
        model_type=base.config.model_type,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        shapes=shapes,
        aliases={alias: known[0] for known in names.values() for alias in known[1:]},
        embeddings=frozenset(names[id(weight)][0] for weight in ends if id(weight) in names),
        buffers=frozenset(clean_name(name) for name, _ in model.named_buffers()),
        dtype=max(dtypes, key=lambda dtype: dtype.itemsize),
    )


def _refuse_other_libraries(base: nn.Module) -> None:
    # Not by class, which `torch.compile` hides.
    if not hasattr(base, "config") or not hasattr(base, "get_input_embeddings"):
        raise ValueError(
            f"The weights of a {type(base).__name__} cannot be compared with those of a checkpoint: expected a model "
            "of transformers. Train a LoRA adapter, or the model of transformers itself."
        )


def _refuse_quantized(dtypes: list[torch.dtype]) -> None:
    quantized = sorted({str(dtype) for dtype in dtypes if not dtype.is_floating_point or dtype.itemsize < 2})
    if quantized:
        raise ValueError(
            f"The model's weights are quantized ({', '.join(quantized)}): full checkpoints cannot take their place. "
            "Load the model without quantization, or give LoRA adapters as candidates."
        )
