"""What is on the Hub: repositories that a search or collection lists, the candidates in them, and their headers."""

import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.hf_api import ModelInfo

from ..errors import AdapterError, HubError
from ..formats import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_CONFIG_BYTES,
    MODEL_CONFIG_NAME,
    MODEL_WEIGHTS_NAME,
    WEIGHTS_NAME,
    Adapter,
    Checkpoint,
    FileStamp,
    TensorInfo,
    describe_checkpoint,
    header_end,
    parse_adapter,
    parse_config,
    parse_header,
    read_limited,
)
from .candidate import Candidate
from .hub import RECOVERABLE, TIMEOUT_SECONDS, Hub, describe
from .local import why_unusable
from .provenance import card_metadata
from .spec import Spec, hub_name


logger = logging.getLogger(__name__)

# What a search without `limit` looks at.
MAX_LISTED = 1000
# More rows than that may take longer.
_ROW_BYTES = 1000
# Enough for the headers of nearly all adapters, so that one request reads them.
HEADER_BYTES = 2**17
COMMIT = re.compile("[0-9a-f]{40}")
# Without the cards, which may be broken: all that is needed of them is in the tags that the Hub derives from them.
_PROPERTIES = ["sha", "siblings", "tags"]
_NOTHING = (
    f"it holds no adapter, expected {CONFIG_NAME} and {WEIGHTS_NAME}, and no full model, expected "
    f"{MODEL_CONFIG_NAME} and {MODEL_WEIGHTS_NAME} or its shards"
)
_QUANTIZED = "base_model:quantized:"


def list_repositories(
    spec: Spec, base_model: str | None, hub: Hub, relations: Sequence[str]
) -> list[tuple[Candidate, ModelInfo | None]]:
    """Lists the repositories that an entry of the grammar names, with what the listing says of each, if anything."""
    if spec.kind == "repo":
        return [(_repository(spec.repo_id, spec.subfolder, spec.revision), None)]
    if spec.kind == "collection":
        items = hub.call(HfApi().get_collection, spec.collection).items
        found = {item.item_id: None for item in items if item.item_type == "model"}
    else:
        found = _search(spec, base_model, hub, relations)
    limit = spec.limit or MAX_LISTED
    named = [(repo_id, info) for repo_id, info in found.items() if "/" in repo_id and hub_name(repo_id)]
    if len(named) > limit and spec.limit is None:
        logger.warning("%s lists more than %d repositories; set limit= to look at more.", spec, limit)
    return [(_repository(repo_id), info) for repo_id, info in named[:limit]]


def stated(repository: Candidate, info: ModelInfo | None, hub: Hub) -> tuple[str, tuple[str, ...], Candidate]:
    """Returns the commit, the files, and the repository with license and data sets, as a listing or the Hub says."""
    if info is None:
        at = repository.revision or "main"
        asked = partial(HfApi().model_info, revision=at, expand=_PROPERTIES, timeout=TIMEOUT_SECONDS)
        info = hub.call(asked, repository.repo_id)
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise HubError("the Hub does not say which commit it is at")
    # Without those that would lead out of the cache's folder for the repository.
    paths = tuple(file.rfilename for file in info.siblings or () if _is_safe(file.rfilename))
    tags = [tag for tag in info.tags or () if isinstance(tag, str)]
    license = next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None)
    datasets = tuple(tag.removeprefix("dataset:") for tag in tags if tag.startswith("dataset:"))
    return info.sha, paths, replace(repository, license=license, datasets=datasets)


def held_candidates(repository: Candidate, revision: str, paths: Sequence[str]) -> list[Candidate]:
    """Returns what is in the folder asked for or the root, if that is an adapter or a model; else what is below it."""
    here = repository.subfolder or ""
    folders: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if not here or f"{folder}/".startswith(f"{here}/"):
            folders.setdefault(folder, set()).add(name)
    found = {folder: files for folder, names in folders.items() if (files := _described_by(names))}
    chosen = {here: found[here]} if here in found else found
    if not chosen:
        raise AdapterError(why_unusable(itertools.chain.from_iterable(folders.values())) or _NOTHING)
    return [_held(repository, folder, revision, files) for folder, files in chosen.items()]


def path_in_repository(candidate: Candidate, name: str) -> str:
    """Returns the path in its repository of a candidate's file."""
    return f"{candidate.subfolder}/{name}" if candidate.subfolder else name


@dataclass(frozen=True)
class RemoteFiles:
    """The files of a candidate on the Hub among all `paths` of its repository, read by ranged requests."""

    candidate: Candidate
    hub: Hub
    paths: frozenset[str] = field(repr=False)

    def describe(self) -> tuple[Candidate, Adapter | Checkpoint]:
        """Returns the candidate with all its files and the size of its weights, and its description."""
        if self.candidate.kind == "model":
            checkpoint = describe_checkpoint(self)
            size = sum(stamp.size for stamp in checkpoint.stamps.values())
            files = tuple(dict.fromkeys([*self.candidate.files, *checkpoint.stamps]))
            return replace(self.candidate, bytes=size, files=files), checkpoint
        config = self.read(CONFIG_NAME, MAX_CONFIG_BYTES)
        # Before the header of one that is unfit is asked for.
        parse_config(config)
        header, size = self._start(WEIGHTS_NAME)
        adapter = parse_adapter(config, header, size)
        return replace(self.candidate, bytes=size, rank=adapter.rank), adapter

    def has(self, name: str) -> bool:
        return path_in_repository(self.candidate, name) in self.paths

    def read(self, name: str, limit: int) -> bytes:
        data, size = self.hub.read(self._url(name), 0, limit)
        if size > len(data):
            raise AdapterError(f"{name} has {size:,} bytes, of which {len(data):,} came; expected a small file")
        return data

    def header(self, name: str) -> tuple[dict[str, TensorInfo], FileStamp]:
        data, size = self._start(name)
        return parse_header(data, size), FileStamp(size)

    def _start(self, name: str) -> tuple[bytes, int]:
        """Returns the first bytes of a safetensors file through the end of its header, and the size of the file."""
        data, size = self.hub.read(self._url(name), 0, HEADER_BYTES)
        end = header_end(data)
        if len(data) < end <= size:
            data += self.hub.read(self._url(name), len(data), end)[0]
        return data, size

    def _url(self, name: str) -> str:
        path = path_in_repository(self.candidate, name)
        return hf_hub_url(self.candidate.repo_id, path, revision=self.candidate.revision)


