"""Finding adapters and full models on the Hub, or in its cache when it cannot be asked."""

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import quote as quote_path

from .candidate_spec import Spec
from .candidates import Candidate
from .errors import AdapterError
from .formats.files import quote
from .hub import Hub
from .hub_cache import cached, cached_model, path_in_repository, recall, remember
from .hub_contents import COMMIT, candidate_at, held_candidates, repository_facts
from .hub_errors import TROUBLE, describe
from .hub_judging import HubFilter, judge_local, judge_remotely
from .hub_listing import PROPERTIES, Lead, leads


_THREADS = 8


def find_on_hub(spec: Spec, wanted: HubFilter, hub: Hub) -> list[Candidate]:
    """
    Finds the adapters and full models that an entry of the grammar describes on the Hub. No weights are downloaded.

    Args:
        spec (`Spec`):
            A repository, a search or a collection.
        wanted (`HubFilter`):
            What a candidate must be. A search lists what was made of its base model only.
        hub (`Hub`):
            The connection. When it is offline or down, what the same entry found before is looked up in the cache.

    Returns:
        `list[Candidate]`: in the Hub's order, with `revision` a commit; those that cannot be used have a `reason`, and
        so has the entry itself when it cannot be looked up. `path` is set for those that are in the cache.
    """
    key = f"{spec} {wanted.base_model}{' models' * wanted.search_models}" if spec.kind == "search" else str(spec)
    known = recall(key)
    if not hub.asks:
        return [_entry(spec, "another process of this machine did not find it")] if known is None else known
    found = None if hub.down else _find_pinned(spec, wanted, known)
    if found is None and not hub.down:
        try:
            relations = ("adapter", "finetune") if wanted.search_models else ("adapter",)
            found = _looked_up(leads(spec, wanted.base_model, hub, relations), wanted, hub)
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
    if spec.kind != "repo" or not COMMIT.fullmatch(spec.revision or ""):
        return None
    candidates = known or [candidate_at(Lead(spec.repo_id), spec.subfolder or "", spec.revision)]
    found = [cached(candidate) for candidate in candidates]
    # The licence is on the Hub only.
    if None in found or (wanted.allow_licenses is not None and not known):
        return None
    return [_judged(item, wanted) for item in found]


def _find_in_cache(spec: Spec, wanted: HubFilter, known: Sequence[Candidate] | None, down: str) -> list[Candidate]:
    if not known and spec.kind == "repo":
        known = [candidate_at(Lead(spec.repo_id), spec.subfolder or "", spec.revision or "main")]
    if known is None:
        return [_entry(spec, f"{down}, and it was never looked up on this machine before")]
    return [_from_cache(item, wanted, down) for item in known] or [_entry(spec, f"{down}; it found nothing before")]


def _from_cache(candidate: Candidate, wanted: HubFilter, down: str) -> Candidate:
    try:
        found = cached(candidate) or cached_model(candidate)
    except OSError as error:
        return replace(candidate, reason=f"its files in the cache cannot be read: {error}")
    if found is None:
        names = " ".join(path_in_repository(candidate, name) for name in candidate.files)
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
        return _candidates_of(lead, wanted, hub)
    except TROUBLE as error:
        return [_refused(lead, describe(error, lead.repo_id))]


def _candidates_of(lead: Lead, wanted: HubFilter, hub: Hub) -> list[Candidate]:
    _require_author(lead.repo_id, wanted)
    info = lead.info
    if info is None:
        path = f"/api/models/{lead.repo_id}/revision/{quote_path(lead.revision, safe='')}"
        info, _ = hub.get_json(path, params={"expand": list(PROPERTIES)})
    facts = repository_facts(info)
    if not _allowed(facts.license, wanted.allow_licenses):
        stated = quote(facts.license) if facts.license else "(none stated)"
        raise AdapterError(f"its licence {stated} is not in allow_licenses")
    found = held_candidates(lead, facts)
    return [_checked(candidate, wanted, hub, facts.files) for candidate in found]


def _require_author(repo_id: str, wanted: HubFilter) -> None:
    author = repo_id.split("/")[0]
    if not _allowed(author, wanted.allow_authors):
        raise AdapterError(f"its author {author} is not in allow_authors")


def _allowed(value: str | None, allowed: Iterable[str] | None) -> bool:
    return allowed is None or (value or "").lower() in {item.lower() for item in allowed}


def _refused(lead: Lead, reason: str) -> Candidate:
    return Candidate(lead.name, repo_id=lead.repo_id, subfolder=lead.subfolder, run=lead.name, reason=reason)


def _checked(candidate: Candidate, wanted: HubFilter, hub: Hub, paths: Sequence[str]) -> Candidate:
    # Which shards a model has is known once its index was read, now or before.
    before = recall(f"{candidate.name}@{candidate.revision}")
    found = cached(before[0] if before else candidate) if _is_complete(candidate) or before else None
    if found is not None:
        return _judged(replace(found, license=candidate.license), wanted)
    try:
        return judge_remotely(candidate, wanted, hub, paths)
    except TROUBLE as error:
        return replace(candidate, reason=describe(error, candidate.repo_id))


def _is_complete(candidate: Candidate) -> bool:
    return any(name.endswith(".safetensors") for name in candidate.files)


def _judged(candidate: Candidate, wanted: HubFilter) -> Candidate:
    try:
        _require_author(candidate.repo_id, wanted)
        if not _allowed(candidate.license, wanted.allow_licenses):
            raise AdapterError(f"its licence {candidate.license} is not in allow_licenses")
        judge_local(candidate, wanted)
    except AdapterError as error:
        return replace(candidate, reason=str(error))
    return candidate
