"""The modules of a LoRA adapter: pairs of tensors in its file, and the layers of the model that they fit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import AdapterError
from .adapter_config import CONFIG_NAME, AdapterConfig
from .files import quote
from .header import TensorInfo
from .variants import ENDS, Form, find_form


_KEY_PREFIX = "base_model.model."
# Work on a name grows with the square of its length, and a header has room for one of 10 MB.
_MAX_KEY = 1024
_FEATURE_KEYS = {
    ".bias": "trained biases are not supported",
    "modules_to_save": "modules trained besides the adapter are not supported",
    "trainable_tokens": "embeddings trained besides the adapter are not supported",
    "hada_t": "only linear layers are supported, and this is a convolution",
    "lokr_t": "only linear layers are supported, and this is a convolution",
    ".base_layer": "it would overwrite a weight of the base model",
}


@dataclass(frozen=True)
class ModuleShape:
    """One adapted layer: its sizes, the factor on the update, and the keys of its parts in the weights file."""

    rank: int
    in_features: int
    out_features: int
    scaling: float
    keys: Mapping[str, str]
    form: Form = field(repr=False)


def adapter_modules(config: AdapterConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, ModuleShape]:
    """Groups the tensors of a weights file by their modules; raises `AdapterError` where they make no update."""
    # Where adapters are added by other means than peft's own model, the names of all tensors lack the prefix.
    prefix = _KEY_PREFIX if any(key.startswith(_KEY_PREFIX) for key in tensors) else ""
    keys: dict[str, dict[str, str]] = {}
    for key in tensors:
        name, part = _place(key, prefix, config.peft_type)
        if keys.setdefault(name, {}).setdefault(part, key) != key:
            raise AdapterError(f"{quote(key)} and {quote(keys[name][part])} are one tensor under two names")
    if not keys:
        raise AdapterError("the weights file holds no tensors, expected pairs of lora_A.weight and lora_B.weight")
    modules = {name: _module_shape(name, own, config, tensors) for name, own in keys.items() if _is_used(own, tensors)}
    if not modules:
        raise AdapterError("all its ranks are zero: it changes nothing")
    return modules


def contradictions(config: AdapterConfig, modules: Iterable[str]) -> tuple[str, ...]:
    """Returns warnings where `target_modules` names other modules than those that have tensors."""
    targets = config.target_modules
    if not isinstance(targets, tuple) or not targets:
        return ()
    parts = {name: name.split(".") for name in modules}
    ends = {name: {".".join(own[i:]) for i in range(len(own))} for name, own in parts.items()}
    extra = [name for name in ends if not ends[name] & set(targets)]
    missing = sorted(set(targets).difference(*ends.values()))
    found = [f"{len(extra)} modules have tensors, such as {quote(extra[0])}, that it does not name"] if extra else []
    found += [f"{quote(', '.join(missing))} has no tensors"] if missing else []
    return (f"`target_modules` contradicts the weights: {' and '.join(found)}",) if found else ()


def match_modules(modules: Mapping[str, ModuleShape], layers: Mapping[str, object]) -> dict[str, ModuleShape]:
    """
    Returns the modules under the model's names, by the one prefix change that fits them all: none, one that is added
    or one that is removed, as wrappers such as sentence-transformers make necessary.

    Raises:
        AdapterError: If no change fits, or several do.
    """
    if all(name in layers for name in modules):
        return dict(modules)
    fits = [names for names in _renamings(list(modules), layers) if all(name in layers for name in names)]
    if len(fits) == 1:
        return dict(zip(fits[0], modules.values(), strict=True))
    if fits:
        raise AdapterError(
            f"{quote(next(iter(modules)))} could be {quote(fits[0][0])} or {quote(fits[1][0])} of this model"
        )
    unknown = [name for name in modules if name not in layers]
    raise AdapterError(
        f"trained on another base model: {len(unknown)} of its {len(modules)} modules are no linear layers of this "
        f"one, the first is {quote(unknown[0])}, expected names such as {quote(next(iter(layers), 'none'))}"
    )


def _renamings(names: list[str], layers: Iterable[str]) -> Iterable[list[str]]:
    first = names[0]
    for layer in layers:
        if layer.endswith("." + first):
            added = layer.removesuffix(first)
            yield [added + name for name in names]
        elif first.endswith("." + layer):
            removed = first.removesuffix(layer)
            if all(name.startswith(removed) for name in names):
                yield [name.removeprefix(removed) for name in names]


def _place(key: str, prefix: str, peft_type: str) -> tuple[str, str]:
    """Returns the module that a tensor belongs to, and which part of its update it is."""
    if len(key) > _MAX_KEY:
        raise AdapterError(
            f"the tensor {quote(key)} has a name of {len(key):,} characters, expected up to {_MAX_KEY:,}"
        )
    for end, part in ENDS[peft_type].items():
        name = key[len(prefix) : -len(end) - 1]
        if name and key.startswith(prefix) and key.endswith(f".{end}"):
            return name, part
    reason = next((why for part, why in _FEATURE_KEYS.items() if part in key), "it is no LoRA factor")
    raise AdapterError(f"unexpected tensor {quote(key)}: {reason}; expected {prefix}<module>.{next(iter(ENDS))}")


def _is_used(keys: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether AdaLoRA left a module a rank above zero."""
    return "E" not in keys or tensors[keys["E"]].shape[:1] != (0,)


def _module_shape(
    name: str, keys: Mapping[str, str], config: AdapterConfig, tensors: Mapping[str, TensorInfo]
) -> ModuleShape:
    form = find_form(config.peft_type, config.use_dora, keys)
    try:
        parts = {part: torch.empty(tensors[key].shape, device="meta") for part, key in keys.items()}
        factors = form.factors(parts)
    except (AdapterError, RuntimeError, IndexError) as error:
        raise AdapterError(f"the tensors of {quote(name)} make no update: {quote(error)}") from error
    rank = config.rank_of(name)
    _check_rank(name, rank, parts, config)
    scaling = config.scaling_of(name, rank)
    return ModuleShape(factors.rank, factors.in_features, factors.out_features, scaling, keys, form)


def _check_rank(name: str, rank: int, parts: Mapping[str, torch.Tensor], config: AdapterConfig) -> None:
    # Every name of a factor that has the rank as its number of rows ends in A or b; AdaLoRA drops rows.
    for part in parts:
        found = parts[part].shape[0]
        if part[-1] in "Ab" and found != rank and not (config.peft_type == "ADALORA" and found < rank):
            raise AdapterError(f"{quote(name)} has rank {found}, but {CONFIG_NAME} says {rank}")
