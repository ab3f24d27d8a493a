"""Full checkpoints on disk: which tensors they hold, checked against the live model, and read one at a time."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..candidates.candidate import Candidate
from ..errors import AdapterError, CheckpointError
from ..model.tensors import ModelTensors
from .adapter_config import CONFIG_NAME as ADAPTER_CONFIG_NAME
from .checkpoint_files import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_JSON_BYTES,
    WEIGHTS_NAME,
    Directory,
    Files,
    read_index,
    shard_names,
)
from .files import open_regular, parse_object, quote
from .header import DTYPE_BYTES, FileStamp, TensorInfo
from .vocabulary import Vocabulary, check_vocabularies, read_vocabulary


__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "WEIGHTS_NAME",
    "Checkpoint",
    "check_checkpoint",
    "check_unchanged",
    "describe_checkpoint",
    "is_checkpoint",
    "read_checkpoint",
    "read_tensor",
    "tensors_of",
]


@dataclass(frozen=True)
class Stored:
    """
    Where a tensor is.

    Args:
        file (`str`): Shard that holds it.
        key (`str`): Its name there.
        info (`TensorInfo`): Its data type and shape.
    """

    file: str
    key: str
    info: TensorInfo

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return torch.Size(self.info.shape).numel() * DTYPE_BYTES[self.info.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """
    A full checkpoint whose description has been read and found sound.

    Args:
        candidate (`Candidate`): Where it came from.
        files (`Files`): Its files.
        config (`Mapping[str, Any]`): Its `config.json`.
        tensors (`Mapping[str, Stored]`): Its tensors by their name; by the model's names once checked.
        stamps (`Mapping[str, FileStamp]`): State of each shard when it was read.
        warnings (`tuple[str, ...]`): What is worth knowing but no reason to reject it.
        resized (`tuple[str, ...]`): Embeddings with another number of rows than the model's.
    """

    candidate: Candidate
    files: Files = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, Stored] = field(repr=False)
    stamps: Mapping[str, FileStamp] = field(repr=False)
    warnings: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Its directory, once it is on this machine."""
        return Path(self.candidate.path)

    @property
    def rank(self) -> None:
        """A full checkpoint has no rank."""
        return None

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(stored.bytes for stored in self.tensors.values())

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """Its tokens and their ids, None where it has no tokenizer."""
        return read_vocabulary(self.files)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory looks like a full checkpoint: a model's configuration and no adapter's."""
    return (directory / CONFIG_NAME).is_file() and not (directory / ADAPTER_CONFIG_NAME).exists()


def read_checkpoint(candidate: Candidate | str | os.PathLike) -> Checkpoint:
    """
    Reads the description of a full checkpoint: its configuration, the index and the headers of its shards, no tensor.

    Args:
        candidate (`Candidate` or path):
            A candidate with a local path, or a directory as `save_pretrained` writes it: `config.json` and
            `model.safetensors` or `model.safetensors.index.json` with the shards it names.

    Raises:
        CheckpointError: The reason why it cannot be used.
    """
    if not isinstance(candidate, Candidate):
        candidate = Candidate(str(candidate), "model", Path(candidate), run=os.path.realpath(candidate))
    if candidate.path is None:
        raise CheckpointError(f"{candidate.name} has not been downloaded yet")
    return describe_checkpoint(candidate, Directory(Path(candidate.path)))


def describe_checkpoint(candidate: Candidate, files: Files) -> Checkpoint:
    """
    Reads the description of a full checkpoint, wherever its files are.

    Args:
        candidate (`Candidate`):
            Where it is from.
        files (`Files`):
            Its files, of which only the small ones and the headers of the shards are read.

    Raises:
        CheckpointError: The reason why it cannot be used.
    """
    try:
        config = parse_object(files.read(CONFIG_NAME, MAX_JSON_BYTES), CONFIG_NAME)
        index = read_index(files)
        headers = {name: _read_shard(files, name) for name in shard_names(index)}
    except CheckpointError:
        raise
    except AdapterError as error:
        raise CheckpointError(str(error)) from error
    tensors = {key: Stored(name, key, info) for name, (entries, _) in headers.items() for key, info in entries.items()}
    _check_index(index, tensors)
    return Checkpoint(candidate, files, config, tensors, {name: stamp for name, (_, stamp) in headers.items()})


def check_checkpoint(checkpoint: Checkpoint, model: ModelTensors, vocabulary: Vocabulary | None = None) -> Checkpoint:
    """
    Checks that a checkpoint can take the place of the live model's weights, and names its tensors as the model does.

    Args:
        checkpoint (`Checkpoint`):
            From [`read_checkpoint`].
        model (`ModelTensors`):
            The live model's.
        vocabulary (`Mapping[str, int]`, *optional*):
            Tokens of the tokenizer that training uses. Where either side has none, the embeddings must have the same
            number of rows; otherwise one vocabulary may extend the other.

    Raises:
        CheckpointError: It is of another architecture, or a tensor is missing or has another shape.
    """
    _check_architecture(checkpoint.config, model)
    known = checkpoint.vocabulary if vocabulary is not None else None
    if known is not None:
        check_vocabularies(known, vocabulary)
    tensors, resized = {}, []
    for name, shape in model.shapes.items():
        stored = _find(checkpoint, name, model)
        tensors[name] = stored
        if stored.info.shape != shape:
            _check_resized(name, stored, shape, model, known)
            resized.append(name)
    used = {stored.key for stored in tensors.values()} | set(model.aliases) | model.buffers
    ignored = sorted(set(checkpoint.tensors) - used)
    warnings = (f"{len(ignored)} tensors are not the model's: {quote(ignored[0])}",) if ignored else ()
    return dataclasses.replace(
        checkpoint, tensors=tensors, resized=tuple(resized), warnings=checkpoint.warnings + warnings
    )


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """
    Reads one tensor from its memory-mapped shard, which is unmapped as soon as the tensor is dropped.

    Args:
        checkpoint (`Checkpoint`):
            From [`read_checkpoint`].
        name (`str`):
            Name of the tensor.

    Raises:
        CheckpointError: The shard changed since its header was read, or a value is not finite.
    """
    stored = checkpoint.tensors[name]
    path = checkpoint.path / stored.file
    _check_unchanged(checkpoint, stored.file)
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
        _check_unchanged(checkpoint, name)


def _check_unchanged(checkpoint: Checkpoint, name: str) -> None:
    if _stamp(checkpoint.path / name) != checkpoint.stamps[name]:
        raise CheckpointError(f"{name} changed while it was in use: another run may be writing it")


def _read_shard(files: Files, name: str) -> tuple[dict[str, TensorInfo], FileStamp]:
    if not files.has(name):
        named = "" if name == WEIGHTS_NAME else f", which {INDEX_NAME} names"
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
    for key in (name, *(alias for alias, first in model.aliases.items() if first == name)):
        if key in checkpoint.tensors:
            return checkpoint.tensors[key]
    raise CheckpointError(f"another architecture: tensor {quote(name)} of the model is missing in the checkpoint")


def _check_resized(
    name: str, stored: Stored, shape: tuple[int, ...], model: ModelTensors, known: Vocabulary | None
) -> None:
    found = stored.info.shape
    if name not in model.embeddings or found[1:] != shape[1:]:
        raise CheckpointError(f"another architecture: {quote(name)} has shape {found}, expected {shape}")
    if known is None:
        raise CheckpointError(
            f"another vocabulary: {quote(name)} has {found[0]} rows, expected {shape[0]}, and no tokenizer on both "
            "sides tells which tokens they are"
        )


def _stamp(path: Path) -> FileStamp:
    descriptor = open_regular(path)
    try:
        return FileStamp.of(descriptor)
    finally:
        os.close(descriptor)


def tensors_of(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors with their names, one in memory at a time, shard after shard."""
    for name in sorted(checkpoint.tensors, key=lambda name: (checkpoint.tensors[name].file, name)):
        yield name, read_tensor(checkpoint, name)
