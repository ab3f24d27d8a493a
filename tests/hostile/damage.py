"""What a stranger may do to the files of a good adapter or checkpoint: each function returns one such change."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hub.faults import safetensors_file as packed


CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
MODEL_CONFIG, MODEL, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], None]


def both(*changes: Change) -> Change:
    def change(directory: Path) -> None:
        for one in changes:
            one(directory)

    return change


def edited(name: str, edit: Callable[[dict], Any]) -> Change:
    """Edits the object in a JSON file."""

    def change(directory: Path) -> None:
        values = json.loads((directory / name).read_text())
        edit(values)
        (directory / name).write_text(json.dumps(values))

    return change


def fields(name: str = CONFIG, **values: Any) -> Change:
    return edited(name, lambda found: found.update(values))


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


def header_text(edit: Callable[[bytes], bytes], length: int | None = None) -> Change:
    """Edits the header of the weights as bytes; `length` is announced in the place of its own."""

    def one(old: bytes) -> bytes:
        end = 8 + int.from_bytes(old[:8], "little")
        return packed(edit(old[8:end]), old[end:], length)

    return changed(WEIGHTS, one)


def header(edit: Callable[[dict], dict | None]) -> Change:
    """Edits the header of the weights as JSON."""

    def one(text: bytes) -> bytes:
        entries = json.loads(text)
        return json.dumps(edit(entries) or entries).encode()

    return header_text(one)


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


def zeros(key: str, *shape: int, **settings: Any) -> Change:
    return put(**{key: torch.zeros(shape, **settings)})


def mapped(function: Callable[[torch.Tensor], torch.Tensor], name: str = WEIGHTS, part: str = "") -> Change:
    """Applies a function to all tensors whose name has a part."""
    return tensors(lambda found: found.update({k: function(v) for k, v in found.items() if part in k}), name)


def renamed(old: str, new: str) -> Change:
    return tensors(lambda found: found.update({new: found.pop(old)}))


def filled(key: str, value: float, name: str = WEIGHTS) -> Change:
    return tensors(lambda found: found[key].view(-1)[3:4].fill_(value), name)
