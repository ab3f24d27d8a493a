"""LoRA adapters on disk: reading their description, checking it against the live model, loading their factors."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..errors import AdapterError
from ..lowrank import LoraFactors
from .adapter_config import CONFIG_NAME, MAX_CONFIG_BYTES, AdapterConfig, parse_config
from .adapter_modules import ModuleShape, adapter_modules, contradictions, match_modules
from .base import BaseModel
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
    read.
    """

    path: Path | None
    config: AdapterConfig
    modules: Mapping[str, ModuleShape]
    dtype: str
    stamp: FileStamp = field(repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Largest rank over the modules."""
        return max(shape.rank for shape in self.modules.values())

    def fit(self, base: BaseModel) -> "Adapter":
        """
        Returns it with the layers named as the model names them, and a warning where it records another base model.

        Raises:
            AdapterError: A layer or its shape is not the model's.
        """
        modules = match_modules(self.modules, base.layers)
        for name, shape in modules.items():
            found, expected = (shape.in_features, shape.out_features), tuple(base.layers[name])
            if found != expected:
                raise AdapterError(
                    f"trained on another base model: {quote(name)} maps {found[0]} features to {found[1]}, expected "
                    f"{expected[0]} to {expected[1]}"
                )
        recorded, warnings = self.config.base_model, self.warnings
        if recorded and base.name and _short_name(recorded) != _short_name(base.name):
            warnings += (f"recorded base model {quote(recorded)} differs from {base.name}; the shapes fit",)
        return dataclasses.replace(self, modules=modules, warnings=warnings)


def read_adapter(path: str | os.PathLike) -> Adapter:
    """
    Reads the description of an adapter: its configuration and the header of its weights, but no tensor.

    Raises:
        AdapterError: The reason why it cannot be used. Pickled weights (`adapter_model.bin`) are never opened.
    """
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
    modules = adapter_modules(config, tensors)
    return Adapter(path, config, modules, dtype, stamp, contradictions(config, modules))


@torch.no_grad()
def load_factors(
    adapter: Adapter,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    data: bytes | None = None,
) -> dict[str, LoraFactors]:
    """
    Loads an adapter's factors by module name.

    `data` is from [`read_weights`], where the file has been read already.

    Raises:
        AdapterError: The file changed since it was read, or values are not finite or absurdly large.
    """
    # Read into memory instead of mapped: a training run that truncates a mapped file kills this process (SIGBUS).
    data = read_weights(adapter) if data is None else data
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as error:
        raise AdapterError(f"{WEIGHTS_NAME} cannot be loaded: {quote(error)}") from error
    return {name: _load_module(name, shape, tensors, device, dtype) for name, shape in adapter.modules.items()}


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


def _load_module(
    name: str, shape: ModuleShape, tensors: Mapping[str, torch.Tensor], device: str | torch.device, dtype: torch.dtype
) -> LoraFactors:
    try:
        A, B = (tensors[key].to(device=device, dtype=dtype, copy=True) for key in (shape.key_a, shape.key_b))
    except KeyError:
        raise AdapterError(f"{WEIGHTS_NAME} changed while it was in use: {quote(name)} is gone") from None
    if A.shape != (shape.rank, shape.in_features) or B.shape != (shape.out_features, shape.rank):
        raise AdapterError(f"{WEIGHTS_NAME} changed while it was in use: {quote(name)} has another shape")
    for factor in (A, B):
        # NaN fails the comparison too.
        if not (largest := factor.abs().max().item()) <= MAX_ABSOLUTE:
            raise AdapterError(f"{quote(name)} holds the value {largest:g}, expected at most {MAX_ABSOLUTE:g}")
    return LoraFactors(A, B, shape.scaling)
