"""LoRA adapters on disk: reading their description, checking it against the live model, loading their factors."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..errors import AdapterError
from ..lowrank import LoraFactors
from .adapter_config import CONFIG_NAME, MAX_CONFIG_BYTES, AdapterConfig, parse_config
from .adapter_modules import ModuleShape, adapter_modules, contradictions, find_renaming, renamed
from .base import BaseModel
from .experts import expert_modules, of_expert, put_together
from .files import open_regular, quote, read_limited
from .header import FileStamp, TensorInfo, parse_header, read_header


WEIGHTS_NAME = "adapter_model.safetensors"
# Trained factors are of order one; one this large is broken or hostile. Below it, no alpha takes B·A out of float32.
MAX_ABSOLUTE = 1e4


@dataclass(frozen=True)
class Adapter:
    """
    A LoRA adapter whose description has been read and found sound: at `path`, or on the Hub where that is None.

    Its modules have the names that they have in the base model; `stamp` is the state of its weights file when it was
    read, and `copies` are the keys of weights of the base model that are stored besides.
    """

    path: Path | None
    config: AdapterConfig
    modules: Mapping[str, ModuleShape]
    dtype: str
    stamp: FileStamp = field(repr=False)
    warnings: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int:
        """Largest rank over the modules, without parameters that were trained whole."""
        return max(shape.rank for shape in self.modules.values() if not shape.form.whole)

    def refuse_special(self) -> None:
        """Raises an `AdapterError` where not all its modules are linear layers, to be written as such."""
        for name, shape in self.modules.items():
            if shape.stack or shape.form.whole or any("embedding" in key for key in shape.keys.values()):
                raise AdapterError(
                    f"it adapts {quote(name)}, an embedding or experts in one parameter or a bias, which is supported "
                    "where a LoRA adapter is trained, expected linear layers only"
                )

    def fit(self, base: BaseModel) -> "Adapter":
        """Returns it with the model's names, and a warning where it records another model; raises `AdapterError`."""
        own = put_together(self.modules, base.layers)
        change = find_renaming(*_names(own, base))
        modules: dict[str, ModuleShape] = {}
        for name, shape in own.items():
            name = renamed(name.replace(".base_layer", "") if shape.stack else name, change)
            stacked = shape.stack and expert_modules(name, shape, self.config, base.layers)
            modules |= stacked or {name: shape}
        copies = {renamed(name, change): key for name, key in self.copies.items()}
        if unknown := [key for name, key in copies.items() if name not in base.layers]:
            raise AdapterError(
                f"unexpected tensor {quote(unknown[0])}: it is no LoRA factor, and no layer of the model"
            )
        for name, shape in modules.items():
            if shape.form.whole and name not in base.wholes:
                raise AdapterError(
                    f"{quote(name)} was trained besides the adapter, which needs a LoRA run with the same "
                    "`modules_to_save`, `bias` or `lora_bias`, and a model that is not sharded"
                )
            expected = tuple((base.wholes if shape.form.whole else base.layers)[name])
            found = shape.in_features, shape.out_features
            if found != expected:
                raise AdapterError(
                    f"trained on another base model: {quote(name)} maps {found[0]} features to {found[1]}, expected "
                    f"{expected[0]} to {expected[1]}"
                )
        recorded, warnings = self.config.base_model, self.warnings
        if recorded and base.name and _short_name(recorded) != _short_name(base.name):
            warnings += (f"recorded base model {quote(recorded)} differs from {base.name}; the shapes fit",)
        return dataclasses.replace(self, modules=modules, copies=copies, warnings=warnings)


def _names(modules: Mapping[str, ModuleShape], base: BaseModel) -> tuple[list[str], Collection[str]]:
    """Returns names of an adapter's layers, and those that the model has of such."""
    names = [name for name, shape in modules.items() if shape.stack is None and not shape.form.whole]
    if names:
        return names, base.layers
    holders = dict.fromkeys(".".join(name.split(".")[:-2]) for name in base.layers if name[-1].isdigit())
    return [name.replace(".base_layer", "") for name, shape in modules.items() if shape.stack], holders


def read_adapter(path: str | os.PathLike) -> Adapter:
    """Reads the configuration of an adapter and the header of its weights, no tensor; raises `AdapterError`."""
    path = Path(path)
    config = parse_config(read_limited(path / CONFIG_NAME, MAX_CONFIG_BYTES))
    return _described(path, config, *read_header(path / WEIGHTS_NAME))


def parse_adapter(config: bytes, header: bytes, file_size: int) -> Adapter:
    """Reads an adapter on the Hub by its configuration and the first bytes of its weights; raises `AdapterError`."""
    return _described(None, parse_config(config), parse_header(header, file_size), FileStamp(file_size))


