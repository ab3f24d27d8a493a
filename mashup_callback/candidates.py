"""Where adapters come from: expands paths, globs and run directories into candidates, each usable or with a reason."""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .candidate_spec import FORMS, Spec, is_glob, parse_spec
from .errors import AdapterError
from .formats.adapter_config import CONFIG_NAME, MAX_CONFIG_BYTES, parse_config
from .formats.files import open_regular, read_limited


if TYPE_CHECKING:
    from .formats.checkpoint import Checkpoint
    from .hub import Hub

__all__ = ["Candidate", "Spec", "find_candidates", "parse_spec"]

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "adapter_model.safetensors"
SHARDED = (
    f"its weights are split over several files, expected one {WEIGHTS_NAME}: load it with peft and save it again with "
    "a larger `max_shard_size`"
)
# A directory of runs holds runs, and these hold adapters and checkpoints.
_DEPTH = 2
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")
# What this package writes into a run's output directory.
_MASHUP = {"mashup"}


@dataclass(frozen=True)
class Candidate:
    """
    An adapter or model that a mashup may use.

    Args:
        name (`str`): Path as given and expanded, or Hub repository (with folder).
        kind (`str`, *optional*, defaults to `"adapter"`): `"adapter"` or `"model"` (a full checkpoint).
        path (`Path`, *optional*): Local directory; None until downloaded.
        repo_id (`str`, *optional*): Hub repository.
        subfolder (`str`, *optional*): Folder in the repository.
        revision (`str`, *optional*): Commit of the repository, 40 hexadecimal digits.
        run (`str`, *optional*): Identity of the training run, which a run's checkpoints share.
        license (`str`, *optional*): Licence that the repository states.
        bytes (`int`, *optional*): Size of the weights.
        reason (`str`, *optional*): Why it cannot be used; None while it can.
        files (`tuple[str, ...]`): Its files on the Hub, in its folder.
    """

    name: str
    kind: str = "adapter"
    path: Path | None = None
    repo_id: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    run: str = ""
    license: str | None = None
    bytes: int | None = None
    reason: str | None = None
    files: tuple[str, ...] = ()


def find_candidates(
    specs: str | os.PathLike | Sequence[str | os.PathLike],
    base_model: str | None = None,
    *,
    exclude: Sequence[str | os.PathLike] = (),
    max_candidates: int | None = None,
    max_download_gb: float | None = None,
    allow_licenses: Sequence[str] | None = None,
    allow_authors: Sequence[str] | None = None,
    layers: Mapping[str, tuple[int, int]] | None = None,
    check_model: "Callable[[Checkpoint], Checkpoint] | None" = None,
    search_models: bool = False,
    hub: "Hub | None" = None,
) -> list[Candidate]:
    """
    Finds the adapters that the given text describes. Nothing is downloaded but what is needed to judge them.

    Args:
        specs (`str`, path or list of them):
            A local adapter, run directory or glob; `org/name[/sub/folder][@revision]`; `hub:author=..,search=..`
            (also tag, limit, sort); or `collection:org/slug`. What exists locally is local.
        base_model (`str`, *optional*):
            Hub name of the base model, or the directory that it was loaded from, for searches.
        exclude (list of paths, *optional*):
            Directories that are skipped with all that is in them, such as this run's own output.
        max_candidates (`int`, *optional*):
            Only the first so many can be used; the others are returned with that reason.
        max_download_gb (`float`, *optional*):
            Bound on what is left to download from the Hub, in 10⁹ bytes; the first candidates that fit can be used.
        allow_licenses (`Sequence[str]`, *optional*):
            Licences that a Hub candidate may have; None allows every licence.
        allow_authors (`Sequence[str]`, *optional*):
            Users and organisations that a Hub candidate may come from; None allows everyone.
        layers (`Mapping[str, tuple[int, int]]`, *optional*):
            Linear layers of the base model, name -> (in_features, out_features), which Hub candidates must fit.
        check_model (`Callable`, *optional*):
            Raises an `AdapterError` for a full model on the Hub whose description does not fit the model that is
            trained, so that it is not downloaded.
        search_models (`bool`, *optional*, defaults to `False`):
            Whether searches list full fine-tunes of the base model beside adapters.
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
    entries = [specs] if isinstance(specs, str | os.PathLike) else specs
    excluded = [os.path.realpath(os.path.expanduser(path)) for path in exclude]
    limits = {
        "allow_licenses": allow_licenses,
        "allow_authors": allow_authors,
        "layers": layers,
        "check_model": check_model,
        "search_models": search_models,
    }
    found: list[Candidate] = []
    for spec in [_resolve(entry) for entry in entries]:
        if spec.kind == "path":
            found += _find_locally(spec, excluded)
        else:
            left = None if max_candidates is None else max_candidates - sum(item.reason is None for item in found)
            hub = hub or _connect()
            found += _find_on_hub(spec, hub, base_model=base_model, max_candidates=left, **limits)
    return _limit_download(_limit(_reject_duplicates(_unique(found)), max_candidates), max_download_gb)


def check_specs(specs: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[str | os.PathLike, ...]:
    """
    Checks the text of candidates before anything is looked for, and returns it as a tuple.

    Args:
        specs (`str`, path or list of them):
            As in [`find_candidates`].

    Raises:
        ValueError: If there is none, an entry is not of the grammar, or a local path that is no glob does not exist.
        TypeError: If an entry is neither text nor a path.
    """
    entries = tuple([specs] if isinstance(specs, str | os.PathLike) else specs)
    if not entries:
        raise ValueError(f"There are no candidates, expected at least one of: {FORMS}.")
    for spec in map(_resolve, entries):
        if spec.kind == "path" and not spec.is_glob:
            _require(Path(os.path.expanduser(spec.path)), spec)
    # A path stays one: as text, it might be something else.
    return entries


def is_shard(name: str) -> bool:
    """Whether a file is a part of an adapter's weights, or the index of the parts."""
    return re.fullmatch(r"adapter_model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)", name) is not None