def base_model_names(base_model: str | None, hub: Hub) -> tuple[str, ...]:
    """Returns the Hub names whose adapters fit a base model: its own, and that of the model it quantizes."""
    names = map(hub_name, _recorded_names(base_model))
    name = next((name for name in names if name is not None and not os.path.isdir(name)), None)
    if name is None:
        return ()
    if name != base_model:
        logger.info("%s is searched for on the Hub as %s; set `base_model` if it is another.", base_model, name)
    try:
        tags = hub.call(HfApi().model_info, name, expand=["tags"], timeout=TIMEOUT_SECONDS).tags or ()
    except RECOVERABLE as error:
        if hub.down:
            raise
        logger.info("The Hub does not tell what %s was quantized from, if it was: %s", name, describe(error, name))
        return (name,)
    found = [tag.removeprefix(_QUANTIZED) for tag in tags if isinstance(tag, str) and tag.startswith(_QUANTIZED)]
    return tuple(dict.fromkeys([name, *found]))


def _repository(repo_id: str, subfolder: str | None = None, revision: str | None = None) -> Candidate:
    name = f"{repo_id}/{subfolder}" if subfolder else repo_id
    return Candidate(name, repo_id=repo_id, subfolder=subfolder, revision=revision, run=name)


def _search(spec: Spec, base_model: str | None, hub: Hub, relations: Sequence[str]) -> dict[str, ModelInfo | None]:
    names = base_model_names(base_model, hub)
    if not names:
        raise HubError(f"the base model's name on the Hub is not known (it is {base_model!r}): set `base_model`")
    tags = [[f"base_model:{relation}:{name}" for name in names] for relation in relations]
    listings = [[info for tag in of_one for info in _listed(spec, tag, hub)] for of_one in tags]
    found: dict[str, ModelInfo | None] = {}
    # In turns, so that a limit leaves some of each.
    for info in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*listings))):
        found.setdefault(info.id, info if info.sha and info.siblings is not None else None)
    return found


def _listed(spec: Spec, tag: str, hub: Hub) -> list[ModelInfo]:
    limit = spec.limit or MAX_LISTED + 1
    given = {"author": spec.author, "search": spec.search, "sort": spec.sort, "limit": limit}
    settings = {"filter": [tag, *spec.tags], "expand": _PROPERTIES, **given}
    return hub.call(lambda: [*HfApi().list_models(**settings)], size=_ROW_BYTES * (limit - MAX_LISTED - 1))


def _recorded_names(base_model: str | None) -> Iterator[str | None]:
    """Yields what may be a model's name on the Hub: its own, or what a local directory says of where it is from."""
    if base_model is None or not os.path.isdir(base_model):
        yield base_model
        return
    yield os.path.realpath(base_model)
    directory = Path(base_model)
    for name in (_name_in_config(directory), card_metadata(directory).get("base_model")):
        name = name[0] if isinstance(name, list) and name else name
        if isinstance(name, str) and "/" in name:
            yield name


def _name_in_config(directory: Path) -> Any:
    try:
        return json.loads(read_limited(directory / MODEL_CONFIG_NAME, MAX_CONFIG_BYTES)).get("_name_or_path")
    except (ValueError, AttributeError, RecursionError):
        # A broken file does not say where the model is from.
        return None


def _is_safe(path: object) -> bool:
    """Whether a path stays inside the repository, and inside the cache's folder for it."""
    parts = path.replace("\\", "/").split("/") if isinstance(path, str) and path.isprintable() else [""]
    return not {"", ".", ".."} & {*parts}


def _held(repository: Candidate, folder: str, revision: str, files: tuple[str, ...]) -> Candidate:
    found = _repository(repository.repo_id, folder or None, revision)
    parent, _, last = folder.rpartition("/")
    run = f"{repository.repo_id}/{parent}".rstrip("/") if last.startswith("checkpoint-") else found.name
    kind = "adapter" if CONFIG_NAME in files else "model"
    found = replace(found, kind=kind, run=run, files=files)
    return replace(found, license=repository.license, datasets=repository.datasets)


def _described_by(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the files of one folder that describe the adapter or model in it, none if it holds neither."""
    config = CONFIG_NAME if CONFIG_NAME in names else MODEL_CONFIG_NAME
    expected = (WEIGHTS_NAME,) if config == CONFIG_NAME else (INDEX_NAME, MODEL_WEIGHTS_NAME)
    weights = next((name for name in expected if name in names), None)
    return (config, weights) if config in names and weights else ()
