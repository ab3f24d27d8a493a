"""All weights of a model as the trainee: what fits them, how candidates are merged on disk, and the swap."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import cached_file

from ..candidates import Candidate, read_source
from ..config import MashupConfig
from ..distributed import on_main_process
from ..formats import (
    INDEX_NAME,
    MODEL_CONFIG_NAME,
    Adapter,
    BaseModel,
    Checkpoint,
    Description,
    check_unchanged,
    read_checkpoint,
    read_tensor,
    write_adapter,
)
from ..methods import MERGEKIT_NAME, MergeRule
from ..model import base_model_name, stream_parameters
from ..report import MergeInfo
from ..storage import Workspace
from ..swap import swap
from .merge import ModelInput, check_space, merge_models
from .weights import CheckpointSource, CheckpointTensors, FullUpdate, restore_weights, save_weights
from .writer import is_model_on_disk, save_model


class FullTrainee:
    """
    A model of which the weights called `names` are trained; frozen ones are never written.

    Merges go to the workspace. `adapter_source` makes of an adapter that fits the model something to score.
    """

    relations = ("adapter", "finetune")

    def __init__(
        self,
        model: nn.Module,
        names: frozenset[str],
        config: MashupConfig,
        workspace: Workspace,
        adapter_source: Callable[[Adapter], Any],
    ) -> None:
        self.model, self.names, self.config, self.workspace = model, names, config, workspace
        self.base = BaseModel.of(model, config.base_model)
        if self.base.refusal:
            raise ValueError(self.base.refusal)
        self.tensors = self.base.tensors
        self._adapter_source = adapter_source
        self._sources = {"adapter": self._adapter, "model": self._checkpoint}
        self._checkpoints: dict[Any, Checkpoint] = {}
        self._copies: dict[Path, Path] = {}
        # What others know the inputs of a merge by, not where they were for it.
        self._public_names: dict[str, str] = {}
        self._before: dict[str, Any] | None = None

    def check(self, description: Description) -> Description:
        return description.fit(self.base)

    def admit(self, candidate: Candidate) -> Any:
        source = self._sources[candidate.kind](read_source(candidate, self.check))
        if candidate.repo_id and not candidate.subfolder:
            self._public_names[str(candidate.path)] = f"{candidate.repo_id}@{candidate.revision}"
        return source

    def merge(
        self, sources: Sequence[Any], weights: Sequence[float], method: str, parameters: Mapping[str, Any]
    ) -> tuple[FullUpdate, MergeInfo]:
        """Merges candidates on disk; a single checkpoint is taken as it is."""
        if len(sources) == 1:
            method, parameters = "linear", {}
        if len(sources) == 1 and sources[0] in self._checkpoints:
            checkpoint, recipe = self._unchanged(sources[0]), ""
        else:
            checkpoint, recipe = self._merged(sources, weights, method, parameters)
        names = self.names & frozenset(checkpoint.tensors)
        update = FullUpdate(checkpoint, names, recipe, owned=bool(recipe))
        return update, self._info(checkpoint, method, parameters)

    def written(self, update: FullUpdate) -> AbstractContextManager[None]:
        return update.applied(self.model)

    def write(self, update: FullUpdate) -> None:
        """Fills the weights one at a time; of the old ones, this process's share is kept."""
        self._before = save_weights(self.model, update.names)
        swap(self.model, CheckpointTensors(update), self.undo)

    def undo(self) -> None:
        restore_weights(self.model, self._before or {}, masters=True)

    def keep(self, update: FullUpdate) -> FullUpdate:
        if update.owned:
            return update
        path = self.workspace.new("copy")
        self._check_space(1)
        on_main_process(lambda: _copy_model(update.checkpoint, path))
        return replace(update, checkpoint=read_checkpoint(path).fit(self.base), owned=True)

    def discard(self, update: FullUpdate) -> None:
        """Removes a merge that is not used; a candidate's own files stay."""
        if update.owned:
            on_main_process(lambda: shutil.rmtree(update.checkpoint.path, ignore_errors=True))

    def save(self, update: FullUpdate, directory: Path, base_model: str | None) -> None:
        """Moves a merge's files to a directory on the same disk; a candidate that is not used stays where it is."""
        if not update.owned:
            return
        for file in sorted(update.checkpoint.path.iterdir()):
            file.rename(directory / file.name)
        if update.recipe:
            (directory / MERGEKIT_NAME).write_text(update.recipe, encoding="utf-8")

    def close(self) -> None:
        self._before = None
        self.workspace.close()

    def adapter_directory(self, adapter: Adapter, load: Callable[[], Any]) -> Path:
        """Returns a copy of an adapter, written from checked tensors as mergekit has peft load it."""
        if adapter.path not in self._copies:
            path = self.workspace.new("adapter")
            on_main_process(lambda: write_adapter(path, load().factors, base_model=None))
            self._copies[adapter.path] = path
            self._public_names[str(path)] = self._public_names.get(str(adapter.path), str(adapter.path))
        return self._copies[adapter.path]

    def _adapter(self, adapter: Any) -> Any:
        # Merged into a full model, an embedding would change the head that is tied to it too.
        adapter.refuse_special()
        return self._adapter_source(adapter)

    def _checkpoint(self, checkpoint: Any) -> CheckpointSource:
        source = CheckpointSource(checkpoint)
        self._checkpoints[source] = checkpoint
        return source

    def _unchanged(self, source: Any) -> Checkpoint:
        check_unchanged(self._checkpoints[source])
        return self._checkpoints[source]

    @cached_property
    def _base_directory(self) -> Path:
        """Where the model is on disk as it is in memory now; it is written there if need be."""
        found = on_main_process(lambda: _directory_of(base_model_name(self.model)))
        if found is not None and is_model_on_disk(self.model, self.base, found):
            return found
        self._check_space(1)
        path = save_model(self.model, self.tensors, self.workspace.new("base"))
        self._public_names[str(path)] = self.base.name or "path/to/the/base/model"
        return path

    def _input(self, source: Any) -> ModelInput:
        """Returns a candidate in mergekit's terms: a checkpoint, or the base with an adapter on it."""
        if source in self._checkpoints:
            return ModelInput(self._unchanged(source).path)
        return ModelInput(self._base_directory, self.adapter_directory(source.adapter, source.load))

    def _merged(
        self, sources: Sequence[Any], weights: Sequence[float], method: str, parameters: Mapping[str, Any]
    ) -> tuple[Checkpoint, str]:
        """Merges on disk; returns the merge and mergekit's configuration of it."""
        on_base = sum(source not in self._checkpoints for source in sources)
        output = self.workspace.new("merge")
        self._check_space(1 + on_base)
        base = self._base_directory if on_base or MergeRule.create(method).needs_base else None
        inputs = [self._input(source) for source in sources]
        recipe = on_main_process(
            lambda: merge_models(
                inputs,
                output,
                weights=weights,
                method=method,
                parameters=parameters,
                base=base,
                out_dtype=str(self.tensors.dtype).removeprefix("torch."),
                seed=self.config.seed,
            )
        )
        for path, name in self._public_names.items():
            recipe = recipe.replace(path, name)
        return read_checkpoint(output).fit(self.base), recipe

    def _check_space(self, copies: int) -> None:
        directory = self.workspace.path()
        on_main_process(lambda: check_space(directory, self.tensors.bytes * copies))

    def _info(self, checkpoint: Checkpoint, method: str, parameters: Mapping[str, Any]) -> MergeInfo:
        frozen = tuple(name for name in checkpoint.tensors if name not in self.names)
        lost = self._distance(checkpoint, frozen) if frozen else 0.0
        total = lost + (self._distance(checkpoint, sorted(self.names & set(checkpoint.tensors))) if lost else 0.0)
        return MergeInfo(
            method=method,
            space="weights",
            parameters=dict(parameters),
            rank=0,
            kept_energy=1.0,
            kept_energy_by_module={},
            lost_energy=lost / total if total else 0.0,
            lost_layers=frozen if lost else (),
            mergekit_version=version("mergekit"),
        )

    def _distance(self, checkpoint: Checkpoint, names: Sequence[str]) -> float:
        """Squared distance of a checkpoint's tensors from the model's, in float64."""
        total = 0.0
        for name, value in stream_parameters(self.model, names):
            value = value.cpu()
            total += (read_tensor(checkpoint, name).double() - value.double()).square().sum().item()
        return total


def _copy_model(checkpoint: Checkpoint, directory: Path) -> None:
    directory.mkdir(parents=True)
    for name in (MODEL_CONFIG_NAME, INDEX_NAME, "generation_config.json", *checkpoint.stamps):
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, directory / name)
    check_unchanged(checkpoint)


def _directory_of(name: str | None) -> Path | None:
    """Returns the local directory that a model was loaded from: a path, or its place in the Hub's cache."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    found = cached_file(
        name,
        "config.json",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found).parent if found else None
