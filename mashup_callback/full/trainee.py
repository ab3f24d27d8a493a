"""All weights of a model as the trainee: what fits them, how candidates are merged on disk, and the swap."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
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
from .merge import check_space, merge_models
from .sources import AdapterOnBase, CheckpointSource
from .weights import CheckpointTensors, FullUpdate, restore_weights, save_weights
from .writer import is_model_on_disk, save_model


Source = CheckpointSource | AdapterOnBase


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
        self._sources: dict[str, Callable[[Any], Source]] = {
            "adapter": lambda found: _on_base(found, adapter_source),
            "model": CheckpointSource,
        }
        self._adapters: dict[Path, Path] = {}
        self._hub_names: dict[str, str] = {}
        self._before: dict[str, Any] | None = None

    def check(self, description: Description) -> Description:
        return description.fit(self.base)

    def admit(self, candidate: Candidate) -> Source:
        source = self._sources[candidate.kind](read_source(candidate, self.check))
        if candidate.repo_id and not candidate.subfolder:
            self._hub_names[str(candidate.path)] = f"{candidate.repo_id}@{candidate.revision}"
        return source

    def merge(
        self, sources: Sequence[Source], weights: Sequence[float], method: str, parameters: Mapping[str, Any]
    ) -> tuple[FullUpdate, MergeInfo]:
        """Merges candidates on disk; a single checkpoint is taken as it is."""
        if len(sources) == 1:
            method, parameters = "linear", {}
        if len(sources) == 1 and (checkpoint := sources[0].alone()) is not None:
            update = FullUpdate(checkpoint, self.names & frozenset(checkpoint.tensors))
        else:
            update = self._merged(sources, weights, method, parameters)
        return update, self._info(update.checkpoint, method, parameters)

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
        on_main_process(partial(check_space, self.workspace.path(), self.tensors.bytes))
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

    def base_directory(self) -> Path:
        """Returns where the model is on disk as it is in memory now; it is written there if need be."""
        return self._base[0]

    def adapter_directory(self, adapter: Adapter, load: Callable[[], Any]) -> Path:
        """Returns a copy of an adapter, written from checked tensors as mergekit has peft load it."""
        if adapter.path not in self._adapters:
            path = self.workspace.new("adapter")
            on_main_process(lambda: write_adapter(path, load().factors, base_model=None))
            self._adapters[adapter.path] = path
        return self._adapters[adapter.path]

    @cached_property
    def _base(self) -> tuple[Path, bool]:
        """Where the model is on disk, and whether it was written there by this run."""
        found = on_main_process(lambda: _directory_of(base_model_name(self.model)))
        if found is not None and is_model_on_disk(self.model, found):
            return found, False
        on_main_process(partial(check_space, self.workspace.path(), self.tensors.bytes))
        return save_model(self.model, self.workspace.new("base")), True

    def _merged(
        self, sources: Sequence[Source], weights: Sequence[float], method: str, parameters: Mapping[str, Any]
    ) -> FullUpdate:
        on_base = sum(source.needs_base for source in sources)
        output = self.workspace.new("merge")
        on_main_process(partial(check_space, self.workspace.path(), self.tensors.bytes * (1 + on_base)))
        base = self.base_directory() if on_base or MergeRule.create(method).needs_base else None
        inputs = [source.merge_input(self) for source in sources]
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
        checkpoint = read_checkpoint(output).fit(self.base)
        return FullUpdate(checkpoint, self.names & frozenset(checkpoint.tensors), self._named(recipe), owned=True)

    def _named(self, recipe: str) -> str:
        """Returns mergekit's configuration with what others know the inputs by, not where they were for this merge."""
        names = {str(copy): str(path) for path, copy in self._adapters.items()}
        names |= self._hub_names
        if "_base" in vars(self) and self._base[1]:
            names[str(self._base[0])] = self.base.name or "path/to/the/base/model"
        for path, name in names.items():
            recipe = recipe.replace(path, name)
        return recipe

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


def _on_base(adapter: Adapter, adapter_source: Callable[[Adapter], Any]) -> AdapterOnBase:
    # Merged into a full model, an embedding would change the head that is tied to it too.
    adapter.refuse_special()
    return AdapterOnBase(adapter, adapter_source(adapter))


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
