"""The modules of a LoRA adapter: pairs of tensors in its file, and the layers of the model that they fit."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import AdapterError
from .adapter_config import CONFIG_NAME, AdapterConfig
from .files import quote
from .header import TensorInfo


_KEY_PREFIX = "base_model.model."
_KEY_A, _KEY_B = ".lora_A.weight", ".lora_B.weight"
# Work on a name grows with the square of its length, and a header has room for one of 10 MB.
_MAX_KEY = 1024
# peft, which tries a regular expression for each, would take minutes for so many.
_MAX_LOOKUPS = 1_000_000
_FEATURE_KEYS = {
    "lora_embedding": "adapters of embeddings are not supported",
    "lora_magnitude": "DoRA is not supported, it also rescales the base weights",
    ".bias": "trained biases are not supported",
    "modules_to_save": "modules trained besides the adapter are not supported",
    ".base_layer": "it would overwrite a weight of the base model",
}


@dataclass(frozen=True)
class ModuleShape:
    """One adapted linear layer: its sizes, the factor on B·A, and the keys of A and B in the weights file."""

    rank: int
    in_features: int
    out_features: int
    scaling: float
    key_a: str
    key_b: str


def adapter_modules(config: AdapterConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, ModuleShape]:
    """Pairs the tensors of a weights file into LoRA modules; raises `AdapterError` where they are none."""
    names = dict.fromkeys(_module_of(key) for key in tensors)
    if not names:
        raise AdapterError("the weights file holds no tensors, expected pairs of lora_A.weight and lora_B.weight")
    for field in ("rank_pattern", "alpha_pattern"):
        if (keys := len(getattr(config, field))) * len(names) > _MAX_LOOKUPS:
            raise AdapterError(f"`{field}` has {keys:,} keys for {len(names):,} modules, far more than it needs")
    return {name: _module_shape(name, config, tensors) for name in names}


def contradictions(config: AdapterConfig, modules: Iterable[str]) -> tuple[str, ...]:
    """Returns warnings where `target_modules` names other modules than those that have tensors."""
    targets = config.target_modules
    if not isinstance(targets, tuple) or not targets:
        return ()
    named = set(targets)
    found_by = {name: named.intersection(_ends(name)) for name in modules}
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


def _module_of(key: str) -> str:
    if len(key) > _MAX_KEY:
        raise AdapterError(
            f"the tensor {quote(key)} has a name of {len(key):,} characters, expected up to {_MAX_KEY:,}"
        )
    for suffix in (_KEY_A, _KEY_B):
        if key.startswith(_KEY_PREFIX) and key.endswith(suffix) and len(key) > len(_KEY_PREFIX + suffix):
            return key.removeprefix(_KEY_PREFIX).removesuffix(suffix)
    reason = next((why for part, why in _FEATURE_KEYS.items() if part in key), "it is no LoRA factor")
    raise AdapterError(
        f"unexpected tensor {quote(key)}: {reason}; expected {_KEY_PREFIX}<module>{_KEY_A} and {_KEY_B} only"
    )


def _module_shape(name: str, config: AdapterConfig, tensors: Mapping[str, TensorInfo]) -> ModuleShape:
    key_a, key_b = _KEY_PREFIX + name + _KEY_A, _KEY_PREFIX + name + _KEY_B
    a, b = (_matrix(key, tensors) for key in (key_a, key_b))
    if a[0] != b[1]:
        raise AdapterError(f"the ranks of {quote(name)} differ: lora_A has {a[0]} rows and lora_B {b[1]} columns")
    if a[0] != config.rank_of(name):
        raise AdapterError(f"{quote(name)} has rank {a[0]}, but {CONFIG_NAME} says {config.rank_of(name)}")
    return ModuleShape(a[0], a[1], b[0], config.scaling_of(name, a[0]), key_a, key_b)


def _matrix(key: str, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    if key not in tensors:
        raise AdapterError(f"tensor {quote(key)} is missing, its partner is there")
    shape = tensors[key].shape
    if len(shape) != 2 or 0 in shape:
        raise AdapterError(
            f"tensor {quote(key)} has shape {shape}, expected a matrix: only linear layers are supported"
        )
    return shape[0], shape[1]
