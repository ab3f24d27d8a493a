"""Output directories: one that is replaced as a whole or not at all, and a temporary one beside it."""

import fcntl
import json
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from .distributed import is_main_process, on_main_process
from .report import FAILED_NAME, MARK, REPORT_NAME


logger = logging.getLogger(__name__)

_INDEX, _ADAPTER = "model.safetensors.index.json", "adapter_model.safetensors"
_WRITTEN_LATER = {FAILED_NAME, f"{FAILED_NAME}.tmp", f"{REPORT_NAME}.tmp"}
_RECORDS = {REPORT_NAME, *_WRITTEN_LATER, "ranking.png", "README.md", "mergekit.yaml"}
_ADAPTER_FILES = _RECORDS | {"adapter_config.json", _ADAPTER}
_MODEL_FILES = _RECORDS | {"config.json", "generation_config.json", "model.safetensors", _INDEX}
# mergekit saves a tokenizer with a merge whose vocabularies differ.
_MODEL_FILES |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
_MODEL_FILES |= {"chat_template.jinja", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"}
_HEAD_BYTES = 256
_ASIDE = ".old"


class StorageError(ValueError):
    """Writing to a directory would cost the user files."""


@contextmanager
def replacing(directory: str | os.PathLike) -> Iterator[Path]:
    """Gives an empty directory to write to, which takes the place of `directory` unless the block raises."""
    target = Path(os.path.realpath(directory))
    prepare(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
    draft.mkdir()
    try:
        yield draft
        _swap_in(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def prepare(directory: str | os.PathLike) -> None:
    """Puts back an earlier merge that a killed run had moved aside; `StorageError` for other files than ours."""
    target = Path(os.path.realpath(directory))
    with _locked(target.parent):
        _put_back(target)
        refuse_foreign(directory)


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


@contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """Context that SIGTERM ends as an exception does, where it would end the process at once; then it does that."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(*args: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Terminated(BaseException):
    """SIGTERM came; no stage takes it for a failure of its own."""


def _swap_in(draft: Path, target: Path) -> None:
    """Renames the draft to the target; a directory already there is kept aside until that has succeeded."""
    for path in (*draft.iterdir(), draft):
        _flush(path)
    aside = draft.with_name(draft.name + _ASIDE)
    with _locked(target.parent):
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
        if aside.exists():
            # What is half removed must not be taken for what was moved aside.
            os.rename(aside, draft)
    shutil.rmtree(draft, ignore_errors=True)
    _flush(target.parent)


def _put_back(target: Path) -> None:
    if target.exists() or not target.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}{re.escape(_ASIDE)}")
    moved = [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    for path in sorted(moved, key=lambda path: path.stat().st_ctime, reverse=True):
        with suppress(OSError, StorageError):
            refuse_foreign(path)
            os.rename(path, target)
            logger.warning("%s was being replaced when a run was killed; it is as before now.", target)
            return


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Context in which no other run replaces a directory in this one, where the file system knows locks."""
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _flush(path: Path) -> None:
    # Some file systems flush no directories, such as those that a virtual machine shares.
    with suppress(OSError) if path.is_dir() else nullcontext():
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
