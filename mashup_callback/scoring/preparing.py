"""What a candidate needs before it can be scored, made by a thread while others are scored."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..candidates.candidate import Candidate
from ..distributed import exchange
from ..errors import AdapterError
from ..factors import Factors, LoraFactors
from ..formats.adapter import Adapter, check_adapter, read_adapter
from ..formats.checkpoint import Checkpoint, is_checkpoint
from ..full.weights import load_update
from ..lora.hooks import StackedFactors, empty_stack
from ..model.layers import refuse_huge, weight_norms
from ..model.parameters import is_sharded
from .cache import ScoreCache, score_key, shared_fingerprint
from .halving import Score
from .losses import RowLosses
from .sample import Rows


Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Prepared:
    """
    A candidate that is ready to be scored.

    Args:
        update (`Mapping[str, LoraFactors]` or `FullUpdate`, *optional*): What it changes, on the model's device.
        losses (`RowLosses`, *optional*): Its losses, where they are known from an earlier run.
        key (`str`, *optional*): Under which they are kept.
        error (`Exception`, *optional*): Why it could not be read.
        place (`int`, *optional*): Its place in the stack of its group.
        seconds (`float`): Its share of the time that its group has taken.
    """

    update: Any = None
    losses: RowLosses | None = None
    key: str | None = None
    error: Exception | None = None
    place: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class PreparedGroup:
    """
    Candidates that are scored together, or one after the other.

    Args:
        members (`list[Prepared]`): Each of them.
        stacked (`list[StackedFactors]`, *optional*): The updates of those that have a place, on the model's device.
    """

    members: list[Prepared]
    stacked: list[StackedFactors] | None = None


class Preparation:
    """
    Reads candidates: their scores from the cache, else their tensors from the disk to the model's device.

    What a callable metric measures is not known, so it is not cached.

    Args:
        model (`torch.nn.Module`):
            The model that they are scored on.
        metric (`str` or `Callable`):
            What is measured.
        fingerprint (`str`, *optional*):
            The model's, where it is known.
    """

    def __init__(self, model: nn.Module, metric: Any, fingerprint: str | None = None) -> None:
        self.device = next(model.parameters()).device
        # A probe begins with the loss, and is not kept itself: it depends on the trainee.
        self.metric, self.cache = "loss" if metric == "probe" else metric, ScoreCache()
        self.cached = not callable(metric) and self.cache.directory is not None
        self.model, self.base = model, fingerprint
        self._fingerprints: dict[int, str] = {}
        # No process has the whole weights of a sharded model.
        self.norms = {} if is_sharded(model) else weight_norms(model)

    def sample(self, part: Rows) -> None:
        """Takes the fingerprint of rows; to be called before they are scored, while their batches are whole."""
        if self.cached:
            self.base = self.base or shared_fingerprint(self.model)
            self._fingerprints[id(part)] = part.fingerprint()

    def __call__(self, sources: Sequence[Any], part: Rows) -> PreparedGroup:
        """Reads a group of candidates; those that are None need nothing."""
        members = [Prepared() if source is None else self._known(source, part) for source in sources]
        unknown = [
            index
            for index, (source, member) in enumerate(zip(sources, members, strict=True))
            if source is not None and member.losses is None and member.error is None
        ]
        if len(unknown) < 2:
            for index in unknown:
                members[index] = self._read(sources[index], members[index])
            return PreparedGroup(members)
        stacked = empty_stack([sources[index].modules for index in unknown])
        for place, index in enumerate(unknown):
            members[index] = self._put(stacked, place, sources[index], members[index])
        return PreparedGroup(members, [factors.to(self.device) for factors in stacked])

    def alone(self, source: Any, part: Rows) -> Prepared:
        """Reads one candidate."""
        return self([source], part).members[0]

    def _known(self, source: Any, part: Rows) -> Prepared:
        try:
            key = self._key(source, part)
            return Prepared(None, self.cache.get(key, len(part)) if key else None, key)
        except (AdapterError, OSError, RuntimeError) as error:
            return Prepared(error=error)

    def _read(self, source: Any, known: Prepared) -> Prepared:
        try:
            return replace(known, update=_to(self._load(source), self.device))
        except (AdapterError, OSError, RuntimeError) as error:
            return Prepared(error=error)

    def _put(self, stacked: Sequence[StackedFactors], place: int, source: Any, known: Prepared) -> Prepared:
        try:
            update = self._load(source)
        except (AdapterError, OSError, RuntimeError) as error:
            # Its place in the stack stays zero and is of no use.
            return Prepared(error=error)
        for factors in stacked:
            factors.put(place, update)
        return replace(known, place=place)

    def _load(self, source: Any) -> Any:
        update = load_update(source)
        if isinstance(source, Adapter):
            refuse_huge(update, self.norms)
        return update

    def keep(self, prepared: Prepared, losses: RowLosses) -> None:
        """Keeps what was measured for the next run."""
        if prepared.key is not None and prepared.losses is None:
            self.cache.put(prepared.key, losses)

    def keep_all(self, group: PreparedGroup, losses: Sequence[RowLosses], seconds: float) -> list[Prepared]:
        """Keeps the losses of a stack, and returns the members with theirs and the seconds that each took."""
        members = list(group.members)
        for index, member in enumerate(members):
            if member.place is not None:
                self.keep(member, losses[member.place])
                members[index] = replace(member, losses=losses[member.place], seconds=seconds)
        return members

    def _key(self, source: Any, part: Rows) -> str | None:
        if not self.cached or not isinstance(source, Adapter):
            return None
        return score_key(source, self.base, self._fingerprints[id(part)], self.metric)


@contextmanager
def ahead(items: Iterable[Item], prepare: Callable[[Item], Result]) -> Iterator[Iterator[tuple[Item, Result]]]:
    """
    Context with an iterator over the items, each with what `prepare` makes of it, one ahead of who uses it.

    Args:
        items (`Iterable`):
            Taken from the same thread that prepares them.
        prepare (`Callable`):
            Called in the order of the items.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="mashup-prepare") as pool:
        yield _ahead(iter(items), prepare, pool)


