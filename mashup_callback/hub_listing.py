"""Listing repositories on the Hub: searches for what was made of a base model, collections, or one by name."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote as quote_path

from huggingface_hub.utils import validate_repo_id

from .candidate_spec import Spec
from .errors import HubError
from .hub import Hub, as_list
from .hub_names import base_model_names


logger = logging.getLogger(__name__)

# What a search without `limit` looks at.
MAX_LISTED = 1000
# Without the cards, which may be broken: all that is needed of them is in the tags that the Hub derives from them.
PROPERTIES = ("sha", "siblings", "tags")
_SORT = {"created_at": "createdAt", "last_modified": "lastModified", "trending_score": "trendingScore"}


@dataclass(frozen=True)
class Lead:
    """
    A repository to look at.

    Args:
        repo_id (`str`): The repository.
        revision (`str`, *optional*, defaults to `"main"`): The revision asked for.
        subfolder (`str`, *optional*): The folder asked for.
        info (`Mapping`, *optional*): What the listing says of it, if anything.
    """

    repo_id: str
    revision: str = "main"
    subfolder: str | None = None
    info: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """Repository with folder."""
        return f"{self.repo_id}/{self.subfolder}" if self.subfolder else self.repo_id


def leads(spec: Spec, base_model: str | None, hub: Hub, relations: Sequence[str] = ("adapter",)) -> list[Lead]:
    """
    Lists the repositories that an entry of the grammar names.

    Args:
        spec (`Spec`):
            A repository, a search or a collection.
        base_model (`str`, *optional*):
            Name or path of the base model, of which a search lists what was made of it.
        hub (`Hub`):
            The connection.
        relations (`Sequence[str]`, *optional*, defaults to `("adapter",)`):
            What a search lists, in turns: `"adapter"`, `"finetune"`.

    Raises:
        HubError: If the Hub cannot be reached, or the name of the base model is not known.
        HfHubHTTPError: If the Hub refuses.
    """
    if spec.kind == "repo":
        return [Lead(spec.repo_id, spec.revision or "main", spec.subfolder)]
    found = _collected(spec, hub) if spec.kind == "collection" else _searched(spec, base_model, hub, relations)
    limit = spec.limit or MAX_LISTED
    leads = [*itertools.islice(found, limit + 1)]
    if len(leads) > limit and spec.limit is None:
        logger.warning("%s lists more than %d repositories; set limit= to look at more.", spec, limit)
    return leads[:limit]


def _collected(spec: Spec, hub: Hub) -> Iterator[Lead]:
    collection, _ = hub.get_json(f"/api/collections/{quote_path(spec.collection)}")
    for item in as_list(collection.get("items") if isinstance(collection, dict) else None):
        if isinstance(item, dict) and item.get("type") == "model" and _is_repo_id(item.get("id")):
            yield Lead(item["id"])


def _searched(spec: Spec, base_model: str | None, hub: Hub, relations: Sequence[str]) -> Iterator[Lead]:
    names = base_model_names(base_model, hub)
    if not names:
        raise HubError(f"the base model's name on the Hub is not known (it is {base_model!r}): set `base_model`")
    seen: set[str] = set()
    listings = [_listed(spec, names, relation, hub) for relation in relations]
    # In turns, so that a limit leaves some of each.
    for row in itertools.chain.from_iterable(itertools.zip_longest(*listings)):
        repo_id = row.get("id") if isinstance(row, dict) else None
        if _is_repo_id(repo_id) and repo_id not in seen:
            seen.add(repo_id)
            yield Lead(repo_id, info=row if row.get("sha") and "siblings" in row else None)


def _listed(spec: Spec, names: Sequence[str], relation: str, hub: Hub) -> Iterator[Any]:
    for name in names:
        yield from _pages(_query(spec, f"base_model:{relation}:{name}"), hub)


def _query(spec: Spec, tag: str) -> dict[str, Any]:
    given = {"author": spec.author, "search": spec.search, "sort": _SORT.get(spec.sort, spec.sort)}
    return {
        "filter": [tag, *spec.tags],
        **{name: value for name, value in given.items() if value is not None},
        "limit": min(spec.limit or MAX_LISTED, MAX_LISTED),
        "expand": list(PROPERTIES),
    }


def _pages(query: Mapping[str, Any], hub: Hub) -> Iterator[Any]:
    rows, following = hub.get_json("/api/models", params=query)
    while True:
        yield from as_list(rows)
        if not following:
            return
        rows, following = hub.get_json(following)


def _is_repo_id(value: Any) -> bool:
    try:
        validate_repo_id(value)
    except ValueError:
        return False
    return isinstance(value, str) and "/" in value
