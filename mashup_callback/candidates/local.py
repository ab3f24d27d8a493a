"""Candidates on this machine: paths, globs and run directories, and which of them are the same."""

import hashlib
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..errors import AdapterError
from ..formats import (
    CONFIG_NAME,
    INDEX_NAME,
    MODEL_CONFIG_NAME,
    MODEL_WEIGHTS_NAME,
    WEIGHTS_NAME,
    adapter_hash,
    open_regular,
    read_adapter,
)
from .candidate import Candidate
from .spec import Spec, is_glob


logger = logging.getLogger(__name__)

# A directory of runs holds runs, and these hold adapters and checkpoints.
_DEPTH = 2
_SHARD = re.compile(r"adapter_model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)")
_END_BYTES = 2**16
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")
# What this package writes into a run's output directory, and the files that tell it from a run of that name.
_MASHUP, _REPORTS = "mashup", ("report.json", "failed.json")


def find_locally(spec: Spec, excluded: Sequence[str]) -> list[Candidate]:
    """Returns what a path or glob leads to in natural order, without what is in the excluded real paths."""
    path = Path(os.path.expanduser(spec.path))
    if os.path.lexists(path) and _skip(path, excluded):
        return [_candidate(path, reason="it is this run's own output or that of a mashup")]
    if os.path.lexists(path):
        reason = f"it holds no adapter, expected {CONFIG_NAME} and {WEIGHTS_NAME} in it or one level below"
        return list(_expand(path, excluded)) or [_candidate(path, reason=reason)]
    matches = _glob(path)
    found = _below(matches, excluded)
    if not found and _below(matches, ()):
        logger.warning("All that matches %s is below this run's own output_dir, expected runs elsewhere.", spec)
    elif not found:
        logger.warning("No adapter matches %s (yet): nothing to start from there.", spec)
    return found


def _below(matches: Sequence[Path], excluded: Sequence[str]) -> list[Candidate]:
    return [item for match in matches if not _skip(match, excluded) for item in _expand(match, excluded)]


def _glob(path: Path) -> list[Path]:
    literal = [*itertools.takewhile(lambda part: not is_glob(part), path.parts)]
    root, pattern = Path(*literal), str(Path(*path.parts[len(literal) :]))
    try:
        # pathlib's ** does not follow symbolic links, glob's does and can run in circles.
        parts = {match: match.relative_to(root).parts for match in root.glob(pattern)}
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{str(path)!r} is no glob: {error}. Use *, ?, [...], or ** as a whole part.") from error
    # As in a shell, what is hidden has to be named.
    return sorted(
        (
            match
            for match, names in parts.items()
            if not any(part.startswith(".") and part not in path.parts for part in names)
        ),
        key=_order,
    )


def _order(path: Path) -> tuple[object, ...]:
    """Sort key: by directory, finished adapters before checkpoints, checkpoint-2 before checkpoint-10."""
    return [_natural(part) for part in path.parent.parts], _is_checkpoint(path), _natural(path.name)


def _natural(name: str) -> list[tuple[int, str]]:
    # Every second piece is a number; other digits, as in "m²", are none.
    return [(int(piece), "") if at % 2 else (-1, piece) for at, piece in enumerate(re.split("([0-9]+)", name))]


def _is_checkpoint(path: Path) -> bool:
    return _CHECKPOINT.fullmatch(path.name) is not None


def _skip(path: Path, excluded: Sequence[str]) -> bool:
    real = os.path.realpath(path)
    if any(real == directory or real.startswith(os.path.join(directory, "")) for directory in excluded):
        return True
    reports = (parent / name for parent in (path, *path.parents) if parent.name == _MASHUP for name in _REPORTS)
    return any(map(os.path.exists, reports))


def _expand(directory: Path, excluded: Sequence[str], depth: int = _DEPTH) -> Iterator[Candidate]:
    """Yields what the directory itself is, then what the directories in it are."""
    try:
        entries = {entry.name: os.path.isdir(entry) for entry in os.scandir(directory)}
    except NotADirectoryError:
        return
    except OSError as error:
        yield _candidate(directory, reason=f"it cannot be read: {error}")
        return
    candidate = _describe(directory, entries)
    if candidate:
        yield candidate
    if depth == 0 or (candidate and _is_checkpoint(directory)):
        return
    children = [directory / name for name, is_dir in entries.items() if is_dir and not name.startswith(".")]
    for child in sorted(children, key=_order):
        if not _skip(child, excluded):
            yield from _expand(child, excluded, depth - 1)


