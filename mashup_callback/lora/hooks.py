"""Low-rank updates added to the layers of a live model by forward hooks, so that the model itself is left alone."""

import itertools
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..errors import BypassedError, NotTiledError
from ..formats.adapter_modules import ModuleShape
from ..lowrank import Factors, LoraFactors
from ..model.layers import linear_layers
from ..model.parameters import clean_name
from ..scoring.losses import output_head


# Layers of one block that most architectures give the same input. Where one does not, the result is the same.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, eq=False)
class StackedFactors:
    """
    The updates of several candidates in the layers of one block that are given the same input.

    Ranks are padded with zeros up to the largest one among the candidates, and so is a layer that a candidate lacks.

    Args:
        A (`torch.Tensor` of shape `(candidates, ranks, in_features)`):
            Down projections, those of the layers one after the other.
        B (`Mapping[str, tuple[slice, torch.Tensor]]`):
            By the name of the layer, which of the ranks are its own, and its up projections times their scalings, of
            shape (candidates, out_features, rank).
    """

    A: torch.Tensor
    B: Mapping[str, tuple[slice, torch.Tensor]]

    def put(self, place: int, factors: Factors) -> None:
        """Copies the updates of one candidate into its place, which holds zeros."""
        for name, (part, B) in self.B.items():
            if (update := factors.get(name)) is not None:
                self.A[place, part.start : part.start + update.rank] = update.A
                torch.mul(update.B, update.scaling, out=B[place, :, : update.rank])

    def to(self, device: torch.device) -> "StackedFactors":
        """Returns the same on a device."""
        return StackedFactors(self.A.to(device), {name: (part, B.to(device)) for name, (part, B) in self.B.items()})


