"""Hashes of rows and batches."""

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
