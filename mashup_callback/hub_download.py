"""Downloading the candidates that passed the checks: exactly their files, verified, a few ahead of who uses them."""

import importlib.util
import itertools
import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, hf_hub_download

from .candidates import Candidate
from .distributed import in_turns, is_first_on_machine, place
from .errors import HubError
from .hub import Hub, as_list
from .hub_cache import cached, discard, has_digest, path_in_repository
from .hub_errors import TROUBLE, describe


logger = logging.getLogger(__name__)

# Candidates that are downloaded while another one is used.
AHEAD = 3
Item = TypeVar("Item")


def download(candidate: Candidate, hub: Hub) -> Candidate:
    """
    Downloads the files of a candidate into the Hub's cache, at its commit, and verifies their hashes.

    Args:
        candidate (`Candidate`):
            From `find_candidates`. One that is local, cached or unusable is returned as it is.
        hub (`Hub`):
            The connection.

    Returns:
        `Candidate`: with its `path`, or with the `reason` why there is none.
    """
    if not _is_remote(candidate):
        return candidate
    try:
        return cached(candidate) or _downloaded(candidate, hub)
    except TROUBLE as error:
        return replace(candidate, reason=f"its download failed: {describe(error, candidate.repo_id)}")


def download_candidates(candidates: Sequence[Item], hub: Hub | None = None) -> list[Item]:
    """
    Downloads all candidates that are on the Hub.

    Args:
        candidates (`Sequence`):
            From `find_candidates`.
        hub (`Hub`, *optional*):
            The connection; one of its own by default.

    Returns:
        `list`: The candidates, each with its `path` on this machine or the `reason` why there is none.
    """
    with arriving(candidates, hub or Hub(asks=is_first_on_machine())) as coming:
        return list(coming)


@contextmanager
def arriving(candidates: Sequence[Item], hub: Hub) -> Iterator[Iterator[Item]]:
    """
    Context with an iterator over the candidates in their order, each with its files on this machine.

    In a single process the next ones are downloaded while one is used. Several processes must agree on what there is
    before any goes on: one of each machine downloads everything first.

    Args:
        candidates (`Sequence`):
            Candidates, among which other things may be: they are passed on as they are.
        hub (`Hub`):
            The connection.
    """
    pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="mashup-download")
    coming = _ahead(candidates, hub, pool)
    try:
        yield coming if place()[1] == 1 else iter(in_turns(lambda: [*_ahead(candidates, hub, pool)]))
    finally:
        coming.close()
        pool.shutdown(cancel_futures=True)


def _is_remote(item: object) -> bool:
    return isinstance(item, Candidate) and item.repo_id is not None and item.path is None and item.reason is None


def _ahead(candidates: Sequence[Item], hub: Hub, pool: ThreadPoolExecutor) -> Generator[Item, None, None]:
    started = (pool.submit(download, item, hub) if _is_remote(item) else item for item in candidates)
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


def _downloaded(candidate: Candidate, hub: Hub) -> Candidate:
    digests = _digests(candidate, hub)
    paths = [_fetch(candidate, path, digest, hub) for path, digest in digests.items()]
    return replace(candidate, path=paths[0].parent)


def _digests(candidate: Candidate, hub: Hub) -> dict[str, str]:
    """Returns the hash of each file of the candidate as the Hub states it, in a reply of its own."""
    names = [path_in_repository(candidate, name) for name in candidate.files]
    address = f"/api/models/{candidate.repo_id}/paths-info/{candidate.revision}"
    entries, _ = hub.get_json(address, method="POST", data={"paths": names})
    known = {str(entry.get("path")): entry for entry in as_list(entries) if isinstance(entry, dict)}
    for name in names:
        lfs = known.get(name, {}).get("lfs")
        digest = lfs.get("oid") if isinstance(lfs, dict) else known.get(name, {}).get("oid")
        if not isinstance(digest, str) or len(digest) not in (40, 64):
            raise HubError(f"the Hub does not state the hash of {name}")
        known[name] |= {"digest": digest}
    sizes = [known[name].get("size") for name in names if name.endswith(".safetensors")]
    if candidate.bytes is not None and (None in sizes or sum(sizes) != candidate.bytes):
        raise HubError(f"the Hub states two sizes of its weights: {candidate.bytes:,} and {sizes} bytes")
    return {name: known[name]["digest"] for name in names}


def _fetch(candidate: Candidate, name: str, digest: str, hub: Hub) -> Path:
    for _ in range(2):
        before = hub.bytes_of_thread
        with hub.at_work():
            path = Path(hf_hub_download(candidate.repo_id, name, revision=candidate.revision))
        if importlib.util.find_spec("hf_xet") and not constants.HF_HUB_DISABLE_XET:
            # Its traffic does not go through the HTTP client.
            hub.received(max(0, path.stat().st_size - (hub.bytes_of_thread - before)))
        if path.is_symlink() and Path(os.readlink(path)).name != digest:
            # Under another name it would replace, or be taken for, another file of the cache.
            discard(path)
            raise HubError(f"the Hub states two hashes of {name}: {digest} and its ETag")
        if has_digest(path, digest):
            return path
        logger.warning("%s of %s came with the wrong content and is removed.", name, candidate.name)
        discard(path)
    raise HubError(f"{name} came twice with other content than its hash says, and was removed")
