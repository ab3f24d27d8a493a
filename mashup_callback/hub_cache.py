"""What of the Hub is on this machine: cached files, verified before use, and what earlier searches found."""

import dataclasses
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import cached_assets_path

from .candidates import Candidate
from .errors import AdapterError
from .formats.checkpoint_files import CONFIG_NAME, INDEX_NAME, MAX_JSON_BYTES, parse_index, shard_names
from .formats.files import read_limited
from .formats.vocabulary import TOKENIZER_NAME, VOCABULARY_NAME


logger = logging.getLogger(__name__)

_LIBRARY = "mashup_callback"
_FIELDS = ("name", "kind", "repo_id", "subfolder", "revision", "run", "license", "bytes", "files")


def cached(candidate: Candidate) -> Candidate | None:
    """
    Returns the candidate with the directory that holds its files in the Hub's cache, None if not all are there.

    A file in the cache has the name of its content's hash. One whose content is another, because it was damaged or a
    process was killed before it had verified it, is removed and so will be downloaded again.

    Args:
        candidate (`Candidate`):
            A candidate on the Hub with a revision; a branch or tag is looked up as it was when last downloaded.
    """
    found = {name: _in_cache(candidate, name) for name in candidate.files}
    if not found or None in found.values() or not all(map(_is_genuine, found.values())):
        return None
    first = candidate.files[0]
    depth = len(Path(path_in_repository(candidate, first)).parts)
    return dataclasses.replace(
        candidate,
        path=found[first].parent,
        revision=found[first].parents[depth - 1].name,
        bytes=sum(path.stat().st_size for name, path in found.items() if name.endswith(".safetensors")),
    )


def cached_model(candidate: Candidate) -> Candidate | None:
    """
    Returns the full model that is in the cache in the place of a candidate, None if there is none or not all of it:
    for when nobody can say what the repository holds.

    Args:
        candidate (`Candidate`):
            A candidate on the Hub with a revision.
    """
    index = _in_cache(candidate, INDEX_NAME)
    try:
        shards = shard_names(parse_index(read_limited(index, MAX_JSON_BYTES)) if index else None)
    except AdapterError:
        return None
    optional = [name for name in (INDEX_NAME, TOKENIZER_NAME, VOCABULARY_NAME) if _in_cache(candidate, name)]
    return cached(dataclasses.replace(candidate, kind="model", files=(CONFIG_NAME, *optional, *shards)))


def _in_cache(candidate: Candidate, name: str) -> Path | None:
    path = try_to_load_from_cache(candidate.repo_id, path_in_repository(candidate, name), revision=candidate.revision)
    # A file that is known not to exist is cached as an object that is no path.
    return Path(path) if isinstance(path, str) else None


def path_in_repository(candidate: Candidate, name: str) -> str:
    """Returns the path in its repository of a candidate's file."""
    return f"{candidate.subfolder}/{name}" if candidate.subfolder else name


def has_digest(path: Path, digest: str) -> bool:
    """
    Whether a file has the content that the Hub's hash of it says.

    Args:
        path (`Path`):
            The file.
        digest (`str`):
            SHA-256 in hex of large files (64 digits), or SHA-1 of the git blob of small ones (40 digits).
    """
    if len(digest) == 64:
        found = hashlib.sha256()
    else:
        found = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest() == digest


def discard(path: Path) -> None:
    """Removes a file from the Hub's cache: its name in the snapshot and its content, wherever the links lead."""
    content = {path, Path(os.path.realpath(path))}
    if path.is_symlink():
        content.add(path.parent / os.readlink(path))
    for item in content:
        item.unlink(missing_ok=True)


def remember(key: str, found: Sequence[Candidate]) -> None:
    """
    Records what is on the Hub for an entry of the grammar, for when the Hub cannot be asked.

    Args:
        key (`str`):
            The entry, with all that its result depends on.
        found (`Sequence[Candidate]`):
            The candidates that can be used.
    """
    values = [{name: getattr(candidate, name) for name in _FIELDS} for candidate in found]
    try:
        path = _record(key)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}")
        temporary.write_text(json.dumps({"key": key, "candidates": values}), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        logger.warning("What was found for %s cannot be recorded for offline use: %s", key, error)


def recall(key: str) -> list[Candidate] | None:
    """Returns what [`remember`] recorded, None if there is nothing."""
    try:
        values = json.loads(_record(key).read_text(encoding="utf-8"))["candidates"]
        return [
            Candidate(**{name: value[name] for name in _FIELDS} | {"files": (*value["files"],)}) for value in values
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record(key: str) -> Path:
    name = hashlib.sha256(f"{constants.ENDPOINT} {key}".encode()).hexdigest()
    return cached_assets_path(_LIBRARY, "found", "specs") / f"{name}.json"


def _is_genuine(path: Path) -> bool:
    if not path.is_symlink():
        # The cache of a system without symbolic links does not keep the hash. It was verified when downloaded.
        return True
    digest = Path(os.readlink(path)).name
    if len(digest) in (40, 64) and has_digest(path, digest):
        return True
    logger.warning("%s in the cache does not have the content that its name says; it is removed.", path)
    discard(path)
    return False