def _described(
    path: Path | None, config: AdapterConfig, tensors: Mapping[str, TensorInfo], stamp: FileStamp
) -> Adapter:
    dtype = ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in tensors.values()}))
    modules, copies = adapter_modules(config, tensors)
    return Adapter(path, config, modules, dtype, stamp, contradictions(config, modules), copies)


@torch.no_grad()
def load_factors(
    adapter: Adapter,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    data: bytes | None = None,
    weight: Callable[[str], torch.Tensor] | None = None,
) -> dict[str, LoraFactors]:
    """
    Loads an adapter's updates by module name; raises `AdapterError`.

    `data` is from [`read_weights`], where that was called; `weight` gives the base model's weights, if any.
    """
    # Read into memory instead of mapped: a training run that truncates a mapped file kills this process (SIGBUS).
    data = read_weights(adapter) if data is None else data
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as error:
        raise AdapterError(f"{WEIGHTS_NAME} cannot be loaded: {quote(error)}") from error
    for name, key in adapter.copies.items():
        _check_copy(key, tensors.get(key), weight and weight(name))
    loaded = {}
    for name, shape in adapter.modules.items():
        parts = _load_parts(name, shape, tensors, device, dtype)
        loaded[name] = shape.form.update(parts, shape.scaling, weight and partial(weight, name))
        if (loaded[name].in_features, loaded[name].out_features) != (shape.in_features, shape.out_features):
            raise AdapterError(f"{WEIGHTS_NAME} changed while it was in use: {quote(name)} has another shape")
    return loaded


def adapter_hash(adapter: Adapter, data: bytes | None = None) -> str:
    """Returns a hash that adapters share that compute the same; `data` is from [`read_weights`], if it was called."""
    digest = hashlib.sha256(read_weights(adapter) if data is None else data).hexdigest()
    return hashlib.sha256(json.dumps([adapter.config.effective(), digest]).encode()).hexdigest()


def _short_name(base_model: str) -> str:
    parts = base_model.rstrip("/").split("/")
    # A path into the Hub's cache ends in .../models--org--name/snapshots/<revision>.
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].split("--")[-1] if cached else parts[-1]).lower()


def read_weights(adapter: Adapter) -> bytes:
    """Returns the content of the weights file; raises `AdapterError` if it changed since its header was read."""
    if adapter.path is None:
        raise AdapterError("it has not been downloaded yet")
    with os.fdopen(open_regular(adapter.path / WEIGHTS_NAME), "rb") as file:
        try:
            data, stamp = file.read(adapter.stamp.size + 1), FileStamp.of(file.fileno())
        except OSError as error:
            raise AdapterError(f"{WEIGHTS_NAME} cannot be read: {error}") from error
    if stamp != adapter.stamp:
        raise AdapterError(f"{WEIGHTS_NAME} changed while it was in use: another run may be writing it")
    return data


def _load_parts(
    name: str, shape: ModuleShape, tensors: Mapping[str, torch.Tensor], device: str | torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    if not set(shape.keys.values()) <= tensors.keys():
        raise AdapterError(f"{WEIGHTS_NAME} changed while it was in use: {quote(name)} is gone")
    if shape.stack and not shape.stack.expert[1]:
        raise AdapterError("`target_parameters` adapts several experts at once, and there is no base model here")
    own = {part: of_expert(part, tensors[key], shape.stack) for part, key in shape.keys.items()}
    parts = {part: tensor.to(device=device, dtype=dtype, copy=True) for part, tensor in own.items()}
    for part in parts.values():
        # NaN fails the comparison too.
        if not (largest := part.abs().max().item()) <= MAX_ABSOLUTE:
            raise AdapterError(f"{quote(name)} holds the value {largest:g}, expected at most {MAX_ABSOLUTE:g}")
    return parts


def _check_copy(key: str, copy: torch.Tensor | None, weight: torch.Tensor | None) -> None:
    """Refuses a tensor that would take the place of the base model's weight, unless it is that weight."""
    if copy is None or weight is None or sorted(copy.shape) != sorted(weight.shape):
        same = False
    else:
        # The weight of an embedding is given the other way round, and either may have been rounded.
        copy = (copy if copy.shape == weight.shape else copy.T).to(weight.device)
        same = torch.equal(copy.to(weight.dtype), weight) or torch.equal(weight.to(copy.dtype), copy)
    if not same:
        raise AdapterError(
            f"{quote(key)} would overwrite a weight of the base model, and is not known to be equal to it: it was "
            "trained or resized besides the adapter, or there is no base model here to compare it with"
        )