def _ahead(
    items: Iterator[Item], prepare: Callable[[Item], Result], pool: ThreadPoolExecutor
) -> Iterator[tuple[Item, Result]]:
    def following() -> tuple[Item, Result] | None:
        for item in items:
            return item, prepare(item)
        return None

    coming = pool.submit(following)
    while (pair := coming.result()) is not None:
        coming = pool.submit(following)
        yield pair


def _to(update: Any, device: torch.device) -> Factors | Any:
    if device.type == "cpu" or not isinstance(update, dict):
        return update
    return {
        name: LoraFactors(factors.A.to(device), factors.B.to(device), factors.scaling)
        for name, factors in update.items()
    }


def admitted(
    candidate: Candidate | Adapter | str | Path,
    shapes: Mapping[str, tuple],
    base_model: str | None,
    admit_model: Callable[[Candidate], Adapter | Checkpoint],
) -> Score:
    """
    Returns a candidate as something to score, or as rejected with the reason.

    Args:
        candidate (`Candidate`, `Adapter` or path):
            What was asked for.
        shapes (`Mapping[str, tuple]`):
            (in_features, out_features) of the model's linear layers.
        base_model (`str`, *optional*):
            Name of the base model.
        admit_model (`Callable`):
            What makes of a full checkpoint something to score.
    """
    if isinstance(candidate, str | Path):
        kind = "model" if is_checkpoint(Path(candidate)) else "adapter"
        candidate = Candidate(name=str(candidate), kind=kind, path=Path(candidate), run=str(candidate))
    found = candidate.candidate if isinstance(candidate, Adapter) else candidate
    if found.reason is not None:
        return Score(found, "rejected", found.reason)
    try:
        if found.kind == "model":
            return Score(found, adapter=admit_model(found))
        adapter = candidate if isinstance(candidate, Adapter) else read_adapter(candidate)
        return Score(found, adapter=check_adapter(adapter, shapes, base_model))
    except AdapterError as error:
        return Score(found, "rejected", str(error))


def admitted_by_all(scores: list[Score]) -> list[Score]:
    """Returns the main process's candidates, and rejects those that another process lacks or cannot read."""
    everywhere = exchange({score.candidate.key: (score.candidate.run, score.reason) for score in scores})
    here = {score.candidate.key: score for score in scores}
    if len(everywhere) == 1:
        return scores
    # Where a file system is not shared, an adapter's path and what is recorded with it are each process's own.
    found = [here.get(key) or Score(Candidate(key[0], revision=key[1]), "rejected") for key in everywhere[0]]
    return [_rejected_by_one(score, everywhere) for score in found]


def _rejected_by_one(score: Score, everywhere: Sequence[Mapping[tuple, tuple[str, str | None]]]) -> Score:
    key = score.candidate.key
    reasons = [found[key][1] if key in found else "it is not found there" for found in everywhere]
    refusing = [rank for rank, reason in enumerate(reasons) if reason is not None]
    score = replace(score, candidate=replace(score.candidate, run=everywhere[0][key][0]))
    if not refusing:
        return score
    where = "" if len(refusing) == len(everywhere) else f"process {refusing[0]}: "
    return replace(score, status="rejected", reason=f"{where}{reasons[refusing[0]]}")
