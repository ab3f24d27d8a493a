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

from .adapter_config import CONFIG_NAME
from .candidates import WEIGHTS_NAME, Candidate


logger = logging.getLogger(__name__)

FILES = (CONFIG_NAME, WEIGHTS_NAME)
_LIBRARY = "mashup_callback"
_FIELDS = ("name", "repo_id", "subfolder", "revision", "run", "license", "bytes")


def cached_adapter(candidate: Candidate) -> Candidate | None:
    """
    Returns the candidate with the directory that holds its files in the Hub's cache, None if not all are there.

    A file in the cache has the name of its content's hash. One whose content is another, because it was damaged or a
    process was killed before it had verified it, is removed and so will be downloaded again.

    Args:
        candidate (`Candidate`):
            A candidate on the Hub with a revision; a branch or tag is looked up as it was when last downloaded.
    """
    found = [
        try_to_load_from_cache(candidate.repo_id, path_in_repository(candidate, name), revision=candidate.revision)
        for name in FILES
    ]
    # A file that is known not to exist is cached as an object that is no path.
    paths = [Path(path) for path in found if isinstance(path, str)]
    if len(paths) < len(FILES) or not all(map(_is_genuine, paths)):
        return None
    depth = len(Path(path_in_repository(candidate, CONFIG_NAME)).parts)
    revision = paths[0].parents[depth - 1].name
    return dataclasses.replace(
        candidate, path=paths[0].parent, revision=revision, bytes=paths[FILES.index(WEIGHTS_NAME)].stat().st_size
    )


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
        return [Candidate(**{name: value[name] for name in _FIELDS}) for value in values]
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
