"""Full checkpoints on disk: which tensors they hold, checked against the live model, and read one at a time."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError, CheckpointError
from ..model import ModelTensors
from .adapter_config import CONFIG_NAME, MAX_CONFIG_BYTES
from .base import BaseModel
from .files import open_regular, parse_object, quote, read_limited
from .header import FileStamp, TensorInfo, read_header


MODEL_CONFIG_NAME = "config.json"
MODEL_WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_JSON_BYTES = 20_000_000


class Files(Protocol):
    """Where the files of a checkpoint are: a directory, or a folder of a repository on the Hub."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def read(self, name: str, limit: int) -> bytes:
        """Returns the content of a file of at most `limit` bytes."""

    def header(self, name: str) -> tuple[dict[str, TensorInfo], FileStamp]:
        """Returns the tensors that a safetensors file holds, and what identifies its state."""


@dataclass(frozen=True)
class Directory:
    """The files of a checkpoint on this machine."""

    path: Path

    def has(self, name: str) -> bool:
        return os.path.exists(self.path / name)

    def read(self, name: str, limit: int) -> bytes:
        return read_limited(self.path / name, limit)

    def header(self, name: str) -> tuple[dict[str, TensorInfo], FileStamp]:
        return read_header(self.path / name)


def parse_index(data: bytes) -> dict[str, str]:
    """Returns the file of every tensor that an index names; raises `CheckpointError` for one that leads elsewhere."""
    if not data.isascii():
        # One other character makes the text four times as large in memory.
        raise CheckpointError(f"{INDEX_NAME} is not ASCII, expected plain names of tensors and files")
    weight_map = parse_object(data, INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_NAME} has no weight_map, expected the file of every tensor")
    for name in weight_map.values():
        # A name with a directory in it could lead anywhere.
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_NAME} names the file {quote(name)}, expected a *.safetensors beside it")
    return weight_map


def shard_names(index: Mapping[str, str] | None) -> list[str]:
    """Returns the names of the files that hold tensors."""
    return [MODEL_WEIGHTS_NAME] if index is None else sorted(set(index.values()))


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: the shard that holds it, its name there, its data type and shape; `copies` must equal it."""

    file: str
    key: str
    info: TensorInfo
    copies: tuple["Stored", ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """
    A full checkpoint whose description has been read and found sound: at `path`, or on the Hub where that is None.

    `tensors` have the checkpoint's names, and the model's once it was found to fit; `stamps` are the states of its
    shards when they were read.
    """

    path: Path | None
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, Stored] = field(repr=False)
    stamps: Mapping[str, FileStamp] = field(repr=False)
    warnings: tuple[str, ...] = ()

    def fit(self, base: BaseModel) -> "Checkpoint":
        """Returns it with the model's names; raises `CheckpointError` where it cannot take the model's place."""
        if base.refusal:
            raise CheckpointError(base.refusal)
        model = base.tensors
        if model is None:
            return self
        _check_architecture(self.config, model)
        tensors = {name: _find(self, name, model) for name in model.shapes}
        used = {stored.key for stored in tensors.values()} | set(model.aliases) | model.buffers
        ignored = sorted(set(self.tensors) - used)
        warnings = (f"{len(ignored)} tensors are not the model's: {quote(ignored[0])}",) if ignored else ()
        return dataclasses.replace(self, tensors=tensors, warnings=self.warnings + warnings)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory looks like a full checkpoint: a model's configuration and no adapter's."""
    return os.path.isfile(directory / MODEL_CONFIG_NAME) and not os.path.exists(directory / CONFIG_NAME)


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Reads the configuration, the index and the headers of a full checkpoint, no tensor; raises `CheckpointError`."""
    return describe_checkpoint(Directory(Path(path)), Path(path))


def describe_checkpoint(files: Files, path: Path | None = None) -> Checkpoint:
    """Reads the description of a full checkpoint, wherever its files are; raises `CheckpointError`."""
    try:
        config = parse_object(files.read(MODEL_CONFIG_NAME, 4 * MAX_CONFIG_BYTES), MODEL_CONFIG_NAME)
        index = parse_index(files.read(INDEX_NAME, MAX_JSON_BYTES)) if files.has(INDEX_NAME) else None
        headers = {name: _read_shard(files, name) for name in shard_names(index)}
    except AdapterError as error:
        raise CheckpointError(str(error)) from error
    tensors = {key: Stored(name, key, info) for name, (entries, _) in headers.items() for key, info in entries.items()}
    _check_index(index, tensors)
    return Checkpoint(path, config, tensors, {name: stamp for name, (_, stamp) in headers.items()})


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Reads one tensor, whose shard stays mapped until it is dropped; raises `CheckpointError`."""
    stored = checkpoint.tensors[name]
    tensor = _read(checkpoint, stored)
    for copy in stored.copies:
        if not torch.equal(_read(checkpoint, copy), tensor):
            raise CheckpointError(f"{quote(copy.key)} and {quote(stored.key)} differ, and are one weight of the model")
    return tensor


