"""Reading files that strangers wrote: bounded in size, strict in form, and with one kind of error."""

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from ..errors import AdapterError


# An index of a quarter of a million tensors; small values take 50 times as much memory as text.
MAX_VALUES = 250_000


def open_regular(path: Path) -> int:
    """Opens a regular file for reading and returns its file descriptor; raises `AdapterError` for anything else."""
    try:
        # Non-blocking: a named pipe in the place of a weights file would hang the run.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path.name} cannot be read: {error}") from error
    status = os.fstat(descriptor)
    # Those of the kernel in /proc have no size, and reading one may wait, fail oddly or take what it holds away.
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return descriptor
    os.close(descriptor)
    kind = "empty" if stat.S_ISREG(status.st_mode) else "not a regular file"
    raise AdapterError(f"{path.name} is {kind}")


def read_limited(path: Path, limit: int) -> bytes:
    """Reads a whole file of at most `limit` bytes; raises `AdapterError`."""
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise AdapterError(f"{path.name} cannot be read: {error}") from error
    if len(data) > limit:
        raise AdapterError(f"{path.name} is larger than {limit:,} bytes, far more than such a file needs")
    return data


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parses strict JSON that must be one object: no NaN or Infinity, no key twice; raises `AdapterError`."""
    if data.count(b",") >= MAX_VALUES:
        raise AdapterError(f"{what} holds more than {MAX_VALUES:,} values, far more than such a file needs")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise AdapterError(f"{what} is nested too deeply to be genuine") from None
    except ValueError as error:
        raise AdapterError(f"{what} is not strict JSON: {quote(error)}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{what} holds a JSON {type(value).__name__}, expected an object")
    return value


def quote(value: object, limit: int = 120) -> str:
    """Returns text from a stranger's file fit for a one-line message: printable and cut to `limit` characters."""
    try:
        text = str(value)[: limit + 1]
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= limit else text[:limit] + "..."


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"the number {constant}, which is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key appears twice")
    return value
