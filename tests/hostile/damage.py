"""What a stranger may do to the files of a good adapter or checkpoint: each function returns one such change."""

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
MODEL_CONFIG, MODEL, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], None]


def both(*changes: Change) -> Change:
    def change(directory: Path) -> None:
        for one in changes:
            one(directory)

    return change


def fields(name: str = CONFIG, **values: Any) -> Change:
    """Sets fields of a JSON file."""
    return lambda directory: (directory / name).write_text(
        json.dumps(json.loads((directory / name).read_text()) | values)
    )


def without(name: str, field: str) -> Change:
    def change(directory: Path) -> None:
        values = json.loads((directory / name).read_text())
        del values[field]
        (directory / name).write_text(json.dumps(values))

    return change


def raw(field: str, text: str, name: str = CONFIG) -> Change:
    """Adds text to a JSON file as the value of a field."""

    def change(directory: Path) -> None:
        old = json.loads((directory / name).read_text())
        old.pop(field, None)
        (directory / name).write_text(f'{json.dumps(old)[:-1]}, "{field}": {text}}}')

    return change


def content(name: str, data: bytes | str) -> Change:
    data = data.encode() if isinstance(data, str) else data

    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(data)

    return change


def changed(name: str, edit: Callable[[bytes], bytes]) -> Change:
    return lambda directory: (directory / name).write_bytes(edit((directory / name).read_bytes()))


def gone(name: str) -> Change:
    return lambda directory: (directory / name).unlink()


def link(name: str, target: str) -> Change:
    """Puts a symbolic link in the place of a file."""

    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return change


def moved(name: str, new: str) -> Change:
    def change(directory: Path) -> None:
        (directory / new).parent.mkdir(exist_ok=True)
        (directory / name).rename(directory / new)

    return change


def special(name: str, kind: str) -> Change:
    """Puts a directory, a named pipe or a socket in the place of a file."""

    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        if kind == "socket":
            here = os.getcwd()
            # The path of a socket is short.
            os.chdir(directory)
            socket.socket(socket.AF_UNIX).bind(name)
            os.chdir(here)
        else:
            {"directory": os.mkdir, "pipe": os.mkfifo}[kind](directory / name)

    return change


def longer(name: str, size: int) -> Change:
    """Gives a file that size, by a hole."""
    return lambda directory: os.truncate(directory / name, size)


def header(edit: Callable[[dict], dict | None], name: str = WEIGHTS, data: bytes | None = None) -> Change:
    """Edits the header of a safetensors file as JSON, and may replace what follows it."""

    def change(directory: Path) -> None:
        old = (directory / name).read_bytes()
        length = 8 + struct.unpack("<Q", old[:8])[0]
        entries = json.loads(old[8:length])
        entries = edit(entries) or entries
        (directory / name).write_bytes(packed(json.dumps(entries).encode(), old[length:] if data is None else data))

    return change


def packed(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_text(edit: Callable[[bytes], bytes], length: int | None = None, name: str = WEIGHTS) -> Change:
    """Edits the header of a safetensors file as bytes; `length` is announced in the place of its own."""

    def one(old: bytes) -> bytes:
        end = 8 + struct.unpack("<Q", old[:8])[0]
        return packed(edit(old[8:end]), old[end:], length)

    return changed(name, one)


def entry(key: str, **values: Any) -> Change:
    """Sets properties of one tensor in the header of the adapter's weights; None removes one."""

    def edit(entries: dict) -> None:
        entries[key] = {name: value for name, value in (entries[key] | values).items() if value is not None}

    return header(edit)


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any], name: str = WEIGHTS) -> Change:
    """Edits the tensors of a safetensors file."""

    def change(directory: Path) -> None:
        values = load_file(directory / name)
        edit(values)
        save_file({key: value.contiguous() for key, value in values.items()}, directory / name, {"format": "pt"})

    return change


def put(**values: torch.Tensor) -> Change:
    return tensors(lambda found: found.update(values))


def mapped(function: Callable[[torch.Tensor], torch.Tensor], name: str = WEIGHTS, part: str = "") -> Change:
    """Applies a function to all tensors whose name has a part."""
    return tensors(lambda found: found.update({k: function(v) for k, v in found.items() if part in k}), name)


def renamed(old: str, new: str, name: str = WEIGHTS) -> Change:
    return tensors(lambda found: found.update({new: found.pop(old)}), name)


def filled(key: str, value: float, name: str = WEIGHTS) -> Change:
    return tensors(lambda found: found[key].view(-1)[3:4].fill_(value), name)


def kept_stamp(name: str, change: Change) -> Change:
    """Makes a change that leaves size and time of a file as they were."""

    def hidden(directory: Path) -> None:
        before = os.stat(directory / name)
        change(directory)
        assert os.stat(directory / name).st_size == before.st_size
        os.utime(directory / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    return hidden