@dataclass
class Tile:
    """
    Whose rows a forward pass is for: those of some neighbours in a stack, one after the other.

    Args:
        start (`int`, *optional*, defaults to `0`): The first candidate.
        stop (`int`, *optional*, defaults to `1`): The one after the last.
        rows (`int`, *optional*): Rows of the batch, all candidates' together; None if the batch is one candidate's.
        tokens (`int`, *optional*): Its tokens, with the padding.
    """

    start: int = 0
    stop: int = 1
    rows: int | None = None
    tokens: int | None = None

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """
        Returns what a layer is given, or gives, by candidate, of shape (candidates, positions, features).

        Raises:
            NotTiledError: It is not the whole batch: experts for example are given a choice of the tokens.
        """
        expected = self.tokens if x.ndim == 2 else self.rows
        if self.rows is not None and len(x) != expected:
            raise NotTiledError(f"A layer was given a tensor of shape {tuple(x.shape)}, expected {expected} rows.")
        return x.reshape(self.stop - self.start, -1, x.shape[-1])


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

    Raises:
        BypassedError: In no forward pass inside, a layer was called by the module that holds it.
    """
    with applied_together(model, [_alone(factors, names) for names in _same_input([factors])]):
        yield


@contextmanager
def applied_together(model: nn.Module, stacked: Sequence[StackedFactors]) -> Iterator[Tile]:
    """
    Context in which the model computes the same for several candidates, each on its own rows of a batch.

    Args:
        model (`torch.nn.Module`):
            Any model, wrapped or not.
        stacked (`Sequence[StackedFactors]`):
            From [`empty_stack`], filled.

    Yields:
        `Tile`: Says which candidates the next forward pass is for; to be set before it.

    Raises:
        BypassedError: In no forward pass inside, a layer was called by the module that holds it.
    """
    layers, tile = linear_layers(model) if stacked else {}, Tile()
    layers = {name: layers[name] for factors in stacked for name in factors.B}
    with ExitStack() as hooks, _none_bypassed(model, layers):
        for factors in stacked:
            shared = _SharedInput({layers[name]: part for name, part in factors.B.items()}, factors.A, tile)
            for name in factors.B:
                hooks.enter_context(layers[name].register_forward_hook(shared.add))
        yield tile


@contextmanager
def _none_bypassed(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """
    Context that raises for layers that were bypassed: the module that holds them ran, and neither they nor others of
    their list did.

    An expert without tokens, a tower without images and a dropped block do not run themselves, so they are none; nor
    is a layer outside the repeated blocks, such as an image projector, unless it is the head.
    """
    groups, ran = _by_holder(model, layers), set()
    with ExitStack() as hooks:
        for holder in {holder for holder, _ in groups}:
            hooks.enter_context(holder.register_forward_pre_hook(lambda module, args: ran.add(module)))
        for layer in layers.values():
            hooks.enter_context(layer.register_forward_hook(lambda module, args, output: ran.add(module)))
        yield
    missed = [names for (holder, _), names in groups.items() if holder in ran]
    bypassed = [name for names in missed if not any(layers[name] in ran for name in names) for name in names]
    if bypassed:
        shown = ", ".join(bypassed[:3]) + (", ..." if len(bypassed) > 3 else "")
        raise BypassedError(
            f"The forward of {len(bypassed)} of the {len(layers)} layers that a candidate changes was never called "
            f"({shown}), though that of the module around them was: something multiplies by their weights itself, as "
            "fused LoRA kernels do. A candidate cannot be tried there, expected layers that are called. Switch the "
            "kernels off (axolotl: lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel; Unsloth: load the model with "
            "transformers), or train without the mashup."
        )


def _by_holder(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[tuple[nn.Module, str], list[str]]:
    """Returns the names of layers by the module that calls them and by their name in it, without places in lists."""
    modules = {clean_name(name): module for name, module in extract_model_from_parallel(model).named_modules()}
    head = output_head(model)
    heads = (head, head.get_base_layer() if hasattr(head, "get_base_layer") else head)
    groups: dict[tuple[nn.Module, str], list[str]] = {}
    for name, layer in layers.items():
        holder, _, within = name.rpartition(".")
        while holder and isinstance(modules.get(holder), nn.ModuleList | nn.ModuleDict):
            holder, _, listed = holder.rpartition(".")
            within = f"{listed}.*"
        if holder in modules and (layer in heads or re.search(r"\b\d+\b", holder)):
            groups.setdefault((modules[holder], within), []).append(name)
    return groups


def empty_stack(candidates: Sequence[Mapping[str, ModuleShape | LoraFactors]]) -> list[StackedFactors]:
    """
    Returns zeros in float32 in which the updates of candidates have their places, see [`StackedFactors.put`].

    Args:
        candidates (`Sequence` of mappings):
            Shapes of their updates by the name of the layer.
    """
    stacked = []
    for names in _same_input(candidates):
        found = [[shapes[name] for shapes in candidates if name in shapes] for name in names]
        parts = _parts([max(shape.rank for shape in shapes) for shapes in found])
        sizes = [(shapes[0].out_features, part.stop - part.start) for shapes, part in zip(found, parts, strict=True)]
        Bs = [torch.zeros(len(candidates), *size) for size in sizes]
        A = torch.zeros(len(candidates), parts[-1].stop, found[0][0].in_features)
        stacked.append(StackedFactors(A, dict(zip(names, zip(parts, Bs, strict=True), strict=True))))
    return stacked


def _alone(factors: Factors, names: list[str]) -> StackedFactors:
    # Not copied into zeros: gradients flow back to the factors.
    updates = [factors[name] for name in names]
    parts = _parts([update.rank for update in updates])
    Bs = [(update.scaling * update.B)[None] for update in updates]
    A = torch.cat([update.A for update in updates]) if len(updates) > 1 else updates[0].A
    return StackedFactors(A[None], dict(zip(names, zip(parts, Bs, strict=True), strict=True)))


def _same_input(candidates: Sequence[Mapping[str, ModuleShape | LoraFactors]]) -> list[list[str]]:
    groups: dict[tuple, dict[str, None]] = {}
    for name, update in (item for updates in candidates for item in updates.items()):
        block, _, layer = name.rpartition(".")
        kind = next((kind for kind in _SAME_INPUT if layer in kind), layer)
        groups.setdefault((block, kind, update.in_features), {})[name] = None
    return [list(names) for names in groups.values()]


def _parts(ranks: Iterable[int]) -> list[slice]:
    ends = torch.tensor([0, *ranks]).cumsum(0).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


class _SharedInput:
    """The updates of layers that are given the same input, which is multiplied by A once."""

    def __init__(self, parts: Mapping[nn.Module, tuple[slice, torch.Tensor]], A: torch.Tensor, tile: Tile) -> None:
        device = next(next(iter(parts)).parameters()).device
        self.A, self.tile = A.to(device), tile
        self.parts = {layer: (part, B.to(device)) for layer, (part, B) in parts.items()}
        self.seen: tuple[weakref.ref, int, slice] | None = None
        self.product: torch.Tensor | None = None

    def add(self, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        part, B = self.parts[layer]
        candidates = slice(self.tile.start, self.tile.stop)
        return self._plus(output, self._product(args[0], candidates)[..., part], B[candidates].mT)

    def _product(self, x: torch.Tensor, candidates: slice) -> torch.Tensor:
        # The version tells whether the same tensor holds other numbers by now; an inference tensor has none.
        state = (0 if x.is_inference() else x._version, candidates)
        if self.seen is None or self.seen[0]() is not x or self.seen[1:] != state:
            self.product = torch.bmm(self.tile.split(x).to(self.A), self.A[candidates].mT)
            self.seen = (weakref.ref(x), *state) if len(self.parts) > 1 else None
        return self.product

    def _plus(self, output: torch.Tensor, product: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return (output + torch.bmm(product, B).view_as(output)).to(output.dtype)
        if output.is_contiguous() and output.dtype == product.dtype == B.dtype:
            self.tile.split(output).baddbmm_(product, B)
            return output
        return output.add_(torch.bmm(product, B).view_as(output))