def _describe(directory: Path, entries: Iterable[str]) -> Candidate | None:
    if CONFIG_NAME in entries and WEIGHTS_NAME in entries:
        return _candidate(directory, bytes=_size(directory / WEIGHTS_NAME))
    if CONFIG_NAME in entries:
        missing = f"{WEIGHTS_NAME} is missing: its training may have been interrupted"
        return _candidate(directory, reason=why_unusable(entries) or missing)
    shards = [name for name in entries if name.endswith(".safetensors")]
    if MODEL_CONFIG_NAME in entries and (shards or INDEX_NAME in entries):
        return _candidate(directory, kind="model", bytes=sum(_size(directory / name) or 0 for name in shards))
    if MODEL_CONFIG_NAME in entries and any(name.endswith(".bin") for name in entries):
        return _candidate(directory, kind="model", reason=why_unusable(entries))
    return None


def why_unusable(names: Iterable[str]) -> str | None:
    """Returns why no weights among the files of an adapter or a model can be used, None if nothing there shows it."""
    names = {*names}
    if CONFIG_NAME in names and any(map(_SHARD.fullmatch, names)):
        return (
            f"its weights are split over several files, expected one {WEIGHTS_NAME}: load it with peft and save it "
            "again with a larger `max_shard_size`"
        )
    pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    for config, weights in ((CONFIG_NAME, WEIGHTS_NAME), (MODEL_CONFIG_NAME, MODEL_WEIGHTS_NAME)):
        if config in names and pickled:
            return f"it has only pickled weights, which are never opened, and no {weights}"
    return None


def _candidate(
    directory: Path, kind: str = "adapter", bytes: int | None = None, reason: str | None = None
) -> Candidate:
    return Candidate(str(directory), kind, directory, run=_run_of(directory), bytes=bytes, reason=reason)


def _run_of(directory: Path) -> str:
    """Returns the run directory: the one that holds `checkpoint-*`, the adapter's own or one above it."""
    real = Path(os.path.realpath(directory))
    for path in (real, real.parent):
        if _is_checkpoint(path):
            return str(path.parent)
    for path in (real, real.parent):
        with suppress(OSError):
            if any(map(_CHECKPOINT.fullmatch, os.listdir(path))):
                return str(path)
    return str(real)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def reject_duplicates(found: Sequence[Candidate], known: dict[Path, str | None]) -> list[Candidate]:
    """
    Rejects all but one of the adapters with the same content, and keeps a run's final one over its checkpoints.

    What was read of a directory as a whole is in `known`, and is not read again.
    """
    found = list(found)
    here = [index for index, item in enumerate(found) if _is_adapter_here(item)]
    here.sort(key=lambda index: _is_checkpoint(found[index].path))
    # Trained files of one size differ at their ends: only those that do not are read as a whole.
    ends = {index: (found[index].bytes, _end(found[index].path)) for index in here}
    counts = Counter(ends.values())
    kept: dict[str, str] = {}
    for index in here:
        path, content = found[index].path, None
        if counts[ends[index]] > 1:
            content = known[path] = known[path] if path in known else _content(path)
        if content in kept:
            found[index] = replace(found[index], reason=f"identical to {kept[content]}")
        elif content is not None:
            kept[content] = found[index].name
    return found


def _end(directory: Path) -> str:
    """Returns a hash of the last bytes of an adapter's weights; empty where they cannot be read."""
    try:
        with os.fdopen(open_regular(directory / WEIGHTS_NAME), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
            return hashlib.sha256(file.read(_END_BYTES)).hexdigest()
    except (AdapterError, OSError):
        return ""


def _is_adapter_here(candidate: Candidate) -> bool:
    return candidate.kind == "adapter" and candidate.path is not None and candidate.reason is None


def _content(directory: Path) -> str | None:
    """Returns a hash of what an adapter computes; None where it cannot be read."""
    try:
        return adapter_hash(read_adapter(directory))
    except (AdapterError, OSError):
        return None
