"""A LoRA adapter as the trainee: what fits it, what it can hold of a merge, and the swap."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..candidates import Candidate, read_source
from ..config import MashupConfig
from ..distributed import failing_together, on_main_process
from ..formats import BaseModel, Description, write_adapter, write_tensors
from ..model import BaseWeights, compute_device, write_parameters
from ..report import MergeInfo
from ..storage import Workspace
from ..swap import swap
from .extraction import extract
from .fitting import fit, held
from .merge import merge_factors
from .source import AdapterSource, LoraUpdate
from .targets import TrainedAdapter


class LoraTrainee:
    """The LoRA adapter that is trained; low-rank parts of full checkpoints go to the workspace."""

    relations = ("adapter",)

    def __init__(self, model: nn.Module, adapter: TrainedAdapter, config: MashupConfig, workspace: Workspace) -> None:
        self.model, self.adapter, self.config, self.workspace = model, adapter, config, workspace
        self.base = BaseModel.of(model, config.base_model)
        self._weights = BaseWeights(model)
        self._sources = {"adapter": self._adapter_source, "model": self._extracted}

    def check(self, description: Description) -> Description:
        return description.fit(self.base)

    def admit(self, candidate: Candidate) -> AdapterSource:
        """Returns a candidate on disk as something to score: a full checkpoint as the low-rank part of its update."""
        return self._sources[candidate.kind](read_source(candidate, self.check))

    def merge(
        self, sources: Sequence[AdapterSource], weights: Sequence[float], method: str, parameters: Mapping[str, Any]
    ) -> tuple[LoraUpdate, MergeInfo]:
        """Merges adapters, cut to the adapter's ranks and layers."""
        merged = on_main_process(
            lambda: merge_factors(
                [source.load().factors for source in sources],
                weights=weights,
                method=method,
                parameters=parameters,
                space=self.config.merge_space,
                ranks=self.adapter.ranks,
                seed=self.config.seed,
                device=compute_device(self.model),
            )
        )
        return LoraUpdate(fit(merged.factors, self.adapter)), merged.info(self.adapter.ranks)

    def written(self, update: LoraUpdate) -> AbstractContextManager[None]:
        """Returns a context in which the adapter holds an update of any rank, cut to its own."""
        return held(self.model, self.adapter, update.factors)

    def write(self, update: LoraUpdate) -> None:
        """Fills A and B in place."""
        values = self.adapter.values(update.factors)
        with failing_together():
            _check_shapes(values, self.adapter.before)
        swap(self.model, values, self.undo)

    def undo(self) -> None:
        write_parameters(self.model, self.adapter.before)

    def keep(self, update: LoraUpdate) -> LoraUpdate:
        # It has no files.
        return update

    def discard(self, update: LoraUpdate) -> None:
        """Does nothing: an update has no files."""

    def save(self, update: LoraUpdate, directory: Path, base_model: str | None) -> None:
        """Writes an update as a PEFT adapter, in the ranks and the precision of the trained one."""
        if not self.adapter.is_plain(update.factors):
            write_tensors(directory, *self.adapter.saved(update.factors, base_model))
            return
        task_type = getattr(self.adapter.config.task_type, "value", self.adapter.config.task_type)
        write_adapter(directory, update.factors, base_model=base_model, task_type=task_type)

    def close(self) -> None:
        self.workspace.close()

    def _adapter_source(self, adapter: Any) -> AdapterSource:
        return AdapterSource(adapter, self._weights)

    def _extracted(self, checkpoint: Any) -> AdapterSource:
        path = self.workspace.new("extracted")
        adapter = extract(self.model, checkpoint, self.adapter.ranks, self.config.min_kept_energy, path)
        return self._adapter_source(adapter.fit(self.base))


def _check_shapes(values: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        if name not in before or value.shape != before[name].shape:
            expected = tuple(before[name].shape) if name in before else "no such parameter"
            raise ValueError(f"The merge has shape {tuple(value.shape)} for {name}, the trainee {expected}.")
