"""The JSON that the Hub gives for repositories and files, derived from commits and cached on them."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import yaml

from .store import Blob, Commit, Repository


FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\s*(?:\r?\n|\Z)", re.DOTALL)
LISTED_BY_DEFAULT = ("_id", "id", "modelId", "private", "downloads", "tags", "createdAt")
LISTED_OPTIONALLY = ("library_name", "pipeline_tag")
LISTED_WHEN_FULL = ("author", "sha", "lastModified", "gated", "disabled", "siblings")


def timestamp(moment: datetime) -> str:
    """Moment in the Hub's own format, UTC in milliseconds."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def front_matter(text: str) -> Any:
    """Parsed YAML header of a model card; `None` without one."""
    match = FRONT_MATTER.match(text)
    return yaml.safe_load(match.group(1)) if match else None


def card_data(tree: Mapping[str, Blob]) -> dict[str, Any]:
    """Metadata of the model card; empty where the card is missing or broken, as on the real Hub."""
    if "README.md" not in tree:
        return {}
    try:
        parsed = front_matter(tree["README.md"].data.decode(errors="replace"))
    except yaml.YAMLError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def tags(card: Mapping[str, Any], tree: Mapping[str, Blob]) -> list[str]:
    """Tags that the Hub derives from the card and the file names, without duplicates."""
    relation = card.get("base_model_relation") or ("adapter" if "adapter_config.json" in tree else "finetune")
    bases = as_list(card.get("base_model"))
    found = as_list(card.get("library_name"))
    found += ["safetensors"] if any(path.endswith(".safetensors") for path in tree) else []
    found += as_list(card.get("tags"))
    found += [f"dataset:{name}" for name in as_list(card.get("datasets"))]
    found += [f"base_model:{base}" for base in bases]
    found += [f"base_model:{relation}:{base}" for base in bases]
    found += [f"license:{name}" for name in as_list(card.get("license"))]
    return list(dict.fromkeys(found))


def sibling(path: str, blob: Blob) -> dict[str, Any]:
    """A file as model info lists it when asked for `blobs`."""
    entry = {"rfilename": path, "size": blob.size, "blobId": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"sha256": blob.etag, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entry


def model_info(repository: Repository, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    """Model info at a commit, as the Hub gives it; with `blobs`, files have size and oid."""
    if "info" not in commit.derived:
        commit.derived["info"] = info_of_commit(repository.id, commit)
    info = {**commit.derived["info"], **info_of_repository(repository)}
    if blobs:
        info["siblings"] = [sibling(path, blob) for path, blob in sorted(commit.tree.items())]
    return info


def info_of_commit(repo_id: str, commit: Commit) -> dict[str, Any]:
    card = card_data(commit.tree)
    info = {
        "_id": hashlib.sha1(repo_id.encode()).hexdigest()[:24],
        "id": repo_id,
        "modelId": repo_id,
        "author": repo_id.split("/")[0],
        "sha": commit.sha,
        "tags": tags(card, commit.tree),
        "cardData": card,
        "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
        "usedStorage": sum(blob.size for blob in commit.tree.values()),
    }
    return info | {key: card[key] for key in LISTED_OPTIONALLY if card.get(key)}


def info_of_repository(repository: Repository) -> dict[str, Any]:
    return {
        "private": repository.private,
        "gated": "manual" if repository.gated is True else repository.gated,
        "disabled": False,
        "downloads": repository.downloads,
        "createdAt": timestamp(repository.created),
        "lastModified": timestamp(repository.head.date),
    }


def select(info: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The named properties of model info, with the identifiers that every reply carries."""
    return {key: info[key] for key in ("_id", "id", "modelId", *keys) if key in info}


def listing_row(info: Mapping[str, Any], query: Mapping[str, list[str]]) -> dict[str, Any]:
    """Model info cut down to what a listing with this query shows."""
    if "expand" in query:
        return select(info, query["expand"])
    keys = [*LISTED_BY_DEFAULT, *LISTED_OPTIONALLY]
    keys += LISTED_WHEN_FULL if "full" in query else ()
    keys += ["cardData"] if "cardData" in query else []
    return select(info, keys)


def tree_entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """Every file and folder of a commit by path, as the tree and paths-info endpoints show them."""
    if "tree" not in commit.derived:
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(commit.tree.items()):
            entries.update((folder["path"], folder) for folder in parents(path))
            entries[path] = file_entry(path, blob)
        commit.derived["tree"] = entries
    return commit.derived["tree"]


def parents(path: str) -> list[dict[str, Any]]:
    parts = path.split("/")[:-1]
    folders = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    return [
        {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0, "path": folder}
        for folder in folders
    ]


def file_entry(path: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.etag, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entry
