"""Finding candidates: those on this machine and on the Hub, checked until enough can be used."""

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.hf_api import ModelInfo

from ..errors import AdapterError
from ..formats import CONFIG_NAME, is_checkpoint, quote, read_adapter, read_checkpoint
from .candidate import Candidate
from .download import cached, snapshot
from .hub import RECOVERABLE, Hub, describe
from .local import find_locally, reject_duplicates
from .search import COMMIT, RemoteFiles, held_candidates, list_repositories, stated
from .spec import FORMS, Spec, is_glob, parse_spec


# Repositories that are looked at, and candidates that are checked, at the same time.
_THREADS = 8

Check = Callable[[Any], Any]
# A candidate that was named or listed, and what finds out which can be used.
_Named = tuple[Candidate, Callable[[], list[Candidate]]]


def find_candidates(
    specs: str | os.PathLike | Sequence[str | os.PathLike],
    base_model: str | None = None,
    *,
    exclude: Sequence[str | os.PathLike] = (),
    max_candidates: int | None = None,
    max_download_gb: float | None = None,
    allow_licenses: Sequence[str] | None = None,
    allow_authors: Sequence[str] | None = None,
    check: Check | None = None,
    relations: Sequence[str] = ("adapter",),
    hub: Hub | None = None,
) -> list[Candidate]:
    """
    Finds the adapters that the given text describes. Nothing is downloaded but what is needed to check them.

    Args:
        specs (`str`, path or list of them):
            A local adapter, run directory or glob; `org/name[/sub/folder][@revision]`; `hub:author=..,search=..`
            (also tag, limit, sort); or `collection:org/slug`. What exists locally is local.
        base_model (`str`, *optional*):
            Hub name of the base model, or the directory that it was loaded from, for searches.
        exclude (list of paths, *optional*):
            Directories that are skipped with all that is in them, such as this run's own output.
        max_candidates (`int`, *optional*):
            Only the first so many that pass the checks can be used; the others are returned with that reason.
        max_download_gb (`float`, *optional*):
            Bound on what is left to download from the Hub, in 10⁹ bytes; the first candidates that fit can be used.
        allow_licenses (`Sequence[str]`, *optional*):
            Licenses that a Hub candidate may have; None allows every license. Only the Hub knows them: without it no
            candidate of the Hub passes.
        allow_authors (`Sequence[str]`, *optional*):
            Users and organizations that a Hub candidate may come from; None allows everyone.
        check (`Callable`, *optional*):
            Is given a candidate's description (configuration and names and shapes of its tensors), and raises an
            `AdapterError` if it does not fit, see [`fits`]; it is called from threads. None accepts all.
        relations (`Sequence[str]`, *optional*, defaults to `("adapter",)`):
            What searches list: `"adapter"`, and `"finetune"` for full fine-tunes of the base model.
        hub (`Hub`, *optional*):
            The connection to the Hub; one of its own by default.

    Returns:
        `list[Candidate]`: in the order of `specs` and natural order within, a run's final adapter before its
        checkpoints. Those that cannot be used have a `reason`. Those on the Hub have a `path` if they are in its
        cache, and are downloaded when they are scored.

    Raises:
        ValueError: If an entry is not of the grammar, or a local path that is no glob does not exist.
        TypeError: If an entry is neither text nor a path.
    """
    excluded = [os.path.realpath(os.path.expanduser(path)) for path in exclude]
    lookup = _HubLookup(hub or Hub(), base_model, relations, check, allow_licenses, allow_authors)
    named: list[_Named] = []
    for spec in _parsed(_entries(specs)):
        if spec.kind == "path":
            named += [(item, partial(_checked_here, item, check)) for item in find_locally(spec, excluded)]
        else:
            named += lookup.named(spec)
    return _limit_download(_first_usable(named, max_candidates), max_download_gb)


