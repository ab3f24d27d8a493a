"""Finding adapters on the Hub, and judging them by configuration and header before any weights are downloaded."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote as quote_path

from .adapter_config import CONFIG_NAME, MAX_CONFIG_BYTES, parse_config
from .adapters import check_adapter, parse_adapter, read_adapter
from .candidate_spec import Spec
from .candidates import WEIGHTS_NAME, Candidate
from .hub import Hub, as_list
from .hub_cache import FILES, cached_adapter, path_in_repository, recall, remember
from .hub_errors import TROUBLE, HubError, describe
from .hub_listing import PROPERTIES, Lead, leads
from .safetensors_header import header_length
from .untrusted import AdapterError, quote


# Enough for the headers of nearly all adapters, so that one request reads them.
HEADER_BYTES = 2**17
_THREADS = 8
_COMMIT = re.compile("[0-9a-f]{40}")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFilter:
    """
    What a candidate from the Hub must be.

    Args:
        base_model (`str`, *optional*): Name or path of the base model.
        layers (`Mapping[str, tuple[int, int]]`, *optional*): Its linear layers: name -> (in_features, out_features).
        allow_licenses (`Sequence[str]`, *optional*): Licences that it may have; None allows all.
        allow_authors (`Sequence[str]`, *optional*): Users and organisations it may come from; None allows all.
        max_candidates (`int`, *optional*): How many are looked for.
    """

    base_model: str | None = None
    layers: Mapping[str, tuple[int, int]] | None = None
    allow_licenses: Sequence[str] | None = None
    allow_authors: Sequence[str] | None = None
    max_candidates: int | None = None


def find_on_hub(spec: Spec, wanted: HubFilter, hub: Hub) -> list[Candidate]:
    """
    Finds the adapters that an entry of the grammar describes on the Hub. No weights are downloaded.

    Args:
        spec (`Spec`):
            A repository, a search or a collection.
        wanted (`HubFilter`):
            What a candidate must be. A search lists adapters of its base model only.
        hub (`Hub`):
            The connection. When it is offline or down, what the same entry found before is looked up in the cache.

    Returns:
        `list[Candidate]`: in the Hub's order, with `revision` a commit; those that cannot be used have a `reason`, and
        so has the entry itself when it cannot be looked up. `path` is set for those that are in the cache.
    """
    key = f"{spec} {wanted.base_model}" if spec.kind == "search" else str(spec)
    known = recall(key)
    if not hub.asks:
        return [_entry(spec, "another process of this machine did not find it")] if known is None else known
    found = None if hub.down else _find_pinned(spec, wanted, known)
    if found is None and not hub.down:
        try:
            found = _looked_up(leads(spec, wanted.base_model, hub), wanted, hub)
        except TROUBLE as error:
            if not hub.down:
                return [_entry(spec, describe(error, spec.repo_id))]
        if not hub.down:
            _remember(key, [item for item in found if item.reason is None])
    if hub.down:
        return _find_in_cache(spec, wanted, known, hub.down)
    return found


def _remember(key: str, usable: Sequence[Candidate]) -> None:
    remember(key, usable)
    for item in usable:
        # Pinned to this commit it will be looked up without the Hub, which alone knows its licence.
        remember(f"{item.name}@{item.revision}", [item])


def _entry(spec: Spec, reason: str) -> Candidate:
    return Candidate(name=str(spec), reason=reason)


def _find_pinned(spec: Spec, wanted: HubFilter, known: Sequence[Candidate] | None) -> list[Candidate] | None:
    """Returns a candidate that is pinned to a commit and in the cache, for which nothing has to be asked."""
    if spec.kind != "repo" or not _COMMIT.fullmatch(spec.revision or ""):
        return None
    candidates = known or [_candidate(Lead(spec.repo_id), spec.subfolder or "", spec.revision, None)]
    found = [cached_adapter(candidate) for candidate in candidates]
    # The licence is on the Hub only.
    if None in found or (wanted.allow_licenses is not None and not known):
        return None
    return [_judged(item, wanted) for item in found]


def _find_in_cache(spec: Spec, wanted: HubFilter, known: Sequence[Candidate] | None, down: str) -> list[Candidate]:
    if not known and spec.kind == "repo":
        known = [_candidate(Lead(spec.repo_id), spec.subfolder or "", spec.revision or "main", None)]
    if known is None:
        return [_entry(spec, f"{down}, and it was never looked up on this machine before")]
    return [_from_cache(item, wanted, down) for item in known] or [_entry(spec, f"{down}; it found nothing before")]


def _from_cache(candidate: Candidate, wanted: HubFilter, down: str) -> Candidate:
    try:
        found = cached_adapter(candidate)
    except OSError as error:
        return replace(candidate, reason=f"its files in the cache cannot be read: {error}")
    if found is None:
        names = " ".join(path_in_repository(candidate, name) for name in FILES)
        missing = f"hf download {candidate.repo_id} {names} --revision {candidate.revision}"
        return replace(candidate, reason=f"{down}, and it is not in the cache; get it with `{missing}`")
    return _judged(found, wanted)


def _looked_up(listed: Sequence[Lead], wanted: HubFilter, hub: Hub) -> list[Candidate]:
    """Looks at the repositories in their order, several at a time, until enough can be used."""
    found: list[Candidate] = []
    bound = wanted.max_candidates
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mashup-hub") as pool:
        for start in range(0, len(listed), _THREADS):
            if bound is not None and sum(item.reason is None for item in found) >= bound:
                left = listed[start:]
                return found + [_refused(lead, f"not looked at: beyond max_candidates={bound}") for lead in left]
            part = pool.map(lambda lead: _look(lead, wanted, hub), listed[start : start + _THREADS])
            found += itertools.chain.from_iterable(part)
    return found


def _look(lead: Lead, wanted: HubFilter, hub: Hub) -> list[Candidate]:
    try:
        return [_checked(candidate, wanted, hub) for candidate in _candidates_of(lead, wanted, hub)]
    except TROUBLE as error:
        return [_refused(lead, describe(error, lead.repo_id))]


def _candidates_of(lead: Lead, wanted: HubFilter, hub: Hub) -> list[Candidate]:
    author = lead.repo_id.split("/")[0]
    if not _allowed(author, wanted.allow_authors):
        raise AdapterError(f"its author {author} is not in allow_authors")
    info = lead.info
    if info is None:
        path = f"/api/models/{lead.repo_id}/revision/{quote_path(lead.revision, safe='')}"
        info, _ = hub.get_json(path, params={"expand": list(PROPERTIES)})
    revision, license, files = _facts(info)
    if not _allowed(license, wanted.allow_licenses):
        raise AdapterError(f"its licence {quote(license) if license else '(none stated)'} is not in allow_licenses")
    return [_candidate(lead, folder, revision, license) for folder in _folders(files, lead.subfolder)]


def _facts(info: Any) -> tuple[str, str | None, list[str]]:
    """Returns the commit, the licence and the files that the Hub states for a repository."""
    info = info if isinstance(info, dict) else {}
    revision = info.get("sha")
    if not isinstance(revision, str) or not _COMMIT.fullmatch(revision):
        raise HubError("the Hub does not say which commit it is at")
    tags = [tag for tag in as_list(info.get("tags")) if isinstance(tag, str)]
    license = next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None)
    names = [item.get("rfilename") for item in as_list(info.get("siblings")) if isinstance(item, dict)]
    return revision, license, [name for name in names if _is_safe(name)]


def _is_safe(path: Any) -> bool:
    """Whether a path stays inside the repository, and inside the cache's folder for it."""
    parts = path.replace("\\", "/").split("/") if isinstance(path, str) and path.isprintable() else [""]
    return not {"", ".", ".."} & {*parts}


