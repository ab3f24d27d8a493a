"""Judging what is on the Hub by its configuration and the headers of its weights, before these are downloaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import quote as quote_path

from .candidates import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from .candidates import Candidate
from .errors import AdapterError
from .formats.adapter import Adapter, check_adapter, parse_adapter, read_adapter
from .formats.adapter_config import CONFIG_NAME as ADAPTER_CONFIG_NAME
from .formats.adapter_config import MAX_CONFIG_BYTES, parse_config
from .formats.checkpoint import Checkpoint, describe_checkpoint, read_checkpoint
from .formats.header import FileStamp, TensorInfo, header_length, parse_header
from .hub import Hub
from .hub_cache import path_in_repository


# Enough for the headers of nearly all adapters, so that one request reads them.
HEADER_BYTES = 2**17


@dataclass(frozen=True)
class HubFilter:
    """
    What a candidate from the Hub must be.

    Args:
        base_model (`str`, *optional*): Name or path of the base model.
        layers (`Mapping[str, tuple[int, int]]`, *optional*): Its linear layers: name -> (in_features, out_features).
        check_model (`Callable`, *optional*): Raises for a full model whose description does not fit the trained one.
        search_models (`bool`): Whether searches list full models too.
        allow_licenses (`Sequence[str]`, *optional*): Licences that it may have; None allows all.
        allow_authors (`Sequence[str]`, *optional*): Users and organisations it may come from; None allows all.
        max_candidates (`int`, *optional*): How many are looked for.
    """

    base_model: str | None = None
    layers: Mapping[str, tuple[int, int]] | None = None
    check_model: Callable[[Checkpoint], Checkpoint] | None = None
    search_models: bool = False
    allow_licenses: Sequence[str] | None = None
    allow_authors: Sequence[str] | None = None
    max_candidates: int | None = None


def judge_local(candidate: Candidate, wanted: HubFilter) -> Adapter | Checkpoint:
    """
    Reads the description of a candidate whose files are on this machine, and checks it.

    Args:
        candidate (`Candidate`):
            With its `path`.
        wanted (`HubFilter`):
            What it must be.

    Raises:
        AdapterError: The reason why it does not fit.
    """
    if candidate.kind == "model":
        return _checked_model(read_checkpoint(candidate), wanted)
    return _checked_adapter(read_adapter(candidate), wanted)


def judge_remotely(candidate: Candidate, wanted: HubFilter, hub: Hub, paths: Sequence[str]) -> Candidate:
    """
    Checks a candidate by its small files and the headers of its weights, read by one request each.

    Args:
        candidate (`Candidate`):
            On the Hub.
        wanted (`HubFilter`):
            What it must be.
        hub (`Hub`):
            The connection.
        paths (`Sequence[str]`):
            All files of its repository.

    Returns:
        `Candidate`: with all its files and the size of its weights.

    Raises:
        AdapterError: The reason why it does not fit.
    """
    judge = _judge_model if candidate.kind == "model" else _judge_adapter
    return judge(candidate, wanted, _HubFiles(candidate, hub, frozenset(paths)))


def _judge_adapter(candidate: Candidate, wanted: HubFilter, files: "_HubFiles") -> Candidate:
    config = files.read(ADAPTER_CONFIG_NAME, MAX_CONFIG_BYTES)
    # Before the header of one that is unfit is asked for.
    parse_config(config)
    header, size = files.start(ADAPTER_WEIGHTS_NAME)
    _checked_adapter(parse_adapter(candidate, config, header, size), wanted)
    return replace(candidate, bytes=size)


def _judge_model(candidate: Candidate, wanted: HubFilter, files: "_HubFiles") -> Candidate:
    checkpoint = _checked_model(describe_checkpoint(candidate, files), wanted)
    size = sum(stamp.size for stamp in checkpoint.stamps.values())
    return replace(candidate, bytes=size, files=tuple(dict.fromkeys([*candidate.files, *checkpoint.stamps])))


def _checked_adapter(adapter: Adapter, wanted: HubFilter) -> Adapter:
    return adapter if wanted.layers is None else check_adapter(adapter, wanted.layers, wanted.base_model)


def _checked_model(checkpoint: Checkpoint, wanted: HubFilter) -> Checkpoint:
    return checkpoint if wanted.check_model is None else wanted.check_model(checkpoint)


@dataclass(frozen=True)
class _HubFiles:
    """The files of a candidate where they are, read by ranged requests; nothing goes to the disk."""

    candidate: Candidate
    hub: Hub
    paths: frozenset[str] = field(repr=False)

    def has(self, name: str) -> bool:
        return path_in_repository(self.candidate, name) in self.paths

    def read(self, name: str, limit: int) -> bytes:
        data, size = self.hub.get_range(self._address(name), 0, limit)
        if size > len(data):
            raise AdapterError(f"{name} has {size:,} bytes, of which {len(data):,} came; expected a small file")
        return data

    def header(self, name: str) -> tuple[dict[str, TensorInfo], FileStamp]:
        header, size = self.start(name)
        return parse_header(header, size), FileStamp(size, modified=0)

    def start(self, name: str) -> tuple[bytes, int]:
        """Returns the first bytes of a safetensors file through the end of its header, and the size of the file."""
        address = self._address(name)
        data, size = self.hub.get_range(address, 0, HEADER_BYTES)
        end = header_length(data) + 8
        if len(data) < end <= size:
            data += self.hub.get_range(address, len(data), end)[0]
        return data, size

    def _address(self, name: str) -> str:
        path = quote_path(path_in_repository(self.candidate, name))
        return f"/{self.candidate.repo_id}/resolve/{self.candidate.revision}/{path}"
