"""The header of a safetensors file: which tensors it holds, checked against the size of the file, nothing loaded."""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from .files import open_regular, parse_object, quote


# The library's own limit is 100 MB; ten thousand modules of the longest names stay below 10 MB.
MAX_HEADER_BYTES = 10_000_000
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PREFIX = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """
    One tensor as the header describes it.

    Args:
        dtype (`str`): `"F64"`, `"F32"`, `"F16"` or `"BF16"`.
        shape (`tuple[int, ...]`): Its shape.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FileStamp:
    """
    What tells whether a file is still the one that was read.

    Args:
        size (`int`): Bytes.
        modified (`int`): Time of the last change in nanoseconds.
    """

    size: int
    modified: int

    @classmethod
    def of(cls, descriptor: int) -> "FileStamp":
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], FileStamp]:
    """
    Reads and checks the header of a safetensors file.

    Args:
        path (`Path`):
            The file. Its tensors are not read.

    Returns:
        `tuple[dict[str, TensorInfo], FileStamp]`: the tensors by key, and what identifies this state of the file.

    Raises:
        AdapterError: If the file cannot be read, is truncated or is malformed in any way.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        stamp = FileStamp.of(file.fileno())
        try:
            start = file.read(_PREFIX.size)
            length = header_length(start)
            header = file.read(length)
        except OSError as error:
            raise AdapterError(f"{path.name} cannot be read: {error}") from error
    return parse_header(start + header, stamp.size), stamp


def header_length(start: bytes) -> int:
    """
    Returns the length of the JSON part that the first 8 bytes of a file announce.

    Raises:
        AdapterError: If there are fewer than 8 bytes, or the length is absurd.
    """
    if len(start) < _PREFIX.size:
        raise AdapterError(f"the weights file is truncated: {len(start)} bytes, expected a safetensors header")
    (length,) = _PREFIX.unpack_from(start)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise AdapterError(
            f"the weights file announces a header of {length:,} bytes, expected 2 to {MAX_HEADER_BYTES:,}: "
            "it is not safetensors"
        )
    return length


def parse_header(data: bytes, file_size: int) -> dict[str, TensorInfo]:
    """
    Parses the first bytes of a safetensors file.

    Args:
        data (`bytes`):
            The beginning of the file, at least through the end of its header.
        file_size (`int`):
            Size of the whole file in bytes, which the tensors must fill exactly.

    Raises:
        AdapterError: If the header is malformed, a dtype is not a floating point type of 16 bits or more, or the
            tensors overlap, leave gaps, or do not end where the file ends.
    """
    length = header_length(data)
    text = data[_PREFIX.size : _PREFIX.size + length]
    if len(text) < length:
        raise AdapterError(f"the weights file is truncated within its header: {len(text)} of {length} bytes")
    entries = parse_object(text, "the safetensors header")
    _check_metadata(entries.pop("__metadata__", None))
    spans = {key: _parse_entry(key, entry) for key, entry in entries.items()}
    _check_spans({key: span for key, (_, span) in spans.items()}, file_size - _PREFIX.size - length)
    return {key: info for key, (info, _) in spans.items()}


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError("the safetensors header's __metadata__ is not a mapping of strings")


def _parse_entry(key: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{quote(key)} is described by something else than dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise AdapterError(f"{quote(key)} has dtype {quote(dtype)}, expected one of {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or len(shape) > 8 or not _are_sizes(span) or len(span) != 2:
        raise AdapterError(f"{quote(key)} has shape {quote(shape)} and offsets {quote(span)}, expected lists of sizes")
    if span[1] - span[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise AdapterError(f"{quote(key)} of shape {quote(shape)} and dtype {dtype} does not fill its {quote(span)}")
    return TensorInfo(dtype, tuple(shape)), (span[0], span[1])


def _are_sizes(values: Any) -> bool:
    # JSON's true is an int to Python, and a size beyond 2**63 is one to nobody else.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_spans(spans: Mapping[str, tuple[int, int]], data_size: int) -> None:
    end = 0
    for key, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end:
            raise AdapterError(f"{quote(key)} starts at byte {start}, expected {end}: tensors overlap or leave a gap")
        end = stop
    if end != data_size:
        raise AdapterError(
            f"the tensors end at byte {end} but the file holds {data_size} bytes of data: it is truncated or padded"
        )