def _folders(files: Sequence[str], subfolder: str | None) -> list[str]:
    """Returns the folder asked for or the root, if it holds an adapter; else every folder that does."""
    there = set(files)
    folders = [name[: -len(CONFIG_NAME)].rstrip("/") for name in files if f"/{name}".endswith(f"/{CONFIG_NAME}")]
    below = f"{subfolder}/" if subfolder else ""
    folders = [name for name in folders if name == (subfolder or "")] or [x for x in folders if x.startswith(below)]
    usable = [name for name in folders if f"{name}/{WEIGHTS_NAME}".lstrip("/") in there]
    if usable:
        return usable
    if folders and any(name.endswith((".bin", ".pt", ".pth")) for name in files):
        raise AdapterError(f"it has only pickled weights, which are never opened, and no {WEIGHTS_NAME}")
    raise AdapterError(f"it holds no adapter, expected {CONFIG_NAME} and {WEIGHTS_NAME}")


def _allowed(value: str | None, allowed: Iterable[str] | None) -> bool:
    return allowed is None or (value or "").lower() in {item.lower() for item in allowed}


def _candidate(lead: Lead, folder: str, revision: str, license: str | None) -> Candidate:
    name = f"{lead.repo_id}/{folder}" if folder else lead.repo_id
    parent, _, last = folder.rpartition("/")
    run = f"{lead.repo_id}/{parent}".rstrip("/") if last.startswith("checkpoint-") else name
    return Candidate(name, repo_id=lead.repo_id, subfolder=folder or None, revision=revision, run=run, license=license)


def _refused(lead: Lead, reason: str) -> Candidate:
    return Candidate(lead.name, repo_id=lead.repo_id, subfolder=lead.subfolder, run=lead.name, reason=reason)


def _checked(candidate: Candidate, wanted: HubFilter, hub: Hub) -> Candidate:
    found = cached_adapter(candidate)
    if found is not None:
        return _judged(found, wanted)
    try:
        return _check_remotely(candidate, wanted, hub)
    except TROUBLE as error:
        return replace(candidate, reason=describe(error, candidate.repo_id))


def _judged(candidate: Candidate, wanted: HubFilter) -> Candidate:
    try:
        if not _allowed(candidate.license, wanted.allow_licenses):
            raise AdapterError(f"its licence {candidate.license} is not in allow_licenses")
        adapter = read_adapter(candidate)
        if wanted.layers is not None:
            check_adapter(adapter, wanted.layers, wanted.base_model)
    except AdapterError as error:
        return replace(candidate, reason=str(error))
    return candidate


def _check_remotely(candidate: Candidate, wanted: HubFilter, hub: Hub) -> Candidate:
    """Checks the configuration and the weights' header, by one request each, as those of a local adapter."""
    config, size = hub.get_range(_address(candidate, CONFIG_NAME), 0, MAX_CONFIG_BYTES)
    if size > len(config):
        raise AdapterError(f"{CONFIG_NAME} has {size:,} bytes, of which {len(config):,} came; expected a small file")
    parse_config(config)
    address = _address(candidate, WEIGHTS_NAME)
    header, size = hub.get_range(address, 0, HEADER_BYTES)
    end = header_length(header) + 8
    if len(header) < end <= size:
        header += hub.get_range(address, len(header), end)[0]
    adapter = parse_adapter(candidate, config, header, size)
    if wanted.layers is not None:
        check_adapter(adapter, wanted.layers, wanted.base_model)
    return replace(candidate, bytes=size)


def _address(candidate: Candidate, name: str) -> str:
    return f"/{candidate.repo_id}/resolve/{candidate.revision}/{quote_path(path_in_repository(candidate, name))}"
