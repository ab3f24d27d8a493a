"""The weights of the model's base: some updates are computed of them, and all are compared with them."""

import math
from collections.abc import Iterable

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import AdapterError
from ..lowrank import Factors
from .layers import expert_parameters, is_plain, layer_shape, linear_layers
from .parameters import is_sharded, stream_parameters
from .whole import whole_parameters


# Trained adapters changed a trained base by at most 0.65 of a weight's norm, and one with fresh weights by 4.6.
MAX_UPDATE = 100.0


class BaseWeights:
    """The weights of a live model's base, by the names that updates have."""

    def __init__(self, model: nn.Module) -> None:
        self.layers, self.wholes = linear_layers(model), whole_parameters(model)
        self.norms = _norms(model, self.layers)

    @torch.no_grad()
    def __call__(self, name: str) -> torch.Tensor:
        """
        Returns a weight as an update of it is given, `(out_features, in_features)`.

        Raises:
            AdapterError: No process holds all of it, or it is not in memory.
        """
        if name in self.wholes:
            return self.wholes[name].matrix
        layer = self.layers.get(name)
        weight = None if layer is None else dequantize_module_weight(layer).data
        weight = weight.T if isinstance(layer, Conv1D | nn.Embedding) else weight
        if not is_plain(weight) or tuple(weight.shape[::-1]) != layer_shape(layer):
            raise AdapterError("it needs the base model's weights, and these are sharded or offloaded in this run")
        return weight

    def refuse_huge(self, update: Factors) -> None:
        """
        Refuses an update that leaves nothing of the weights it changes, as training from it fails.

        Raises:
            AdapterError: It is more than a hundred times as large as a weight, where that can be read.
        """
        for name, factors in update.items():
            limit = MAX_UPDATE * self.norms.get(name, math.inf)
            # Not finite is too large as well.
            if not factors.norm_bound() <= limit and not (norm := factors.norm()) <= limit:
                times = norm / self.norms.get(name, 1.0)
                raise AdapterError(
                    f"its update of {name} is {times:.1f} times as large as the weight (Frobenius norms), "
                    f"expected at most {MAX_UPDATE:g} times: it is broken, or of another base model"
                )


@torch.no_grad()
def _norms(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, float]:
    """
    Returns the Frobenius norms of layers and experts, without those that are quantized, offloaded or zero.

    Where the model is sharded, every process must call it.
    """
    own = {name: getattr(layer, "weight", None) for name, layer in layers.items()}
    own |= {name: module._parameters[key] for name, (module, key) in expert_parameters(model).items()}
    weights: Iterable[tuple[str, torch.Tensor | None]] = own.items()
    if is_sharded(model):
        whole = stream_parameters(model, {f"{name}.weight" for name in layers} | own.keys())
        weights = ((name.removesuffix(".weight"), weight) for name, weight in whole)
    norms: dict[str, torch.Tensor] = {}
    for name, weight in weights:
        if is_plain(weight) and weight.ndim == 3:
            each = torch.linalg.vector_norm(weight.data, dim=(1, 2), dtype=torch.float32)
            norms |= {f"{name}.{index}": norm for index, norm in enumerate(each)}
        elif is_plain(weight):
            norms[name] = torch.linalg.vector_norm(weight.data, dtype=torch.float32)
    return {name: norm.item() for name, norm in norms.items() if norm > 0}
