"""What rows and batches hold: hashes of their content, and which rows share a batch."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def content_hash(value: Any) -> str:
    """Returns a sha256 of the content of a row or batch."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            digest.update(repr(name).encode())
            _feed(digest, value[name])
    elif isinstance(value, torch.Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest.update(repr((value.dtype, value.shape)).encode() + value.tobytes())
    elif isinstance(value, list | tuple) and not (value and isinstance(value[0], str | int | float)):
        digest.update(f"{len(value)} values".encode())
        for item in value:
            _feed(digest, item)
    elif hasattr(value, "tobytes") and hasattr(value, "size"):
        # An image of Pillow's.
        digest.update(repr(value.size).encode() + value.tobytes())
    else:
        digest.update(repr(value).encode())


def row_kind(row: Any) -> Any:
    """Returns what the rows of a batch have in common: their columns, and the data set that they name."""
    # The samplers of sentence-transformers never mix data sets.
    return (frozenset(row), row.get("dataset_name")) if isinstance(row, Mapping) else None


def row_length(row: Any) -> int:
    """Returns the number of tokens of a row, 0 where it does not tell."""
    tokens = row.get("input_ids") if isinstance(row, Mapping) else None
    return len(tokens) if hasattr(tokens, "__len__") else 0