def _require(path: Path, spec: Spec) -> None:
    if not os.path.lexists(path):
        raise ValueError(f"{str(spec)!r} does not exist on this machine, and is not on the Hub; expected {FORMS}.")
    if os.path.isfile(path):
        raise _is_file(path)


def _resolve(entry: str | os.PathLike) -> Spec:
    if isinstance(entry, os.PathLike):
        return Spec("path", path=os.fspath(entry))
    if not isinstance(entry, str):
        raise TypeError(f"a candidate is {type(entry).__name__} {entry!r}, expected text or a path: {FORMS}.")
    spec = parse_spec(entry)
    return Spec("path", path=str(spec)) if spec.kind == "repo" and os.path.lexists(str(spec)) else spec


def _connect() -> "Hub":
    # Imported here because most candidates are local.
    from .hub import Hub

    return Hub()


def _find_on_hub(spec: Spec, hub: "Hub", **wanted: Any) -> list[Candidate]:
    # Imported here because it imports torch, and this module's Candidate.
    from .hub_judging import HubFilter
    from .hub_search import find_on_hub

    return find_on_hub(spec, HubFilter(**wanted), hub)


def _find_locally(spec: Spec, excluded: Sequence[str]) -> list[Candidate]:
    path = Path(os.path.expanduser(spec.path))
    if os.path.lexists(path):
        return _expand_literal(path, excluded)
    if not spec.is_glob:
        raise ValueError(f"{str(spec)!r} does not exist here and is no name of a Hub repository, expected {FORMS}.")
    found = [item for match in _glob(path) if not _skip(match, excluded) for item in _expand(match, excluded)]
    if not found:
        logger.warning("No adapter matches %s (yet): nothing to start from there.", spec)
    return found


def _expand_literal(path: Path, excluded: Sequence[str]) -> list[Candidate]:
    if _skip(path, excluded):
        return [_candidate(path, reason="it is this run's own output or that of a mashup")]
    if os.path.isfile(path):
        raise _is_file(path)
    reason = f"it holds no adapter, expected {CONFIG_NAME} and {WEIGHTS_NAME} in it or one level below"
    return list(_expand(path, excluded)) or [_candidate(path, reason=reason)]


def _is_file(path: Path) -> ValueError:
    return ValueError(f"{str(path)!r} is a file, expected the directory that holds {CONFIG_NAME}: {path.parent}.")


def _glob(path: Path) -> list[Path]:
    literal = [*itertools.takewhile(lambda part: not is_glob(part), path.parts)]
    root, pattern = Path(*literal), str(Path(*path.parts[len(literal) :]))
    try:
        # pathlib's ** does not follow symbolic links, glob's does and can run in circles.
        parts = {match: match.relative_to(root).parts for match in root.glob(pattern)}
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{str(path)!r} is no glob: {error}. Use *, ?, [...], or ** as a whole part.") from error
    return sorted((match for match in parts if not _MASHUP & {*parts[match]} and match.name[0] != "."), key=_order)


def _order(path: Path) -> tuple[object, ...]:
    """Sort key: by directory, finished adapters before checkpoints, checkpoint-2 before checkpoint-10."""
    return [_natural(part) for part in path.parent.parts], _is_checkpoint(path), _natural(path.name)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split("([0-9]+)", name)]


def _is_checkpoint(path: Path) -> bool:
    return _CHECKPOINT.fullmatch(path.name) is not None


def _skip(path: Path, excluded: Sequence[str]) -> bool:
    real = os.path.realpath(path)
    if any(real == directory or real.startswith(os.path.join(directory, "")) for directory in excluded):
        return True
    reports = (parent for parent in path.parents if parent.name in _MASHUP)
    return path.name in _MASHUP or any(os.path.exists(parent / "report.json") for parent in reports)


