"""Output directories: one that is replaced as a whole or not at all, and a temporary one beside it."""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .distributed import is_main_process, on_main_process
from .report import FAILED_NAME, MARK, REPORT_NAME


_INDEX, _ADAPTER = "model.safetensors.index.json", "adapter_model.safetensors"
_WRITTEN_LATER = {FAILED_NAME, f"{FAILED_NAME}.tmp", f"{REPORT_NAME}.tmp"}
_RECORDS = {REPORT_NAME, *_WRITTEN_LATER, "ranking.png", "README.md", "mergekit.yaml"}
_ADAPTER_FILES = _RECORDS | {"adapter_config.json", _ADAPTER}
_MODEL_FILES = _RECORDS | {"config.json", "generation_config.json", "model.safetensors", _INDEX}
# mergekit saves a tokenizer with a merge whose vocabularies differ.
_MODEL_FILES |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
_MODEL_FILES |= {"chat_template.jinja", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"}
_HEAD_BYTES = 256


class StorageError(ValueError):
    """Writing to a directory would cost the user files."""


@contextmanager
def replacing(directory: str | os.PathLike) -> Iterator[Path]:
    """Gives an empty directory to write to, which takes the place of `directory` unless the block raises."""
    target = Path(os.path.realpath(directory))
    refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
    draft.mkdir()
    try:
        yield draft
        _swap_in(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_foreign(directory: str | os.PathLike, name: str | os.PathLike | None = None) -> None:
    """Raises `StorageError`, which calls a directory `name`, if it holds other files than this package's."""
    path, name = Path(directory), name or directory
    if not path.exists():
        return
    if not path.is_dir():
        raise StorageError(f"{name} is a file, expected a directory to write to. Choose another path.")
    names = {entry.name: entry.is_file(follow_symlinks=False) for entry in os.scandir(path)}
    known = _ADAPTER_FILES if _ADAPTER in names else _MODEL_FILES | _shards(path)
    others = sorted(entry for entry, is_file in names.items() if not is_file or entry not in known)
    if others:
        raise StorageError(
            f"{name} holds {others[0]} and would be replaced, expected an empty directory or an earlier merge. Choose "
            "another path."
        )
    if names and not _is_marked(path, names):
        raise StorageError(
            f"{name} holds {min(names)} and would be replaced, expected an empty directory or an earlier merge with "
            "the mark of mashup_callback: this is a trained adapter or model, or a merge by an older version. Choose "
            "another path, or remove it yourself."
        )


def refuse_overlap(output: str | os.PathLike, inputs: Iterable[str | os.PathLike]) -> None:
    """Raises `StorageError` for an output directory that is, contains or lies inside an input."""
    target = Path(os.path.realpath(output))
    for path in inputs:
        source = Path(os.path.realpath(path))
        if target.is_relative_to(source) or source.is_relative_to(target):
            raise StorageError(
                f"The output {output} is, contains or lies inside the input {path}, expected a directory apart from "
                "all inputs. Choose another path."
            )


class Workspace:
    """A temporary directory beside the mashup's, made when first asked for: every process must ask at that point."""

    def __init__(self, directory: Path) -> None:
        self._target = directory
        self._path: Path | None = None

    def path(self) -> Path:
        """Returns the directory."""
        if self._path is None:
            self._path = on_main_process(self._make)
        return self._path

    def new(self, prefix: str) -> Path:
        """Returns a name in the directory that nothing has yet."""
        path = self.path()
        return on_main_process(lambda: Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=path)) / "model")

    def close(self) -> None:
        """Removes the directory with all that is left in it."""
        if self._path is not None and is_main_process():
            shutil.rmtree(self._path, ignore_errors=True)

    def _make(self) -> Path:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{self._target.name}-", dir=self._target.parent)).resolve()


def _swap_in(draft: Path, target: Path) -> None:
    """Renames the draft to the target; a directory already there is kept aside until that has succeeded."""
    for path in (*draft.iterdir(), draft):
        _flush(path)
    aside = draft.with_name(draft.name + ".old")
    if target.exists():
        os.rename(target, aside)
    try:
        # Once more, as it may have been written to since, and out of the way nobody writes to it.
        refuse_foreign(aside, target)
        os.rename(draft, target)
    except BaseException:
        if aside.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_marked(directory: Path, names: Iterable[str]) -> bool:
    if _ADAPTER in names:
        return _carries_mark(directory / _ADAPTER)
    # mergekit's shards cannot carry the mark, so that of the report counts for what was there when it was written.
    times = {name: (directory / name).stat().st_mtime_ns for name in names if name not in _WRITTEN_LATER}
    if REPORT_NAME not in times or not _carries_mark(directory / REPORT_NAME):
        return False
    return max(times.values()) == times[REPORT_NAME]


def _carries_mark(path: Path) -> bool:
    """Whether a JSON file, or a safetensors file by its header, begins with the mark."""
    with path.open("rb") as file:
        return json.dumps(MARK, separators=(",", ":"))[1:-1].encode() in file.read(_HEAD_BYTES).replace(b" ", b"")


def _shards(directory: Path) -> set[str]:
    """Returns the files of a model in shards."""
    try:
        names = set(json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()
    return {name for name in names if str(name).endswith(".safetensors")}