def _read(checkpoint: Checkpoint, stored: Stored) -> torch.Tensor:
    path = _unchanged_shard(checkpoint, stored.file)
    try:
        with safe_open(path, "pt") as shard:
            tensor = shard.get_tensor(stored.key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{quote(stored.key)} cannot be read from {stored.file}: {error}") from error
    # The extremes are NaN where any value is, and need no mask as large as the tensor.
    if tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
        raise CheckpointError(f"{quote(stored.key)} holds values that are not finite")
    return tensor


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Raises an `AdapterError` where a shard is gone or has changed since its header was read."""
    for name in checkpoint.stamps:
        _unchanged_shard(checkpoint, name)


def _unchanged_shard(checkpoint: Checkpoint, name: str) -> Path:
    if checkpoint.path is None:
        raise CheckpointError("it has not been downloaded yet")
    path = checkpoint.path / name
    with os.fdopen(open_regular(path), "rb") as file:
        if FileStamp.of(file.fileno()) != checkpoint.stamps[name]:
            raise CheckpointError(f"{name} changed while it was in use: another run may be writing it")
    return path


def _read_shard(files: Files, name: str) -> tuple[dict[str, TensorInfo], FileStamp]:
    if not files.has(name):
        named = "" if name == MODEL_WEIGHTS_NAME else f", which {INDEX_NAME} names"
        raise CheckpointError(f"the file {quote(name)}{named} is missing")
    try:
        return files.header(name)
    except AdapterError as error:
        raise CheckpointError(f"{quote(name)}: {error}") from error


def _check_index(index: Mapping[str, str] | None, tensors: Mapping[str, Stored]) -> None:
    for key, name in (index or {}).items():
        if key not in tensors or tensors[key].file != name:
            raise CheckpointError(f"{INDEX_NAME} says that {quote(key)} is in {quote(name)}, and it is not there")


def _check_architecture(config: Mapping[str, Any], model: ModelTensors) -> None:
    if config.get("model_type") != model.model_type:
        raise CheckpointError(
            f"another architecture: model_type is {quote(config.get('model_type'))}, expected {model.model_type}"
        )
    tied = config.get("tie_word_embeddings", model.tied)
    if tied is not model.tied:
        raise CheckpointError(
            f"its head is {'tied to' if tied else 'apart from'} its embeddings, and the model's is not"
        )


def _find(checkpoint: Checkpoint, name: str, model: ModelTensors) -> Stored:
    keys = (name, *(alias for alias, first in model.aliases.items() if first == name))
    found = [checkpoint.tensors[key] for key in keys if key in checkpoint.tensors]
    if not found:
        raise CheckpointError(f"another architecture: tensor {quote(name)} of the model is missing in the checkpoint")
    shape, expected = found[0].info.shape, model.shapes[name]
    if shape != expected:
        kind = "vocabulary" if name in model.embeddings and shape[1:] == expected[1:] else "architecture"
        raise CheckpointError(f"another {kind}: {quote(name)} has shape {shape}, expected {expected}")
    return dataclasses.replace(found[0], copies=tuple(found[1:]))
