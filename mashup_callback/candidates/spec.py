"""The grammar of candidates: a line of text that says where adapters come from."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


FORMS = (
    "a local directory or a glob (path/to/adapter, runs/*, ./name), "
    "a Hub repository (org/name[/sub/folder][@revision]), "
    "a Hub search (hub:author=acme,search=code,tag=x,limit=50,sort=downloads) "
    "or a Hub collection (collection:org/slug)"
)
_SORTS = ("created_at", "downloads", "last_modified", "likes", "trending_score")
_SEARCH_KEYS = ("author", "search", "tag", "limit", "sort")
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_FOLDER = r"[A-Za-z0-9_][A-Za-z0-9._=+,-]*"
_REPO = re.compile(
    rf"(?P<repo_id>{_NAME}/{_NAME})(?:/(?P<subfolder>{_FOLDER}(?:/{_FOLDER})*))?"
    rf"(?:@(?P<revision>{_SEGMENT}(?:/{_SEGMENT})*))?"
)
_HUB_NAME = re.compile(rf"(?:{_NAME}/)?{_NAME}")

_COLLECTION = re.compile(rf"{_NAME}/{_SEGMENT}")
_CACHED = re.compile(r"(?:^|[/\\])models--([^/\\]+)(?:[/\\]|$)")


@dataclass(frozen=True)
class Spec:
    """One entry of the grammar: a path, repo, search or collection. `str(spec)` is text that parses to the same."""

    kind: str
    path: str | None = None
    repo_id: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    author: str | None = None
    search: str | None = None
    tags: tuple[str, ...] = ()
    limit: int | None = None
    sort: str | None = None
    collection: str | None = None

    def __str__(self) -> str:
        if self.kind == "path":
            return str(self.path)
        if self.kind == "collection":
            return f"collection:{self.collection}"
        if self.kind == "repo":
            folder = f"/{self.subfolder}" if self.subfolder else ""
            return f"{self.repo_id}{folder}" + (f"@{self.revision}" if self.revision else "")
        pairs: list[tuple[str, str | int | None]] = [("author", self.author), ("search", self.search)]
        pairs += [*(("tag", tag) for tag in self.tags), ("limit", self.limit), ("sort", self.sort)]
        return "hub:" + ",".join(f"{key}={value}" for key, value in pairs if value is not None)


def is_glob(text: str) -> bool:
    """Whether the text has glob characters."""
    return not {*"*?["}.isdisjoint(text)


def parse_spec(text: str) -> Spec:
    """Parses one entry of the grammar by its text alone; raises a ValueError that lists the forms if it is none."""
    stripped = text.strip()
    if not stripped or not stripped.isprintable():
        raise ValueError(f"{text!r} is no candidate, expected {FORMS}.")
    if stripped.startswith(("/", ".", "~")):
        return Spec("path", path=stripped)
    if stripped.startswith("hub:"):
        return _parse_search(stripped.removeprefix("hub:"))
    if stripped.startswith("collection:"):
        slug = stripped.removeprefix("collection:")
        if not _COLLECTION.fullmatch(slug):
            raise ValueError(f"{stripped!r} is no collection, expected collection:org/slug as in its web address.")
        return Spec("collection", collection=slug)
    _refuse_lookalikes(stripped)
    match = None if is_glob(stripped) else _REPO.fullmatch(stripped)
    if match is None or ".." in stripped:
        return Spec("path", path=stripped)
    return Spec("repo", repo_id=match["repo_id"], subfolder=match["subfolder"], revision=match["revision"])


def hub_name(model: str | None) -> str | None:
    """Returns the name of a model on the Hub, given that name or a path into the Hub's cache; None for other paths."""
    cached = _CACHED.search(model or "")
    name = cached[1].replace("--", "/") if cached else model or ""
    # What the Hub refuses besides.
    odd = "--" in name or ".." in name or name.endswith(".git")
    return name if _HUB_NAME.fullmatch(name) and not odd else None


def _refuse_lookalikes(text: str) -> None:
    scheme, colon, _ = text.partition(":")
    if colon and scheme.isidentifier():
        hint = " Of a web address give only the part org/name." if text.startswith("http") else ""
        raise ValueError(
            f"{text!r} starts with {scheme}:, which is no form of candidate; expected {FORMS}.{hint} A directory of "
            f"this name is written ./{text}."
        )
    if text.endswith("@"):
        raise ValueError(f"{text!r} names no revision after the @, expected {FORMS}.")


def _parse_search(query: str) -> Spec:
    if not query.strip():
        raise ValueError(f"'hub:' searches for nothing, expected one or more of {', '.join(_SEARCH_KEYS)} after it.")
    found: dict[str, list[str]] = {}
    for pair in query.split(","):
        key, _, value = (part.strip() for part in pair.partition("="))
        if key not in _SEARCH_KEYS:
            expected = f"expected {', '.join(_SEARCH_KEYS)}. Did you mean {_nearest(key, _SEARCH_KEYS)!r}?"
            raise ValueError(f"'hub:{query}' has the unknown key {key!r}, {expected}")
        if not value or (key in found and key != "tag"):
            problem = "twice" if value else "without a value"
            raise ValueError(f"'hub:{query}' has the key {key!r} {problem}, expected {key}=<value> once.")
        found.setdefault(key, []).append(value)
    tags = tuple(found.pop("tag", ()))
    single: dict[str, Any] = {key: values[0] for key, values in found.items()}
    limit, sort = single.get("limit"), single.get("sort")
    if limit is not None:
        if not limit.isascii() or not limit.isdigit() or len(limit) > 9 or int(limit) == 0:
            raise ValueError(f"limit is {limit!r}, expected a positive number of repositories such as limit=50.")
        single["limit"] = int(limit)
    if sort is not None and sort not in _SORTS:
        expected = f"expected one of {', '.join(_SORTS)}. Did you mean {_nearest(sort, _SORTS)!r}?"
        raise ValueError(f"sort is {sort!r}, {expected}")
    return Spec("search", tags=tags, **single)


def _nearest(word: str, words: Sequence[str]) -> str:
    return difflib.get_close_matches(word, words, n=1, cutoff=0)[0]
