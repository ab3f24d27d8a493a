"""The modules of a LoRA adapter: pairs of tensors in its file, and the layers of the model that they fit."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import AdapterError
from .adapter_config import CONFIG_NAME, AdapterConfig
from .files import quote
from .header import TensorInfo
from .variants import ENDS, Form, find_form


_KEY_PREFIX = "base_model.model."
# Names of the modules that hold a language model, which differ with and without a vision tower.
_TEXT_MODEL = {"model", "language_model", "text_model"}
# The end of the name of a base model's weight, of which peft stores copies for embeddings and heads.
_WHOLE = ".weight"
# The end of the name of a bias that LoRA trains after B.
_LORA_BIAS = ".lora_B.bias"
# Work on a name grows with the square of its length, and a header has room for one of 10 MB.
_MAX_KEY = 1024
# peft, which tries a regular expression for each, would take minutes for so many; comparing ends is quicker.
_MAX_LOOKUPS = 1_000_000
_FEATURE_KEYS = {
    ".bias": "trained biases are neither `bias` nor `lora_bias` in its configuration",
    "modules_to_save": "modules trained besides the adapter are not supported",
    "trainable_tokens": "embeddings trained besides the adapter are not supported",
    "hada_t": "only linear layers are supported, and this is a convolution",
    "lokr_t": "only linear layers are supported, and this is a convolution",
}
_NO_NAMES = ("lora_", *_FEATURE_KEYS)


@dataclass(frozen=True)
class Stack:
    """
    Experts that share factors: `parameters` of their module that `target_parameters` names, the `depth` at which they
    are wrapped, and, with the model known, which `expert` of how many it is.
    """

    parameters: tuple[str, ...] = ()
    depth: int = 0
    expert: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ModuleShape:
    """One adapted layer, or parameter, or expert of a `stack`, with the keys of its parts in the weights file."""

    rank: int
    in_features: int
    out_features: int
    scaling: float
    keys: Mapping[str, str]
    form: Form = field(repr=False)
    stack: Stack | None = None


def adapter_modules(
    config: AdapterConfig, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, ModuleShape], dict[str, str]]:
    """Groups tensors by their modules, and gives the keys of copies of base weights; raises `AdapterError`."""
    if (count := len(config.modules_to_save)) * "".join(tensors).count(".") > 10 * _MAX_LOOKUPS:
        raise AdapterError(f"`modules_to_save` has {count:,} entries for {len(tensors):,} tensors, more than it needs")
    # Where adapters are added by other means than peft's own model, the names of all tensors lack the prefix.
    prefix = _KEY_PREFIX if any(key.startswith(_KEY_PREFIX) for key in tensors) else ""
    keys: dict[str, dict[str, str]] = {}
    copies: dict[str, str] = {}
    for key in tensors:
        name, part = _place(key, prefix, config)
        held, place = (copies, name) if part == _WHOLE else (keys.setdefault(name, {}), part)
        if held.setdefault(place, key) != key:
            raise AdapterError(f"{quote(key)} and {quote(held[place])} are one tensor under two names")
    if not keys:
        raise AdapterError("the weights file holds no tensors, expected pairs of lora_A.weight and lora_B.weight")
    for pattern in ("rank_pattern", "alpha_pattern", "target_parameters"):
        if (count := len(getattr(config, pattern))) * len(keys) > _MAX_LOOKUPS:
            raise AdapterError(f"`{pattern}` has {count:,} entries for {len(keys):,} modules, far more than it needs")
    modules = {name: _module_shape(name, own, config, tensors) for name, own in keys.items() if _is_used(own, tensors)}
    if config.modules_to_save and not any(shape.form.whole for shape in modules.values()):
        named = quote(", ".join(config.modules_to_save))
        raise AdapterError(f"`modules_to_save` names {named}, expected tensors of these modules")
    if all(shape.form.whole for shape in modules.values()):
        raise AdapterError("all its ranks are zero: it changes nothing")
    if config.target_parameters and not any(shape.stack for shape in modules.values()):
        found = quote(", ".join(config.target_parameters))
        raise AdapterError(f"`target_parameters` names {found}, expected parameters of experts that have tensors")
    return modules, copies


def contradictions(config: AdapterConfig, modules: Mapping[str, ModuleShape]) -> tuple[str, ...]:
    """Returns warnings where `target_modules` names other modules than those that have tensors."""
    targets = config.target_modules
    if not isinstance(targets, tuple) or not targets:
        return ()
    named = set(targets)
    layers = [name for name, shape in modules.items() if shape.stack is None and not shape.form.whole]
    found_by = {name: named.intersection(_ends(name)) for name in layers}
    extra = [name for name, ends in found_by.items() if not ends]
    missing = sorted(named.difference(*found_by.values()))
    found = [f"{len(extra)} modules have tensors, such as {quote(extra[0])}, that it does not name"] if extra else []
    found += [f"{quote(', '.join(missing))} has no tensors"] if missing else []
    return (f"`target_modules` contradicts the weights: {' and '.join(found)}",) if found else ()


def _ends(name: str) -> Iterator[str]:
    """Yields a name and what is left of it after each dot."""
    while name:
        yield name
        name = name.partition(".")[2]


def find_renaming(names: Sequence[str], layers: Collection[str]) -> tuple[str, str]:
    """
    Returns the one change of a prefix, what is removed and what is added, that makes these the model's names.

    It is due to wrappers such as sentence-transformers, or to a vision tower; none or several raise `AdapterError`.
    """
    if all(name in layers for name in names):
        return "", ""
    fits = [change for change in _renamings(names, layers) if all(renamed(name, change) in layers for name in names)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        first, second = (renamed(names[0], change) for change in fits[:2])
        raise AdapterError(f"{quote(names[0])} could be {quote(first)} or {quote(second)} of this model")
    unknown = [name for name in names if name not in layers]
    raise AdapterError(
        f"trained on another base model: {len(unknown)} of its {len(names)} modules are no linear layers of this "
        f"one, the first is {quote(unknown[0])}, expected names such as {quote(next(iter(layers), 'none'))}"
    )


def renamed(name: str, change: tuple[str, str]) -> str:
    """Returns a module's name after a change of its prefix."""
    removed, added = change
    return added + name.removeprefix(removed)


