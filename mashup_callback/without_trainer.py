"""What the command line does with adapters without a Trainer: check them against a base model, merge and save them."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .candidates import Candidate, fits, read_source
from .config import MashupConfig
from .errors import AdapterError
from .formats.adapter import Adapter, read_adapter
from .formats.adapter_config import CONFIG_NAME
from .lora.merge import MergedAdapter, merge_adapters
from .model.layers import layer_shapes
from .report import REPORT_NAME, CandidateRow, MashupReport, MergeInfo, environment
from .sharing.save import describe
from .storage import refuse_overlap, replacing


logger = logging.getLogger(__name__)


def model_shapes(model: str) -> dict[str, tuple[int, int]]:
    """
    Returns (in_features, out_features) of a causal language model's linear layers, from its configuration alone.

    Args:
        model (`str`):
            Hub name or local directory. Its weights are not loaded.
    """
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    return layer_shapes(net)


def describe_candidate(
    candidate: Candidate, shapes: Mapping[str, tuple[int, int]], base_model: str | None
) -> dict[str, Any]:
    """
    Returns a candidate's fields with its rank, warnings and the reason why it does not fit, if it is on disk.

    Args:
        candidate (`Candidate`):
            From [`find_candidates`].
        shapes (`Mapping[str, tuple[int, int]]`):
            From [`model_shapes`].
        base_model (`str`, *optional*):
            Name of the model, to warn about adapters that record another one.
    """
    row = asdict(candidate) | {"path": candidate.path and str(candidate.path), "rank": None, "warnings": []}
    if candidate.reason or candidate.path is None:
        return row
    try:
        found = read_source(candidate, fits(shapes, base_model))
    except AdapterError as error:
        return row | {"reason": str(error)}
    return row | {"rank": found.rank, "warnings": list(found.warnings)}


def usable(candidates: Sequence[Candidate]) -> list[Candidate]:
    """
    Returns the candidates that have no reason against them, and warns of the others.

    Raises:
        ValueError: None is usable.
    """
    for candidate in candidates:
        if candidate.reason:
            logger.warning("Left out: %s: %s", candidate.name, candidate.reason)
    chosen = [candidate for candidate in candidates if not candidate.reason]
    if not chosen:
        reasons = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in candidates[:3])
        raise ValueError(f"There is no usable adapter ({reasons or 'nothing was found'}).")
    return chosen


def finished(candidates: Sequence[Candidate]) -> list[Candidate]:
    """
    Returns the usable adapters, without the checkpoints of runs whose final adapter is among them.

    Raises:
        ValueError: None is usable.
    """
    reason = "a full model; merge those with mergekit's own command, or in a run that trains all weights"
    chosen = usable(
        [replace(item, reason=item.reason or reason) if item.kind == "model" else item for item in candidates]
    )
    runs = {candidate.run for candidate in chosen if not _is_checkpoint(candidate)}
    return [candidate for candidate in chosen if not (_is_checkpoint(candidate) and candidate.run in runs)]


def publish_merge(
    directory: str | Path, candidates: Sequence[Candidate], config: MashupConfig, *, rank: int | None = None
) -> MashupReport:
    """
    Merges adapters and saves the merge as a PEFT adapter with model card, report and mergekit configuration.

    Args:
        directory (`str` or `Path`):
            Where to; an earlier merge there is replaced.
        candidates (`Sequence[Candidate]`):
            Adapters on disk.
        config (`MashupConfig`):
            Its weights, method, parameters, space, seed and base model are used.
        rank (`int`, *optional*):
            Rank of the merge; by default the largest of the adapters', for each module.

    Returns:
        `MashupReport`: What was written as `report.json`.

    Raises:
        ValueError: The directory holds other files or an input, the settings do not fit together, or an adapter
            cannot be used.
    """
    refuse_overlap(directory, [candidate.path for candidate in candidates])
    with replacing(directory) as draft:
        adapters = [read_adapter(candidate) for candidate in candidates]
        merged = merge_adapters(
            candidates,
            weights=config.weights,
            method=config.merge_method,
            parameters=config.merge_parameters,
            space=config.merge_space,
            rank=rank,
            output_dir=draft,
            seed=config.seed,
        )
        written = json.loads((draft / CONFIG_NAME).read_text(encoding="utf-8"))
        base_model = config.base_model or written["base_model_name_or_path"]
        types = {adapter.config.task_type for adapter in adapters}
        task_type = types.pop() if len(types) == 1 else None
        written |= {"base_model_name_or_path": base_model, "task_type": task_type}
        (draft / CONFIG_NAME).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        report = _report(adapters, merged, config, base_model)
        describe(draft, report, task_type)
        report.save(draft / REPORT_NAME)
    return report


def _is_checkpoint(candidate: Candidate) -> bool:
    return candidate.path is not None and candidate.path.name.startswith("checkpoint-")


def _report(
    adapters: Sequence[Adapter], merged: MergedAdapter, config: MashupConfig, base_model: str | None
) -> MashupReport:
    rows = [
        CandidateRow(
            name=adapter.candidate.name,
            status="unscored",
            revision=adapter.candidate.revision,
            weight=weight,
            rank=adapter.rank,
            license=adapter.candidate.license,
            bytes=adapter.candidate.bytes,
            warnings=adapter.warnings,
        )
        for adapter, weight in zip(adapters, merged.weights, strict=True)
    ]
    return MashupReport(
        decision="merged" if len(rows) > 1 else "single",
        reason="merged without data: nothing was scored",
        candidates=tuple(rows),
        merge=MergeInfo(
            method=merged.method,
            space=merged.space,
            parameters=dict(merged.parameters),
            rank=merged.rank,
            kept_energy=merged.total_kept_energy,
            kept_energy_by_module=dict(merged.kept_energy),
            lost_energy=0.0,
            lost_layers=(),
            mergekit_version=merged.mergekit_version,
        ),
        base_model=base_model,
        config=config.to_dict(),
        environment=environment(),
    )
