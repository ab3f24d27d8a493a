"""Low-rank updates added to the layers of a live model by forward hooks, so that the model itself is left alone."""

import itertools
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn import functional as F

from ..errors import BypassedError
from ..lowrank import Factors, LoraFactors
from ..model import clean_name, expert_parameters, linear_layers, output_head, replaced, whole_parameters
from .experts import experts_changed
from .fitting import Holder, energy


# Layers of one block that most architectures give the same input. Where one does not, the result is the same.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


@contextmanager
def applied(model: nn.Module, factors: Factors) -> Iterator[None]:
    """
    Context in which the model, wrapped or not, computes y + s·(x Aᵀ) Bᵀ in the layers that have an update.

    Experts that are parts of one parameter get theirs while their module runs, and what was trained whole takes the
    place of the base model's. Raises a `BypassedError` on exit if a layer's forward was not called though that of the
    module around it was; where that is noted, see [`note_bypassed`], the adapter that is trained holds its update.
    """
    if not factors:
        yield
        return
    structure = _STRUCTURES.get(model) or _Structure(model)
    bypassed = {name: update for name, update in factors.items() if name in structure.bypassed}
    # With the adapter on, the base model's are not what is computed with.
    bypassed |= {name: factors[name] for name in structure.wholes.keys() & factors.keys() if bypassed}
    reached = {name: update for name, update in factors.items() if name not in bypassed}
    with _held(structure, bypassed) if bypassed else nullcontext(), _hooked(structure, reached):
        yield


def _held(structure: "_Structure", factors: Factors) -> AbstractContextManager[None]:
    if structure.holder.adapter is None:
        raise BypassedError(
            f"Fused kernels bypass {len(factors)} layers that a candidate changes, such as {next(iter(factors))}: it "
            "can be tried there in the factors of a LoRA adapter that is trained, and none is. Switch the kernels off "
            "(axolotl: lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel; Unsloth: load the model with transformers)"
            ", train a LoRA adapter, or train without the mashup."
        )
    return structure.holder.held(factors)


@contextmanager
def _hooked(structure: "_Structure", factors: Factors) -> Iterator[None]:
    layers = {name: structure.layers[name] for name in factors if name in structure.layers}
    wholes = {name: factors[name] for name in factors if name in structure.wholes}
    others = {name: factors[name] for name in factors if name not in layers and name not in wholes}
    with ExitStack() as hooks, _none_bypassed(structure, layers), replaced(structure.wholes, wholes):
        for experts in experts_changed(structure.experts, others):
            hooks.enter_context(experts.module.register_forward_pre_hook(experts.change))
            hooks.enter_context(experts.module.register_forward_hook(experts.restore, always_call=True))
        for name, layer in layers.items():
            if factors[name].dense:
                hooks.enter_context(layer.register_forward_hook(partial(_add_dense, factors[name])))
        for names in _same_input({name: factors[name] for name in layers if not factors[name].dense}):
            shared = _SharedInput([layers[name] for name in names], [factors[name] for name in names])
            for name in names:
                hooks.enter_context(layers[name].register_forward_hook(shared.add))
        yield


class _Structure:
    """The modules of a model, and the layers that are known to be called, or to be bypassed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = linear_layers(model)
        self.experts, self.wholes = expert_parameters(model), whole_parameters(model)
        self.bypassed: set[str] = set()
        modules = extract_model_from_parallel(model).named_modules()
        self.modules = {clean_name(name): module for name, module in modules}
        head = output_head(model)
        self.heads = (head, head.get_base_layer() if hasattr(head, "get_base_layer") else head)
        self.called: set[nn.Module] = set()

    @cached_property
    def holder(self) -> Holder:
        return Holder(self.model)


_STRUCTURES: dict[nn.Module, _Structure] = {}


@contextmanager
def structure_kept(model: nn.Module) -> Iterator[None]:
    """Context in which a model's modules stay what they are: they are looked up, and tried for a bypass, once."""
    if model in _STRUCTURES:
        yield
        return
    _STRUCTURES[model] = _Structure(model)
    try:
        yield
    finally:
        del _STRUCTURES[model]


def note_bypassed(model: nn.Module, layers: Iterable[str]) -> None:
    """Notes layers that hooks do not reach, for as long as the model's [`structure_kept`]."""
    _STRUCTURES[model].bypassed.update(layers)


def bypassed_layers(model: nn.Module) -> frozenset[str]:
    """Returns the layers that were noted as bypassed."""
    structure = _STRUCTURES.get(model)
    return frozenset() if structure is None else frozenset(structure.bypassed)


def bypass_warnings(model: nn.Module, factors: Factors) -> tuple[str, ...]:
    """Returns what is lost of an update where layers are bypassed, if anything is."""
    bypassed = {name: factors[name] for name in bypassed_layers(model) & factors.keys()}
    # One that was never trained has no energy.
    share = _STRUCTURES[model].holder.lost(bypassed) / (energy(factors) or 1.0) if bypassed else 0.0
    if share <= 1e-6:
        return ()
    return (
        f"fused kernels bypass {len(bypassed)} of its {len(factors)} layers, so it was scored in the factors of the "
        f"trainee, whose layers and ranks keep {1 - share:.1%} of its update's squared norm",
    )


