"""What the command line does with adapters without a Trainer: check, score, merge and save them."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from .candidates import Candidate, read_source
from .config import MashupConfig
from .errors import AdapterError
from .formats import CONFIG_NAME, BaseModel
from .lora import MergedAdapter, merge_adapters
from .model import layer_shapes, located, undisturbed
from .report import CandidateRow, MashupReport, environment
from .scoring import SampleRows, Score, evaluate, score_candidates
from .sharing import save_mashup
from .storage import refuse_foreign, refuse_overlap


logger = logging.getLogger(__name__)


def base_of(model: str, name: str | None) -> BaseModel:
    """Returns what an adapter of a causal language model must fit, without loading the model's weights."""
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).expanduser().is_dir():
        raise FileNotFoundError(f"There is no model directory {model!r}. Give a directory, or a name on the Hub.")
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    return BaseModel(layer_shapes(net), name=name or model)


def describe_candidate(candidate: Candidate, check: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns a candidate's fields with its warnings and the reason why it does not fit, and its rank."""
    row = asdict(candidate) | {"path": candidate.path and str(candidate.path), "warnings": []}
    if candidate.reason or candidate.path is None:
        return row
    try:
        found = read_source(candidate, check)
    except AdapterError as error:
        return row | {"reason": str(error)}
    return row | {"rank": getattr(found, "rank", None), "warnings": list(found.warnings)}


def score(
    model: nn.Module, candidates: Sequence[Candidate], rows: SampleRows, metric: str, **settings: Any
) -> tuple[list[Score], float]:
    """Returns the scores of candidates, and the loss of the model alone."""
    scores = score_candidates(model, candidates, rows, metric, **settings)
    with undisturbed(model):
        return scores, evaluate(model, rows, metric).mean_loss


def usable(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the candidates that have no reason against them and warns of the others; raises where none is left."""
    for candidate in candidates:
        if candidate.reason:
            logger.warning("Left out: %s: %s", candidate.name, candidate.reason)
    chosen = [candidate for candidate in candidates if not candidate.reason]
    if not chosen:
        reasons = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in candidates[:3])
        raise ValueError(f"There is no usable adapter ({reasons or 'nothing was found'}).")
    return chosen


def finished(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the usable adapters, without the checkpoints of runs whose final adapter is among them."""
    reason = "a full model; merge those with mergekit's own command, or in a run that trains all weights"
    chosen = usable(
        [replace(item, reason=item.reason or reason) if item.kind == "model" else item for item in candidates]
    )
    runs = {candidate.run for candidate in chosen if not _is_checkpoint(candidate)}
    return [candidate for candidate in chosen if not (_is_checkpoint(candidate) and candidate.run in runs)]


def save_merge(
    directory: Path, candidates: Sequence[Candidate], config: MashupConfig, *, rank: int | None = None
) -> MashupReport:
    """Merges adapters and saves the merge as a mashup without losses; returns its report."""
    refuse_overlap(directory, [candidate.path for candidate in candidates])
    refuse_foreign(directory)
    with tempfile.TemporaryDirectory() as temporary:
        adapters = [read_source(candidate) for candidate in candidates]
        merged = merge_adapters(
            candidates,
            weights=config.weights,
            method=config.merge_method,
            parameters=config.merge_parameters,
            space=config.merge_space,
            rank=rank,
            output_dir=Path(temporary) / "merge",
            seed=config.seed,
        )
        path = merged.path / CONFIG_NAME
        written = json.loads(path.read_text(encoding="utf-8"))
        types = {adapter.config.task_type for adapter in adapters}
        written["base_model_name_or_path"] = config.base_model or located(written["base_model_name_or_path"])
        written["task_type"] = types.pop() if len(types) == 1 else None
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        report = _report(candidates, adapters, merged, config, written["base_model_name_or_path"])
        save_mashup(directory, report, lambda draft: shutil.copytree(merged.path, draft, dirs_exist_ok=True))
    return report


def _is_checkpoint(candidate: Candidate) -> bool:
    return candidate.path is not None and candidate.path.name.startswith("checkpoint-")


def _report(
    candidates: Sequence[Candidate],
    adapters: Sequence[Any],
    merged: MergedAdapter,
    config: MashupConfig,
    base_model: str | None,
) -> MashupReport:
    rows = [
        CandidateRow(
            found.name,
            "unscored",
            revision=found.revision,
            weight=weight,
            rank=adapter.rank,
            license=found.license,
            bytes=found.bytes,
            warnings=adapter.warnings,
        )
        for found, adapter, weight in zip(candidates, adapters, merged.weights, strict=True)
    ]
    return MashupReport(
        decision="merged" if len(rows) > 1 else "single",
        reason="merged without data: nothing was scored",
        candidates=tuple(rows),
        merge=merged.info(),
        base_model=base_model,
        config=config.to_dict(),
        environment=environment(),
    )
