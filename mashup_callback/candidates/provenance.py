"""Which data a candidate says it was trained on: a candidate that saw the target's data makes the guard optimistic."""

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import AdapterError
from ..formats import read_limited
from .candidate import Candidate


CARD_NAME = "README.md"
_CARD_BYTES = 2**20
# Of all cards, those with thousands of results have the longest metadata.
_METADATA_CHARACTERS = 2**18
# Text and no other types: it makes nothing of a tag, and the version in C refuses deep nesting.
_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---", re.DOTALL)
_HUB_FILE = re.compile(r"hf://datasets/([^@]+)@")


def same_data(candidate: Candidate, dataset: Any) -> str | None:
    """Returns a warning if a candidate's model card names the data set that is trained on."""
    shared = dataset_names(dataset) & {*map(_short, stated_datasets(candidate))}
    if not shared:
        return None
    return f"trained on {', '.join(sorted(shared))}, the data of this run: its held-out loss is optimistic"


def dataset_names(dataset: Any) -> set[str]:
    """Returns the Hub names that a data set has on record, without the organization and in lower case."""
    info = getattr(dataset, "info", None)
    files = " ".join(map(str, getattr(info, "download_checksums", None) or {}))
    return {_short(name) for name in (getattr(info, "dataset_name", None), *_HUB_FILE.findall(files)) if name}


def stated_datasets(candidate: Candidate) -> tuple[str, ...]:
    """Returns the data sets that a candidate's model card names, on the Hub or in its directory."""
    if candidate.datasets or candidate.path is None:
        return candidate.datasets
    named = card_metadata(candidate.path).get("datasets")
    names = [named] if isinstance(named, str) else named
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def card_metadata(directory: Path) -> dict[str, Any]:
    """Returns the metadata of the model card in a directory; a broken card says nothing."""
    try:
        text = read_limited(directory / CARD_NAME, _CARD_BYTES).decode("utf-8", errors="replace")
        match = _FRONT_MATTER.match(text)
        card = yaml.load(match[1], _LOADER) if match and len(match[1]) <= _METADATA_CHARACTERS else None
    except (AdapterError, yaml.YAMLError, RecursionError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _short(name: str) -> str:
    return name.rpartition("/")[2].lower()