def _renamings(names: Sequence[str], layers: Iterable[str]) -> list[tuple[str, str]]:
    first, found = names[0].split("."), dict[tuple[str, str], None]()
    for layer in layers:
        parts = layer.split(".")
        equal = [a == b for a, b in zip(reversed(first), reversed(parts), strict=False)]
        shared = [*equal, False].index(False)
        removed, added = (own[: len(own) - shared] for own in (first, parts))
        change = ".".join([*removed, ""]), ".".join([*added, ""])
        plain = not (removed and added) or _TEXT_MODEL.issuperset(removed + added)
        if shared and plain and all(name.startswith(change[0]) for name in names):
            found[change] = None
    return list(found)


def _place(key: str, prefix: str, config: AdapterConfig) -> tuple[str, str]:
    """Returns the module or the parameter that a tensor belongs to, and which part of its update it is."""
    if len(key) > _MAX_KEY:
        raise AdapterError(
            f"the tensor {quote(key)} has a name of {len(key):,} characters, expected up to {_MAX_KEY:,}"
        )
    ends, name = ENDS[config.peft_type], key.removeprefix(prefix)
    for end, part in ends.items() if key.startswith(prefix) else ():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}"), part
    if config.lora_bias and name.endswith(_LORA_BIAS):
        return name.removesuffix(_LORA_BIAS) + ".bias", _LORA_BIAS[1:]
    if key.startswith(prefix) and not any(part in key.removesuffix(".bias") for part in _NO_NAMES):
        name = name.replace(".base_layer", "")
        if _is_whole(name, config):
            return name, "whole"
        if name.endswith(_WHOLE):
            return name.removesuffix(_WHOLE), _WHOLE
    reason = next((why for part, why in _FEATURE_KEYS.items() if part in key), "it is no LoRA factor")
    raise AdapterError(f"unexpected tensor {quote(key)}: {reason}; expected {prefix}<module>.{next(iter(ends))}")


def _is_whole(name: str, config: AdapterConfig) -> bool:
    """Whether the configuration says that a parameter was trained whole; peft compares the ends of modules' names."""
    parts = name.split(".")
    modules = (".".join(parts[:length]) for length in range(1, len(parts)))
    is_bias = config.trains_biases and parts[-1] == "bias"
    return is_bias or any(module.endswith(config.modules_to_save) for module in modules)


def _is_used(keys: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether AdaLoRA left a module a rank above zero."""
    return "E" not in keys or tensors[keys["E"]].shape[:1] != (0,)


def _module_shape(
    name: str, keys: Mapping[str, str], config: AdapterConfig, tensors: Mapping[str, TensorInfo]
) -> ModuleShape:
    try:
        form = find_form(config.peft_type, config.use_dora, keys)
        parts = {part: torch.empty(tensors[key].shape, device="meta") for part, key in keys.items()}
        factors = form.factors(parts)
    except (AdapterError, RuntimeError, IndexError, TypeError) as error:
        raise AdapterError(f"the tensors of {quote(name)} make no update: {quote(error)}") from error
    stack = _stack(name, config)
    if stack and form.of_weight:
        raise AdapterError(f"{quote(name)} has the magnitudes of DoRA, expected none for experts in one parameter")
    layer = name.removesuffix(".bias")
    rank = config.rank_of(layer)
    if stack is None and not form.whole:
        _check_rank(name, rank, parts, config)
    scaling = config.scaling_of(layer, rank)
    return ModuleShape(factors.rank, factors.in_features, factors.out_features, scaling, keys, form, stack)


def _stack(name: str, config: AdapterConfig) -> Stack | None:
    module, depth = name.replace(".base_layer", ""), name.count(".base_layer")
    targets = [target.rpartition(".") for target in config.target_parameters]
    found = tuple(leaf for holder, _, leaf in targets if f".{module}".endswith(f".{holder}" if holder else ""))
    # Elsewhere in the name, it would make a second name of the same factors.
    whole = name == module + depth * ".base_layer" and module.endswith("experts")
    return Stack(found, depth) if found and whole else None


def _check_rank(name: str, rank: int, parts: Mapping[str, torch.Tensor], config: AdapterConfig) -> None:
    # Every name of a factor that has the rank as its number of rows ends in A or b; AdaLoRA drops rows.
    for part in parts:
        found = parts[part].shape[0]
        if part[-1] in "Ab" and found != rank and not (config.peft_type == "ADALORA" and found < rank):
            raise AdapterError(f"{quote(name)} has rank {found}, but {CONFIG_NAME} says {rank}")
