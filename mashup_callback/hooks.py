"""Low-rank updates added to the layers of a live model by forward hooks, so that the model itself is left alone."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from .factors import Factors, LoraFactors
from .layers import linear_layers


# Layers of one block that most architectures give the same input. Where one does not, the result is the same.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


@contextmanager
def applied(model: nn.Module, factors: Factors) -> Iterator[None]:
    """
    Context in which the model computes y + s·(x Aᵀ) Bᵀ in the layers that have an update.

    The product x Aᵀ is computed in the factors' data type, as peft does, and once for all layers that are given the
    same input. Without gradients the update is added into the layer's output in place, so no activation is copied.

    Args:
        model (`torch.nn.Module`):
            Any model, wrapped or not.
        factors (`Mapping[str, LoraFactors]`):
            Updates by the name of the layer in the base model. Their tensors may require gradients.
    """
    layers = linear_layers(model) if factors else {}
    with ExitStack() as stack:
        for names in _groups(factors):
            shared = _SharedInput({layers[name]: factors[name] for name in names})
            for name in names:
                stack.enter_context(layers[name].register_forward_hook(shared.add))
        yield


def _groups(factors: Factors) -> list[list[str]]:
    groups: dict[tuple, list[str]] = {}
    for name, update in factors.items():
        block, _, layer = name.rpartition(".")
        kind = next((kind for kind in _SAME_INPUT if layer in kind), layer)
        groups.setdefault((block, kind, update.in_features), []).append(name)
    return list(groups.values())


class _SharedInput:
    """The updates of layers that are given the same input; their A are stacked into one matrix."""

    def __init__(self, updates: Mapping[nn.Module, LoraFactors]) -> None:
        device = next(next(iter(updates)).parameters()).device
        As = [update.A.to(device) for update in updates.values()]
        self.A = As[0] if len(As) == 1 else torch.cat(As)
        ends = torch.tensor([len(A) for A in As]).cumsum(0).tolist()
        self.parts = {
            layer: (slice(end - update.rank, end), update.B.to(device), update.scaling)
            for (layer, update), end in zip(updates.items(), ends, strict=True)
        }
        self.seen: tuple[weakref.ref, int] | None = None
        self.product: torch.Tensor | None = None

    def add(self, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        part, B, scaling = self.parts[layer]
        return _plus(output, self._product(args[0])[..., part], B, scaling)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.parts) == 1:
            return F.linear(x.to(self.A), self.A)
        # The version tells whether the same tensor holds other numbers by now; an inference tensor has none.
        version = 0 if x.is_inference() else x._version
        if self.seen is None or self.seen[0]() is not x or self.seen[1] != version:
            self.product, self.seen = F.linear(x.to(self.A), self.A), (weakref.ref(x), version)
        return self.product


def _plus(output: torch.Tensor, product: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    if torch.is_grad_enabled():
        return (output + scaling * F.linear(product, B)).to(output.dtype)
    if output.is_contiguous() and output.dtype == product.dtype == B.dtype:
        output.view(-1, output.shape[-1]).addmm_(product.reshape(-1, product.shape[-1]), B.T, alpha=scaling)
        return output
    return output.add_(F.linear(product, B), alpha=scaling)
