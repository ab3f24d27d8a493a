"""Downloading the candidates that passed the checks: exactly their files, verified, a few ahead of who uses them."""

import hashlib
import itertools
import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from ..distributed import is_main_process, local_main_first, process_index_and_count
from ..errors import AdapterError, HubError
from ..formats import INDEX_NAME, MAX_JSON_BYTES, parse_index, read_limited, shard_names
from .candidate import Candidate
from .hub import RECOVERABLE, Hub, describe
from .search import COMMIT, path_in_repository


logger = logging.getLogger(__name__)

# Candidates that are downloaded while another one is used.
AHEAD = 3


def download_candidate(candidate: Candidate, hub: Hub) -> Candidate:
    """Downloads a candidate into the Hub's cache and verifies it; returns it with its `path`, or with the `reason`."""
    if not _is_remote(candidate):
        return candidate
    try:
        if found := cached(candidate):
            return found
        stated = _stated(candidate, hub)
        paths = [_fetch(candidate, path, digest, size, hub) for path, (digest, size) in stated.items()]
        return replace(candidate, path=paths[0].parent)
    except RECOVERABLE as error:
        return replace(candidate, reason=f"its download failed: {describe(error, candidate.repo_id)}")


@contextmanager
def arriving(candidates: Sequence[Candidate], hub: Hub) -> Iterator[Iterator[Candidate]]:
    """
    Context with an iterator over the candidates in their order, each with its files on this machine.

    The next ones are downloaded while one is used. With several processes, one of each machine downloads everything
    first: they must agree on what there is.
    """
    pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="mashup-download")
    # The main process found them: where they are in its machine's cache says nothing of other machines.
    here = [item if is_main_process() or not item.repo_id else replace(item, path=None) for item in candidates]
    coming = _ahead(here, hub, pool)
    try:
        _, processes = process_index_and_count()
        yield coming if processes == 1 else iter(local_main_first(lambda: [*_ahead(here, hub, pool)]))
    finally:
        coming.close()
        pool.shutdown(cancel_futures=True)


def cached(candidate: Candidate) -> Candidate | None:
    """Returns the candidate with its directory in the Hub's cache, None if not all files are there and genuine."""
    files = tuple(dict.fromkeys([*candidate.files, *_shards(candidate)]))
    found = {name: _in_cache(candidate, name) for name in files}
    if not found or None in found.values() or not all(map(_is_genuine, found.values())):
        return None
    size = sum(path.stat().st_size for name, path in found.items() if name.endswith(".safetensors"))
    return replace(candidate, files=files, bytes=size, path=found[files[0]].parent)


def snapshot(repo_id: str, revision: str | None) -> Path | None:
    """Returns the folder in the Hub's cache of a revision as it was last downloaded, None if there is none."""
    home = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    named = home / "refs" / (revision or "main")
    if COMMIT.fullmatch(revision or ""):
        folders = [home / "snapshots" / revision]
    elif named.is_file():
        folders = [home / "snapshots" / named.read_text().strip()]
    else:
        # What is downloaded at a commit leaves no reference behind.
        folders = [] if revision not in (None, "main") else [*(home / "snapshots").glob("*")]
    return max((path for path in folders if path.is_dir()), key=os.path.getmtime, default=None)


def _is_remote(item: Candidate) -> bool:
    return item.repo_id is not None and item.path is None and item.reason is None


def _ahead(candidates: Sequence[Candidate], hub: Hub, pool: ThreadPoolExecutor) -> Generator[Candidate, None, None]:
    started = (pool.submit(download_candidate, item, hub) if _is_remote(item) else item for item in candidates)
    waiting = deque(itertools.islice(started, AHEAD + 1))
    try:
        while waiting:
            item = waiting.popleft()
            yield item.result() if isinstance(item, Future) else item
            waiting.extend(itertools.islice(started, 1))
    finally:
        # Whoever stops early does not want the rest, and should not wait for it.
        if any(isinstance(item, Future) and not item.done() for item in waiting):
            hub.stop("the candidates are not needed any more")


def _stated(candidate: Candidate, hub: Hub) -> dict[str, tuple[str, int]]:
    """Returns hash and size of each file of the candidate as the Hub states them, in a reply of its own."""
    paths = [path_in_repository(candidate, name) for name in candidate.files]
    entries = hub.call(HfApi().get_paths_info, candidate.repo_id, paths, revision=candidate.revision)
    known = {entry.path: (entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.size) for entry in entries}
    for path in paths:
        digest, _ = known.get(path, (None, None))
        if not isinstance(digest, str) or len(digest) not in (40, 64):
            raise HubError(f"the Hub does not state the hash of {path}")
    sizes = [known[path][1] for path in paths if path.endswith(".safetensors")]
    if candidate.bytes is not None and (None in sizes or sum(sizes) != candidate.bytes):
        raise HubError(f"the Hub states two sizes of its weights: {candidate.bytes:,} and {sizes} bytes")
    return {path: known[path] for path in paths}


def _fetch(candidate: Candidate, name: str, digest: str, size: int, hub: Hub) -> Path:
    # First by itself: in hf_hub_download a busy Hub could not be told from a slow one.
    url = hf_hub_url(candidate.repo_id, name, revision=candidate.revision)
    etag = hub.call(get_hf_file_metadata, url).etag
    if etag != digest:
        # Under another name it would replace, or be taken for, another file of the cache.
        raise HubError(f"the Hub states two hashes of {name}: {digest} and its ETag")
    download = partial(hf_hub_download, candidate.repo_id, name, revision=candidate.revision)
    held = try_to_load_from_cache(candidate.repo_id, name, revision=candidate.revision)
    if isinstance(held, str) and _has_digest(Path(held), digest):
        return Path(held)
    for force in (isinstance(held, str), True):
        path = Path(hub.call(download, force_download=force, size=size))
        hub.received(path.stat().st_size)
        if _has_digest(path, digest):
            return path
        logger.warning("%s of %s came with the wrong content.", name, candidate.name)
    # This run has just written it, and no program should read it.
    _discard(path)
    raise HubError(f"{name} came twice with other content than its hash says, and was removed")


def _has_digest(path: Path, digest: str) -> bool:
    """Whether a file has the content that the Hub's hash says: SHA-256 of large files, or a git blob's SHA-1."""
    if len(digest) == 64:
        found = hashlib.sha256()
    else:
        found = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest() == digest


def _in_cache(candidate: Candidate, name: str) -> Path | None:
    path = try_to_load_from_cache(candidate.repo_id, path_in_repository(candidate, name), revision=candidate.revision)
    # A file that is known not to exist is cached as an object that is no path.
    return Path(path) if isinstance(path, str) else None


def _shards(candidate: Candidate) -> list[str]:
    """Returns the names of the shards that a model's index in the cache lists."""
    index = _in_cache(candidate, INDEX_NAME) if INDEX_NAME in candidate.files else None
    try:
        return shard_names(parse_index(read_limited(index, MAX_JSON_BYTES))) if index else []
    except AdapterError:
        return []


def _is_genuine(path: Path) -> bool:
    """Whether a file in the cache has the content that its name, a hash, says."""
    if not path.is_symlink():
        # The cache of a system without symbolic links does not keep the hash. It was verified when downloaded.
        return True
    digest = Path(os.readlink(path)).name
    return len(digest) in (40, 64) and _has_digest(path, digest)


def _discard(path: Path) -> None:
    """Removes a file from the Hub's cache: its name in the snapshot and its content, wherever the links lead."""
    for item in (path.resolve(), path):
        item.unlink(missing_ok=True)
