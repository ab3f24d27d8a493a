"""The header of a safetensors file: which tensors it holds, without reading any. safetensors itself checks it."""

import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError
from .files import open_regular, quote


# The library's own limit is 100 MB; ten thousand modules of the longest names stay below 10 MB.
MAX_HEADER_BYTES = 10_000_000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PREFIX = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """Data type and shape of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FileStamp:
    """What tells whether a file is still the one that was read: bytes, and nanoseconds of its last change."""

    size: int
    modified: int = 0

    @classmethod
    def of(cls, descriptor: int) -> "FileStamp":
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], FileStamp]:
    """Returns the tensors in a file by key, and what identifies its state; raises `AdapterError`."""
    with os.fdopen(open_regular(path), "rb") as file:
        stamp = FileStamp.of(file.fileno())
        try:
            start = file.read(_PREFIX.size)
            start += file.read(header_end(start) - len(start))
        except OSError as error:
            raise AdapterError(f"{path.name} cannot be read: {error}") from error
    return parse_header(start, stamp.size), stamp


def header_end(start: bytes) -> int:
    """Returns how many bytes of a file its header takes, by the first 8 of them; raises `AdapterError`."""
    if len(start) < _PREFIX.size:
        raise AdapterError(f"the weights file is truncated: {len(start)} bytes, expected a safetensors header")
    (length,) = _PREFIX.unpack_from(start)
    if length > MAX_HEADER_BYTES:
        raise AdapterError(
            f"the weights file announces a header of {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}: it is "
            "not safetensors"
        )
    return _PREFIX.size + length


def parse_header(start: bytes, file_size: int) -> dict[str, TensorInfo]:
    """Returns the tensors that the first bytes of a file, through its header, describe; raises `AdapterError`."""
    end = header_end(start)
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(start[:end])
            # The rest is a hole, which takes no room on the disk: safetensors looks at the size only.
            file.truncate(file_size)
            with safe_open(file.name, "pt") as tensors:
                slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
                found = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError, OverflowError, RuntimeError) as error:
        raise AdapterError(f"the weights file is truncated, padded or no safetensors: {quote(error)}") from error
    for key, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise AdapterError(f"{quote(key)} has dtype {quote(dtype)}, expected one of {', '.join(DTYPES)}")
    return {key: TensorInfo(DTYPES[dtype], shape) for key, (dtype, shape) in found.items()}
