"""Finding the mashup of a run that was killed, so that the same run started again does not make it anew."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .candidates.candidate import Candidate
from .config import MashupConfig
from .distributed import decided, exchange, joint
from .errors import AdapterError
from .factors import LoraFactors
from .formats.adapter import load_factors, read_adapter
from .full.trainee import FittedModel, ModelMerger
from .lora.trainee import FittedMerge, checksum
from .model.layers import Target, Trainee
from .model.tensors import FullTrainee
from .report import REPORT_NAME, MashupReport, environment
from .scoring.cache import base_fingerprint
from .scoring.sample import Rows


logger = logging.getLogger(__name__)

# Settings that change where a mashup is written or what happens when it fails, and not what it is.
_WITHOUT_EFFECT = ("report_dir", "on_error")


@dataclass(frozen=True, eq=False)
class Earlier:
    """
    A mashup that an earlier start of the same run has made.

    Args:
        report (`MashupReport`): Its report.
        fitted (`FittedMerge` or `FittedModel`, *optional*): What it wrote; None where it left the model alone.
    """

    report: MashupReport
    fitted: FittedMerge | FittedModel | None


def inputs_fingerprint(
    config: MashupConfig,
    model: nn.Module,
    trainee: Trainee | FullTrainee,
    candidates: Sequence[Candidate],
    samples: Sequence[Rows],
) -> str | None:
    """
    Returns a SHA-256 in hex of all that a mashup depends on; None where a callable takes part, which cannot be
    compared. Every process must call it.

    A candidate on the Hub is told by its commit, a local one by the sizes and the times of its files.

    Args:
        config (`MashupConfig`):
            The settings.
        model (`torch.nn.Module`):
            The model that is trained.
        trainee (`Trainee` or `FullTrainee`):
            What is trained in it.
        candidates (`Sequence[Candidate]`):
            What was found.
        samples (`Sequence[Rows]`):
            The rows that select and those that guard.
    """
    if callable(config.metric):
        return None
    settings = {name: value for name, value in config.to_dict().items() if name not in _WITHOUT_EFFECT}
    parts = [
        environment(),
        settings,
        # Of a sharded model, each process has a part.
        exchange(base_fingerprint(model)),
        _trainee_fingerprint(trainee),
        decided(lambda: [_identity(candidate) for candidate in candidates]),
        [rows.fingerprint() for rows in samples],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def find_earlier(
    directory: Path, inputs: str | None, trainee: Trainee | FullTrainee, merger: ModelMerger | None
) -> Earlier | None:
    """
    Returns the mashup that is in a directory, if it was made from the same inputs and can be read. Every process must
    call it.

    Args:
        directory (`Path`):
            Where an earlier start of the run wrote its mashup.
        inputs (`str`, *optional*):
            From [`inputs_fingerprint`].
        trainee (`Trainee` or `FullTrainee`):
            What is trained.
        merger (`ModelMerger`, *optional*):
            What reads full models, for a `FullTrainee`.
    """
    report = decided(lambda: _read_report(directory, inputs)) if inputs is not None else None
    if report is None:
        return None
    try:
        with joint():
            fitted = None if report.decision == "scratch" else _read_fitted(directory, report, trainee, merger)
    except (AdapterError, OSError, RuntimeError) as error:
        logger.warning("The mashup in %s cannot be used again and is made anew: %s", directory, error)
        return None
    logger.info("The mashup in %s was made from the same inputs; it is used again.", directory)
    return Earlier(report, fitted)


def _read_report(directory: Path, inputs: str) -> MashupReport | None:
    try:
        report = MashupReport.load(directory / REPORT_NAME)
    except (OSError, ValueError):
        return None
    return report if report.inputs == inputs else None


def _read_fitted(
    directory: Path, report: MashupReport, trainee: Trainee | FullTrainee, merger: ModelMerger | None
) -> FittedMerge | FittedModel:
    if isinstance(trainee, FullTrainee):
        return merger.fitted(directory)
    # The main process reads: the others may have another file system.
    factors = decided(lambda: load_factors(read_adapter(directory)))
    if set(factors) != set(trainee.targets):
        raise AdapterError(f"it has {len(factors)} layers, the trainee {len(trainee.targets)}")
    fitted = {name: _like(target, factors[name]) for name, target in trainee.targets.items()}
    return FittedMerge(fitted, report.merge.lost_energy, report.merge.lost_layers)


def _like(target: Target, update: LoraFactors) -> LoraFactors:
    return LoraFactors(update.A.to(target.A), update.B.to(target.B), target.scaling)


def _trainee_fingerprint(trainee: Trainee | FullTrainee) -> Any:
    if isinstance(trainee, FullTrainee):
        return sorted(trainee.names)
    values = {f"{name}.{part}": getattr(target, part) for name, target in trainee.targets.items() for part in "AB"}
    return [checksum(values), {name: target.scaling for name, target in trainee.targets.items()}]


def _identity(candidate: Candidate) -> list[Any]:
    if candidate.revision is not None or candidate.path is None or not candidate.path.is_dir():
        return [candidate.name, candidate.kind, candidate.revision, candidate.reason]
    stats = ((path.name, path.stat()) for path in sorted(candidate.path.iterdir()) if path.is_file())
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return [candidate.name, candidate.kind, candidate.reason, files]
