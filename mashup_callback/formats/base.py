"""The base model as the descriptions of candidates are compared with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import nn

from ..model import ModelTensors, base_model_name, describe_model, layer_shapes, whole_parameters


@dataclass(frozen=True, eq=False)
class BaseModel:
    """
    What a candidate must fit: linear layers, name -> (in_features, out_features), and all weights; `wholes` are the
    sizes of parameters that are trained whole besides an adapter.

    `refusal` says why no full checkpoint can take their place, if so; adapters are warned of that record another name.
    Where `tensors` is None, full checkpoints are not compared with them.
    """

    layers: Mapping[str, tuple[int, int]]
    tensors: ModelTensors | None = None
    refusal: str = ""
    name: str | None = None
    wholes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def check(self, description: "Description") -> "Description":
        """Returns the description of a candidate as it fits; raises `AdapterError`."""
        return description.fit(self)

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> "BaseModel":
        """Describes a live model, without the adapters on it."""
        name = name or base_model_name(model)
        wholes = {name: tuple(whole.matrix.shape[::-1]) for name, whole in whole_parameters(model).items()}
        try:
            return cls(layer_shapes(model), describe_model(model), "", name, wholes)
        except ValueError as error:
            return cls(layer_shapes(model), None, str(error), name, wholes)


class Description(Protocol):
    """What is known of a candidate without reading a tensor: an [`Adapter`] or a [`Checkpoint`]."""

    path: Path | None
    warnings: tuple[str, ...]

    def fit(self, base: BaseModel) -> "Description":
        """Returns it with the names that the model has; raises `AdapterError` where it does not fit."""
