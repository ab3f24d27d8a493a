"""The files of a full checkpoint, wherever they are, and which of them hold its tensors."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import CheckpointError
from .files import parse_object, quote, read_limited
from .header import FileStamp, TensorInfo, read_header


MODEL_CONFIG_NAME = "config.json"
MODEL_WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_JSON_BYTES = 50_000_000


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
        return (self.path / name).exists()

    def read(self, name: str, limit: int) -> bytes:
        return read_limited(self.path / name, limit)

    def header(self, name: str) -> tuple[dict[str, TensorInfo], FileStamp]:
        return read_header(self.path / name)


def parse_index(data: bytes) -> dict[str, str]:
    """Returns the file of every tensor that an index names; raises `CheckpointError` for one that leads elsewhere."""
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
