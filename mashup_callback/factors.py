"""Low-rank updates as plain tensors: what every stage passes on when it means "the weights of an adapter"."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in float64, on the CPU if it is on an Apple GPU, which has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """
    The LoRA update of one linear layer, `delta = scaling * B @ A`.

    Args:
        A (`torch.Tensor` of shape `(rank, in_features)`):
            Down projection, peft's `lora_A.weight`.
        B (`torch.Tensor` of shape `(out_features, rank)`):
            Up projection, peft's `lora_B.weight`.
        scaling (`float`):
            Factor on the product: `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA.

    Raises:
        ValueError: If the shapes do not share one rank.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"A has shape {tuple(self.A.shape)} and B {tuple(self.B.shape)}; expected (rank, in_features) and "
                "(out_features, rank) with one rank. Transpose or slice them first."
            )

    @property
    def rank(self) -> int:
        """Number of rows of `A`, an upper bound on the rank of the update."""
        return self.A.shape[0]

    @property
    def in_features(self) -> int:
        """Size of the layer's input."""
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the layer's output."""
        return self.B.shape[0]

    def delta(self) -> torch.Tensor:
        """The dense update, of shape `(out_features, in_features)` and in the factors' dtype."""
        return self.scaling * (self.B @ self.A)

    def norm(self) -> float:
        """
        Frobenius norm of the update, `sqrt(tr(BᵀB · AAᵀ)) * |scaling|`, without forming the dense matrix.

        Computed in float64, because the trace adds terms of either sign.
        """
        A, B = in_float64(self.A), in_float64(self.B)
        squared = ((B.T @ B) * (A @ A.T)).sum().clamp(min=0)
        return abs(self.scaling) * squared.sqrt().item()


Factors = Mapping[str, LoraFactors]
"""The updates of one adapter: module name in the base model (`"model.layers.0.self_attn.q_proj"`) -> its factors."""