@contextmanager
def _none_bypassed(structure: _Structure, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """
    Context that raises for bypassed layers: the module that holds them ran, and no layer of their list did.

    An expert without tokens, a tower without images and a dropped block do not run themselves, so they do not count.
    """
    if structure.called.issuperset(layers.values()):
        yield
        return
    groups, ran = _by_holder(structure, layers), set()
    with ExitStack() as hooks:
        for holder in {holder for holder, _ in groups}:
            hooks.enter_context(holder.register_forward_pre_hook(lambda module, args: ran.add(module)))
        for layer in layers.values():
            hooks.enter_context(layer.register_forward_hook(lambda module, args, output: ran.add(module)))
        yield
    structure.called.update(ran.intersection(layers.values()))
    ran |= structure.called
    missed = [names for (holder, _), names in groups.items() if holder in ran]
    bypassed = [name for names in missed if not any(layers[name] in ran for name in names) for name in names]
    if bypassed:
        shown = ", ".join(bypassed[:3]) + (", ..." if len(bypassed) > 3 else "")
        raise BypassedError(
            f"The forward of {len(bypassed)} of the {len(layers)} layers that a candidate changes was never called "
            f"({shown}), though that of the module around them was: something multiplies by their weights itself, as "
            "fused LoRA kernels do.",
            frozenset(bypassed),
        )


def _by_holder(structure: _Structure, layers: Mapping[str, nn.Module]) -> dict[tuple[nn.Module, str], list[str]]:
    """Returns the names of layers in repeated blocks, and of the head, by the module and its attribute or list."""
    modules = structure.modules
    groups: dict[tuple[nn.Module, str], list[str]] = {}
    for name, layer in layers.items():
        holder, _, within = name.rpartition(".")
        while holder and isinstance(modules.get(holder), nn.ModuleList | nn.ModuleDict):
            holder, _, listed = holder.rpartition(".")
            within = f"{listed}.*"
        if holder in modules and (layer in structure.heads or re.search(r"\b\d+\b", holder)):
            groups.setdefault((modules[holder], within), []).append(name)
    return groups


def _same_input(factors: Factors) -> list[list[str]]:
    """Returns the names of the layers in groups that are probably given the same input."""
    groups: dict[tuple, list[str]] = {}
    for name, update in factors.items():
        block, _, layer = name.rpartition(".")
        kind = next((kind for kind in _SAME_INPUT if layer in kind), layer)
        groups.setdefault((block, kind, update.in_features), []).append(name)
    return list(groups.values())


def _add_dense(update: LoraFactors, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Adds an update that is computed for this call and let go of again."""
    x, delta = args[0], update.delta().to(output.device)
    if isinstance(layer, nn.Embedding):
        return (output + _embed_scale(layer) * F.embedding(x, delta.T)).to(output.dtype)
    return (output + F.linear(x.to(delta.dtype), delta)).to(output.dtype)


def _embed_scale(layer: nn.Module) -> float | torch.Tensor:
    """Returns the factor that the embeddings of some models, such as Gemma's, are multiplied by."""
    return getattr(layer, "embed_scale", 1.0)


class _SharedInput:
    """The updates of layers that are given the same input, which is multiplied by A once, in A's type as in peft."""

    def __init__(self, layers: Sequence[nn.Module], updates: Sequence[LoraFactors]) -> None:
        # Quantized by GPTQ or AWQ, a layer has buffers alone.
        held = itertools.chain(layers[0].parameters(), layers[0].buffers())
        device = next(held, updates[0].A).device
        As = [update.A.to(device) for update in updates]
        self.A = torch.cat(As) if len(As) > 1 else As[0]
        scales = [update.scaling * _embed_scale(layer) for layer, update in zip(layers, updates, strict=True)]
        Bs = [(scale * update.B.to(device)).T for scale, update in zip(scales, updates, strict=True)]
        self.B = dict(zip(layers, Bs, strict=True))
        self.ranks = [update.rank for update in updates]
        self.seen: tuple[weakref.ref, int] | None = None
        self.products: dict[nn.Module, torch.Tensor] = {}

    def add(self, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        product, B = self._product(layer, args[0]), self.B[layer]
        if torch.is_grad_enabled():
            return (output + (product @ B).view_as(output)).to(output.dtype)
        # In place, so that no activation is copied.
        if output.is_contiguous() and output.dtype == product.dtype == B.dtype:
            output.view(-1, output.shape[-1]).addmm_(product, B)
            return output
        return output.add_((product @ B).view_as(output))

    def _product(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # The version tells whether the same tensor holds other numbers by now; an inference tensor has none.
        version = 0 if x.is_inference() else x._version
        if self.seen is None or self.seen[0]() is not x or self.seen[1] != version:
            embeds = isinstance(layer, nn.Embedding)
            flat = x.reshape(-1) if embeds else x.reshape(-1, x.shape[-1]).to(self.A)
            product = F.embedding(flat, self.A.T) if embeds else torch.mm(flat, self.A.T)
            self.products = dict(zip(self.B, product.split(self.ranks, 1), strict=True))
            self.seen = (weakref.ref(x), version) if len(self.B) > 1 else None
        return self.products[layer]
