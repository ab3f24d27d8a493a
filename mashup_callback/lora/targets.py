"""The LoRA layers that are trained: found in the live model, and checked that a merge can be written into them."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from ..lowrank import Factors, product_norm
from ..model import WholeParameter, adapter_host, clean_name, is_sharded, local_part, read_parameters, whole_parameters
from .places import LinearPlace, Target, find_place


# Initializations that move part of the weights into the adapter, so that the base is no longer the candidates' base.
ALTERS_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
FREEZES_A_FACTOR = ("mica",)
# B·A counts as zero below this share of |A|·|B|: orthogonal initializations reach zero only up to the rounding of the
# base model's data type, 0.002 in bfloat16. What is trained from B = 0 is beyond 0.1 at once.
_ZERO = 5e-3
# By name in the model, cleaned of what wrappers add; parameters of one module may be wrapped one inside the other.
_Layers = Sequence[tuple[str, LoraLayer]]


@dataclass(frozen=True, eq=False)
class TrainedAdapter:
    """The adapter that is trained as it was before a write: its name, layers, `peft.LoraConfig` and parameters."""

    name: str
    targets: Mapping[str, Target]
    config: Any
    before: Mapping[str, torch.Tensor]
    places: Sequence[LinearPlace]
    wholes: Mapping[str, WholeParameter]

    @property
    def ranks(self) -> dict[str, int]:
        wholes = {name: min(whole.matrix.shape) for name, whole in self.wholes.items()}
        return wholes | {name: target.rank for name, target in self.targets.items()}

    def values(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Returns the values with which the adapter computes updates of all its layers, by parameter."""
        values = [place.values(factors, self.before) for place in self.places]
        # If any of them then all, as a saved adapter has all of them; one that was trained before is made fresh again.
        every = not self.wholes.keys().isdisjoint(factors)
        for name, whole in self.wholes.items():
            if name in factors:
                values.append({whole.name: whole.value(factors[name])})
            elif every or self.before[whole.name] is not whole.base:
                values.append({whole.name: whole.fresh})
        return {name: value for part in values for name, value in part.items()}

    def is_plain(self, factors: Factors) -> bool:
        """Whether updates are of linear layers only."""
        return all(type(place) is LinearPlace for place in self.places) and self.wholes.keys().isdisjoint(factors)

    def saved(self, factors: Factors, base_model: str | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns the configuration and the tensors that peft saves when the adapter computes updates."""
        held = self.values(factors)
        # What a file holds is not initialized.
        ours = {"base_model_name_or_path": base_model, "init_lora_weights": True, "inference_mode": True}
        # Other modules that are trained start as the base model's where there is no update of them.
        saved = any(whole.added is None and whole.name in held for whole in self.wholes.values())
        ours |= {} if saved else {"modules_to_save": None}
        fields = self.config.to_dict() | ours
        fields.pop("runtime_config", None)
        config = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
        values = {self._saved_name(name): value for name, value in held.items()}
        tensors = {f"base_model.model.{name}": value.cpu().contiguous() for name, value in values.items()}
        return config, tensors

    def _saved_name(self, parameter: str) -> str:
        layer = parameter.removesuffix(".bias")
        name = f"{layer}.base_layer.bias" if layer in self.targets else parameter
        # A name of a module may begin with that of the adapter.
        name = re.sub(rf"(\.(?:lora_\w+|modules_to_save))\.{re.escape(self.name)}(?=\.|$)", r"\1", name)
        return name.replace(".modules_to_save", "").replace("_vector.weight", "_vector")


def find_adapter(model: nn.Module, overwrite: bool = False) -> TrainedAdapter | None:
    """Returns the adapter that is trained, None without one; raises `ValueError` if a merge cannot be its start."""
    modules = extract_model_from_parallel(model).named_modules()
    layers = [(name, layer) for name, layer in modules if isinstance(layer, LoraLayer)]
    adapter = _trained_name(layers)
    if adapter is None:
        return None
    config = adapter_host(model).peft_config[adapter]
    _refuse_initialization(config)
    places = _places(layers, adapter)
    _refuse_sharded(model, places)
    wholes = {name: whole for name, whole in whole_parameters(model).items() if whole.trained.requires_grad}
    before = read_parameters(model, [name for place in places for name in place.parameters])
    before |= {whole.name: whole.held() for whole in wholes.values()}
    targets = {target.name: target for place in places for target in place.targets(before)}
    if not overwrite:
        _refuse_trained(targets.values())
    shared = _shared(places, adapter)
    _refuse_kept(model, adapter, [targets.pop(place.name) for place in shared])
    places = [place for place in places if place not in shared]
    return TrainedAdapter(adapter, targets, config, before, places, wholes)


def _shared(places: Sequence[LinearPlace], adapter: str) -> list[LinearPlace]:
    """Returns what shares its factors with another layer (`ensure_weight_tying`): no update changes it alone."""
    # Of other ranks' shards and of offloaded tensors nothing is here.
    held = {place: [local_part(p) for p in _parameters(place.layer, adapter) if p.numel()] for place in places}
    found = {place: {part.data_ptr() for part in parts} - {0} for place, parts in held.items()}
    times = Counter(itertools.chain.from_iterable(found.values()))
    return [place for place, pointers in found.items() if any(times[pointer] > 1 for pointer in pointers)]


def _refuse_kept(model: nn.Module, adapter: str, shared: Sequence[Target]) -> None:
    """Refuses an adapter of which a mashup would leave something trained that is none of a candidate's."""
    modules = extract_model_from_parallel(model).named_modules()
    tokens = {
        clean_name(f"{name}.trainable_tokens_delta.{adapter}"): module.trainable_tokens_original[adapter]
        for name, module in modules
        if isinstance(module, TrainableTokensLayer)
        and adapter in module.trainable_tokens_original
        and module.tied_adapter is None
    }
    held = read_parameters(model, tokens) if tokens else {}
    # One of them may be kept in fewer bits.
    kept = [
        f"the tokens in {name}"
        for name, rows in tokens.items()
        if not (torch.equal(held[name].to(rows), rows) or torch.equal(rows.to(held[name]), held[name]))
    ]
    kept += [f"the shared factors of {name}" for name in _trained(shared)]
    if kept:
        raise ValueError(
            f"The adapter to be trained is not fresh: {kept[0]} were trained, and a mashup cannot replace them "
            "(`trainable_token_indices`, `ensure_weight_tying`). Start from a new adapter."
        )


def _trained_name(layers: _Layers) -> str | None:
    """Returns the adapter that is trained; raises `ValueError` where others are trained or active besides it."""
    active = sorted({name for _, layer in layers for name in layer.active_adapters if _parameters(layer, name)})
    names = [name for name in active if any(p.requires_grad for _, layer in layers for p in _parameters(layer, name))]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(
            f"The model trains {len(names)} adapters at once ({', '.join(names)}), expected one. Activate and "
            "unfreeze only the adapter that the mashup is for, with `model.set_adapter(name)`."
        )
    merged = sorted({name for _, layer in layers for name in layer.merged_adapters})
    others = [name for name in active if name not in names] or merged
    if others:
        raise ValueError(
            f"The adapter {others[0]!r} {'is merged' if merged else 'is active'} besides {names[0]!r}, which is "
            "trained: candidates were made for the base model without it. Expected one active adapter. Call "
            "`model.set_adapter(name)`, or make the other one part of the model with `merge_and_unload`."
        )
    return names[0]


def _parameters(layer: LoraLayer, adapter: str) -> list[nn.Parameter]:
    """Returns the factors of an adapter in a layer, in modules or not."""
    held = (getattr(layer, kind, {}) for kind in layer.adapter_layer_names)
    owned = [kind[adapter] for kind in held if adapter in kind]
    return [parameter for one in owned for parameter in (one.parameters() if isinstance(one, nn.Module) else [one])]


def _refuse_initialization(config: Any) -> None:
    kind = str(config.init_lora_weights).lower()
    if kind.startswith(ALTERS_BASE):
        problem = "alters the base weights, so adapters of the original base no longer fit it"
    elif kind.startswith(FREEZES_A_FACTOR):
        problem = "freezes a factor that a mashup must write"
    elif config.peft_type != "LORA":
        raise ValueError(
            f"The adapter that is trained is of the type {getattr(config.peft_type, 'value', config.peft_type)}, "
            "expected LORA: others do not hold a merge as B·A. Train a `LoraConfig`."
        )
    else:
        return
    raise ValueError(
        f"`init_lora_weights={config.init_lora_weights!r}` {problem}. Use the default `init_lora_weights=True`, or "
        "train without the mashup."
    )


def _places(layers: _Layers, adapter: str) -> list[LinearPlace]:
    names: set[str] = set()
    found = []
    for name, layer in layers:
        # What the user froze is left alone, the adapter of a whole layer too.
        if not any(parameter.requires_grad for parameter in _parameters(layer, adapter)):
            continue
        if clean_name(name) in names and not isinstance(layer, ParamWrapper):
            raise ValueError(
                f"Layer {clean_name(name)} has LoRA layers one inside the other, expected one. Add several adapters "
                "to one `PeftModel` with `model.add_adapter`, or `merge_and_unload` the first one."
            )
        names.add(clean_name(name))
        place = find_place(clean_name(name), clean_name(f"{name}.lora_").removesuffix(".lora_"), layer, adapter)
        found += [] if place is None else [place]
    return found


def _refuse_sharded(model: nn.Module, places: Sequence[LinearPlace]) -> None:
    if any(place.magnitude for place in places) and is_sharded(model):
        raise ValueError(
            "DoRA is trained on a sharded model (FSDP, ZeRO-3): its magnitudes follow from whole weights, which no "
            "process has. Use `use_dora=False`, or train without sharding."
        )


def _trained(targets: Iterable[Target]) -> list[str]:
    norms = ((target.name, product_norm(target.A, target.B), target.A.norm() * target.B.norm()) for target in targets)
    return [name for name, norm, bound in norms if not norm <= _ZERO * bound]


def _refuse_trained(targets: Iterable[Target]) -> None:
    if trained := _trained(targets):
        raise ValueError(
            f"The adapter to be trained is not fresh: B·A is not zero in {len(trained)} layers (the first is "
            f"{trained[0]}). A mashup replaces a fresh initialization. Start from a new adapter, or pass "
            "`overwrite=True` to let the mashup replace this one where the mashup is better."
        )
