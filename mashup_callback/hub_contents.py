"""What a repository on the Hub holds: adapters and full models, by the names of its files."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .candidates import SHARDED, Candidate, is_shard
from .candidates import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from .errors import AdapterError, HubError
from .formats.adapter_config import CONFIG_NAME as ADAPTER_CONFIG_NAME
from .formats.checkpoint_files import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from .formats.vocabulary import TOKENIZER_NAME, VOCABULARY_NAME
from .hub import as_list
from .hub_listing import Lead


COMMIT = re.compile("[0-9a-f]{40}")
_PICKLED = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Facts:
    """
    What the Hub states for a repository.

    Args:
        revision (`str`): Its commit.
        license (`str`, *optional*): Its licence.
        files (`tuple[str, ...]`): Paths of its files.
    """

    revision: str
    license: str | None
    files: tuple[str, ...]


def repository_facts(info: Any) -> Facts:
    """
    Returns what the Hub states for a repository.

    Args:
        info (`Any`):
            The Hub's reply.

    Raises:
        HubError: It names no commit.
    """
    info = info if isinstance(info, dict) else {}
    revision = info.get("sha")
    if not isinstance(revision, str) or not COMMIT.fullmatch(revision):
        raise HubError("the Hub does not say which commit it is at")
    tags = [tag for tag in as_list(info.get("tags")) if isinstance(tag, str)]
    license = next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None)
    names = [item.get("rfilename") for item in as_list(info.get("siblings")) if isinstance(item, dict)]
    return Facts(revision, license, tuple(name for name in names if _is_safe(name)))


def _is_safe(path: Any) -> bool:
    """Whether a path stays inside the repository, and inside the cache's folder for it."""
    parts = path.replace("\\", "/").split("/") if isinstance(path, str) and path.isprintable() else [""]
    return not {"", ".", ".."} & {*parts}


def held_candidates(lead: Lead, facts: Facts) -> list[Candidate]:
    """
    Returns what is in the folder asked for or in the root, if that is an adapter or a full model; else what is in the
    folders below. The files of a model are those of its description; an index names the others.

    Args:
        lead (`Lead`):
            The repository.
        facts (`Facts`):
            What the Hub states for it.

    Raises:
        AdapterError: It holds nothing that can be used.
    """
    below = f"{lead.subfolder}/" if lead.subfolder else ""
    folders = dict.fromkeys(name.rpartition("/")[0] for name in facts.files if f"{name}/".startswith(below))
    found = {folder: _files_of(folder, facts.files) for folder in folders}
    found = {folder: names for folder, names in found.items() if names}
    here = lead.subfolder or ""
    chosen = {here: found[here]} if here in found else found
    if not chosen:
        raise AdapterError(_why_nothing(facts.files, below))
    return [candidate_at(lead, folder, facts.revision, facts.license, names) for folder, names in chosen.items()]


def candidate_at(
    lead: Lead, folder: str, revision: str, license: str | None = None, files: Sequence[str] = ()
) -> Candidate:
    """Returns the candidate in a folder of a repository, an adapter where its files are not known."""
    name = f"{lead.repo_id}/{folder}" if folder else lead.repo_id
    parent, _, last = folder.rpartition("/")
    run = f"{lead.repo_id}/{parent}".rstrip("/") if last.startswith("checkpoint-") else name
    files = tuple(files) or (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
    return Candidate(
        name,
        kind="adapter" if ADAPTER_CONFIG_NAME in files else "model",
        repo_id=lead.repo_id,
        subfolder=folder or None,
        revision=revision,
        run=run,
        license=license,
        files=files,
    )


def _files_of(folder: str, paths: Iterable[str]) -> tuple[str, ...]:
    there = {name for parent, _, name in (path.rpartition("/") for path in paths) if parent == folder}
    if ADAPTER_CONFIG_NAME in there:
        return (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME) if ADAPTER_WEIGHTS_NAME in there else ()
    weights = next((name for name in (INDEX_NAME, WEIGHTS_NAME) if name in there), None)
    if CONFIG_NAME not in there or weights is None:
        return ()
    tokenizer = [name for name in (TOKENIZER_NAME, VOCABULARY_NAME) if name in there]
    return (CONFIG_NAME, weights, *tokenizer[:1])


def _why_nothing(files: Sequence[str], below: str) -> str:
    names = [name.rpartition("/")[2] for name in files if name.startswith(below)]
    if ADAPTER_CONFIG_NAME in names and any(map(is_shard, names)):
        return SHARDED
    pickled = any(name.endswith(_PICKLED) for name in names)
    for config, weights in ((ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME), (CONFIG_NAME, WEIGHTS_NAME)):
        if config in names and pickled:
            return f"it has only pickled weights, which are never opened, and no {weights}"
    return (
        f"it holds no adapter, expected {ADAPTER_CONFIG_NAME} and {ADAPTER_WEIGHTS_NAME}, and no full model, expected "
        f"{CONFIG_NAME} and {WEIGHTS_NAME} or its shards"
    )