def check_specs(specs: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[str | os.PathLike, ...]:
    """Returns the candidates' specs as a tuple; raises what [`find_candidates`] would, and where there is none."""
    entries = _entries(specs)
    if not entries:
        raise ValueError(f"There are no candidates, expected at least one of: {FORMS}.")
    _parsed(entries)
    return entries


def _entries(specs: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[str | os.PathLike, ...]:
    # A path stays one: as text, it might be something else.
    return (specs,) if isinstance(specs, str | os.PathLike) else tuple(specs)


def read_source(candidate: Candidate, check: Check | None = None) -> Any:
    """Returns what `check` makes of the description of a local candidate; raises `AdapterError` with the reason."""
    if candidate.reason is not None:
        raise AdapterError(candidate.reason)
    if candidate.path is None:
        raise AdapterError(f"{candidate.name} has not been downloaded yet")
    description = _READERS[candidate.kind](candidate.path)
    return check(description) if check else description


_READERS: dict[str, Callable[[Path], Any]] = {"adapter": read_adapter, "model": read_checkpoint}


def as_candidate(source: Candidate | str | os.PathLike) -> Candidate:
    """Returns a candidate as it is, and a directory as the candidate that it is."""
    if isinstance(source, Candidate):
        return source
    path = Path(source)
    kind = "model" if is_checkpoint(path) else "adapter"
    return Candidate(os.fspath(source), kind, path, run=os.path.realpath(path))


def _parsed(entries: Iterable[str | os.PathLike]) -> list[Spec]:
    """Parses entries of the grammar; raises where one is wrong, or a literal path that is not there or a file."""
    specs = [_resolved(entry) for entry in entries]
    for path in (spec.path for spec in specs if spec.path is not None):
        here = os.path.expanduser(path)
        if os.path.isfile(here):
            expected = f"expected the directory that holds {CONFIG_NAME}: {os.path.dirname(here)}"
            raise ValueError(f"{path!r} is a file, {expected}.")
        if not is_glob(path) and not os.path.lexists(here):
            raise ValueError(f"{path!r} does not exist on this machine, and is not on the Hub; expected {FORMS}.")
    return specs


def _resolved(entry: str | os.PathLike) -> Spec:
    if isinstance(entry, os.PathLike):
        return Spec("path", path=os.fspath(entry))
    if not isinstance(entry, str):
        raise TypeError(f"a candidate is {type(entry).__name__} {entry!r}, expected text or a path: {FORMS}.")
    spec = parse_spec(entry)
    return Spec("path", path=str(spec)) if spec.kind == "repo" and os.path.lexists(str(spec)) else spec


def _checked_here(candidate: Candidate, check: Check | None) -> list[Candidate]:
    return [_judged(candidate, check) if check else candidate]


def _judged(candidate: Candidate, check: Check | None) -> Candidate:
    try:
        read_source(candidate, check)
    except AdapterError as error:
        return replace(candidate, reason=str(error))
    return candidate


@dataclass(frozen=True)
class _HubLookup:
    """Finds out which candidates of the Hub can be used: from its replies, or from the cache when it is down."""

    hub: Hub
    base_model: str | None
    relations: Sequence[str]
    check: Check | None
    allow_licenses: Sequence[str] | None
    allow_authors: Sequence[str] | None

    def named(self, spec: Spec) -> list[_Named]:
        try:
            listed = list_repositories(spec, self.base_model, self.hub, self.relations)
        except RECOVERABLE as error:
            why = f"{self.hub.down}: only repositories that are named can be used" if self.hub.down else ""
            found = Candidate(str(spec), reason=why or describe(error, spec.collection))
            return [(found, lambda: [found])]
        return [(repository, partial(self._look, repository, info)) for repository, info in listed]

    def _look(self, repository: Candidate, info: ModelInfo | None) -> list[Candidate]:
        author = repository.repo_id.split("/")[0]
        if not _allowed(author, self.allow_authors):
            return [replace(repository, reason=f"its author {author} is not in allow_authors")]
        try:
            return self._pinned(repository) or self._stated(repository, info)
        except RECOVERABLE as error:
            if self.hub.down and not isinstance(error, AdapterError):
                return self._without_hub(repository)
            return [replace(repository, reason=describe(error, repository.repo_id))]

    def _pinned(self, repository: Candidate) -> list[Candidate]:
        """Returns a candidate at a commit that is in the cache: nothing has to be asked for it."""
        if self.allow_licenses is not None or not COMMIT.fullmatch(repository.revision or ""):
            return []
        found = _in_cache(repository)
        return [_judged(item, self.check) for item in found if item.name == repository.name]

    def _stated(self, repository: Candidate, info: ModelInfo | None) -> list[Candidate]:
        commit, paths, known = stated(repository, info, self.hub)
        if not _allowed(known.license, self.allow_licenses):
            named = quote(known.license) if known.license else "(none stated)"
            raise AdapterError(f"its license {named} is not in allow_licenses")
        held = held_candidates(known, commit, paths)
        return [self._checked(candidate, paths) for candidate in held]

    def _checked(self, candidate: Candidate, paths: Sequence[str]) -> Candidate:
        try:
            if found := cached(candidate):
                return _judged(found, self.check)
            found, source = RemoteFiles(candidate, self.hub, frozenset(paths)).describe()
            if self.check is not None:
                self.check(source)
            return found
        except RECOVERABLE as error:
            return replace(candidate, reason=describe(error, candidate.repo_id))

    def _without_hub(self, repository: Candidate) -> list[Candidate]:
        if self.allow_licenses is not None:
            why = f"{self.hub.down}: its license is unknown, hence not in allow_licenses"
            return [replace(repository, reason=why)]
        if found := _in_cache(repository):
            return [_judged(item, self.check) for item in found]
        at = f" --revision {repository.revision}" if repository.revision else ""
        get = f"get it with `hf download {repository.repo_id}{at}`"
        return [replace(repository, reason=f"{self.hub.down}, and it is not in the cache; {get}")]


def _in_cache(repository: Candidate) -> list[Candidate]:
    folder = snapshot(repository.repo_id, repository.revision)
    if folder is None:
        return []
    paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    try:
        return [item for item in map(cached, held_candidates(repository, folder.name, paths)) if item]
    except AdapterError:
        return []


def _allowed(value: str | None, allowed: Iterable[str] | None) -> bool:
    return allowed is None or (value or "").lower() in {item.lower() for item in allowed}


def _first_usable(named: Sequence[_Named], max_candidates: int | None) -> list[Candidate]:
    """Checks candidates in their order, several at a time, until enough can be used and are not the same."""
    bound = sys.maxsize if max_candidates is None else max_candidates
    found: dict[object, Candidate] = {}
    contents: dict[Path, str | None] = {}
    waiting = list(named)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mashup-find") as pool:
        while True:
            kept = [key for key, item in found.items() if item.reason is None][:bound]
            if len(kept) < bound and waiting:
                part, waiting = waiting[:_THREADS], waiting[_THREADS:]
                for item in itertools.chain.from_iterable(pool.map(lambda entry: entry[1](), part)):
                    found.setdefault(_identity(item), item)
                continue
            distinct = dict(zip(kept, reject_duplicates([found[key] for key in kept], contents), strict=True))
            found |= distinct
            if all(item.reason is None for item in distinct.values()):
                break
    for item, _ in waiting:
        found.setdefault(_identity(item), item)
    over = {key for key, item in found.items() if item.reason is None} - {*kept}
    reason = f"beyond max_candidates={max_candidates}"
    return [replace(item, reason=reason) if key in over else item for key, item in found.items()]


def _identity(candidate: Candidate) -> object:
    return os.path.realpath(candidate.path) if candidate.path else candidate.key


def _limit_download(found: Sequence[Candidate], max_download_gb: float | None) -> list[Candidate]:
    left = math.inf if max_download_gb is None else max_download_gb * 1e9
    result = []
    for item in found:
        size = item.bytes or 0 if item.path is None and item.reason is None else 0
        if size > max(left, 0):
            item = replace(item, reason=f"its {size:,} bytes would exceed max_download_gb={max_download_gb:g}")
        else:
            left -= size
        result.append(item)
    return result