def _expand(directory: Path, excluded: Sequence[str], depth: int = _DEPTH) -> Iterator[Candidate]:
    """Yields what the directory itself is, then what the directories in it are."""
    try:
        entries = {entry.name: os.path.isdir(entry) for entry in os.scandir(directory)}
    except NotADirectoryError:
        return
    except OSError as error:
        yield _candidate(directory, reason=f"it cannot be read: {error}")
        return
    candidate = _describe(directory, entries)
    if candidate:
        yield candidate
    if depth == 0 or (candidate and _is_checkpoint(directory)):
        return
    children = [directory / name for name, is_dir in entries.items() if is_dir and not name.startswith(".")]
    for child in sorted(children, key=_order):
        if not _skip(child, excluded):
            yield from _expand(child, excluded, depth - 1)


def _describe(directory: Path, entries: Iterable[str]) -> Candidate | None:
    if CONFIG_NAME in entries:
        if WEIGHTS_NAME in entries:
            return _candidate(directory, bytes=_size(directory / WEIGHTS_NAME))
        if any(map(is_shard, entries)):
            return _candidate(directory, reason=SHARDED)
        if any(name.endswith((".bin", ".pt", ".pth")) for name in entries):
            return _candidate(
                directory, reason=f"it has only pickled weights, which are never opened, and no {WEIGHTS_NAME}"
            )
        return _candidate(directory, reason=f"{WEIGHTS_NAME} is missing: its training may have been interrupted")
    shards = [name for name in entries if name.endswith(".safetensors")]
    if "config.json" in entries and (shards or "model.safetensors.index.json" in entries):
        return _candidate(directory, kind="model", bytes=sum(_size(directory / name) or 0 for name in shards))
    if "config.json" in entries and any(name.endswith(".bin") for name in entries):
        return _candidate(directory, kind="model", reason="it has only pickled weights, which are never opened")
    return None


def _candidate(directory: Path, **fields: object) -> Candidate:
    return Candidate(name=str(directory), path=directory, run=_run_of(directory), **fields)


def _run_of(directory: Path) -> str:
    """Returns the run directory: the one that holds `checkpoint-*`, the adapter's own or one above it."""
    real = Path(os.path.realpath(directory))
    for path in (real, real.parent):
        if _is_checkpoint(path):
            return str(path.parent)
    try:
        siblings = os.listdir(real.parent)
    except OSError:
        return str(real)
    return str(real.parent) if any(_CHECKPOINT.fullmatch(name) for name in siblings) else str(real)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _unique(found: Iterable[Candidate]) -> list[Candidate]:
    """Drops what is listed twice, by path."""
    unique: dict[object, Candidate] = {}
    for item in found:
        unique.setdefault(os.path.realpath(item.path) if item.path else (item.name, item.revision), item)
    return list(unique.values())


def _reject_duplicates(found: Sequence[Candidate]) -> list[Candidate]:
    """Rejects all but one of those with the same content, and keeps a run's final adapter over its checkpoints."""
    sizes = [item.bytes for item in found if item.path and not item.reason]
    shared = [item for item in found if item.path and not item.reason and sizes.count(item.bytes) > 1]
    kept: dict[str, Candidate] = {}
    names: dict[Candidate, str] = {}
    for item in sorted(shared, key=lambda item: _is_checkpoint(item.path)):
        digest = _digest(item.path)
        if digest is not None and kept.setdefault(digest, item) is not item:
            names[item] = kept[digest].name
    return [
        dataclasses.replace(item, reason=f"identical to {names[item]}") if item in names else item for item in found
    ]


def _digest(directory: Path) -> str | None:
    """Returns a hash of what the adapter computes, or None where it cannot be read: that gets its own reason later."""
    try:
        config = parse_config(read_limited(directory / CONFIG_NAME, MAX_CONFIG_BYTES))
        digest = hashlib.sha256(json.dumps(config.effective()).encode())
        with os.fdopen(open_regular(directory / WEIGHTS_NAME), "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except (AdapterError, OSError):
        return None
    return digest.hexdigest()


def _limit(found: Sequence[Candidate], max_candidates: int | None) -> list[Candidate]:
    if max_candidates is None:
        return list(found)
    result, used = [], 0
    for item in found:
        used += item.reason is None
        over = item.reason is None and used > max_candidates
        result.append(dataclasses.replace(item, reason=f"beyond max_candidates={max_candidates}") if over else item)
    return result


def _limit_download(found: Sequence[Candidate], max_download_gb: float | None) -> list[Candidate]:
    if max_download_gb is None:
        return list(found)
    result, total = [], 0
    for item in found:
        size = item.bytes or 0 if item.path is None and item.reason is None else 0
        over = size > 0 and total + size > max_download_gb * 1e9
        reason = f"its {size:,} bytes would exceed max_download_gb={max_download_gb:g}"
        total += 0 if over else size
        result.append(dataclasses.replace(item, reason=reason) if over else item)
    return result
