"""Full fine-tuning: the trainee without adapters, and what its weights could be replaced with."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from .adapters import Adapter, load_factors, save_adapter
from .candidates.candidate import Candidate
from .checkpoints import Checkpoint, check_checkpoint, read_checkpoint, read_tensor
from .config import MashupConfig
from .distributed import decided
from .extraction import Extractor
from .layers import Trainee, base_model_name
from .model_tensors import FullTrainee
from .model_writer import is_model_on_disk, save_model
from .parameters import read_parameters
from .selection import Selection
from .vocabulary import Vocabulary
from .weights import Replacement, admit_checkpoint, fit_checkpoint
from .workspace import Workspace


if TYPE_CHECKING:
    from .full_merge import MergedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FittedModel:
    """
    A merge of full models in the form that the trainee has.

    Args:
        replacement (`Replacement`): The weights that it trains.
        lost_energy (`float`): Share of the merge's squared distance from the model in weights that are frozen.
        lost_layers (`tuple[str, ...]`): These weights.
    """

    replacement: Replacement
    lost_energy: float = 0.0
    lost_layers: tuple[str, ...] = ()


class ModelMerger:
    """
    Merges full checkpoints and adapters for a model of which all weights are trained.

    Args:
        model (`torch.nn.Module`):
            The model.
        trainee (`FullTrainee`):
            Its weights.
        workspace (`Workspace`):
            Where merges go.
        config (`MashupConfig`):
            The settings.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer of the training data.
    """

    def __init__(
        self,
        model: nn.Module,
        trainee: FullTrainee,
        workspace: Workspace,
        config: MashupConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model, self.trainee, self.workspace, self.config = model, trainee, workspace, config
        self.tokenizer = tokenizer
        self._base: Path | None = None
        self._base_is_own = False
        self._adapters: dict[tuple[str, str | None], Path] = {}

    def merge(self, selection: Selection, method: str, parameters: Mapping[str, Any]) -> "tuple[MergedModel, Any]":
        """
        Merges the selected candidates on disk; a single checkpoint is taken as it is.

        Args:
            selection (`Selection`):
                What to merge.
            method (`str`):
                A method registered in mergekit.
            parameters (`Mapping[str, Any]`):
                Its parameters.

        Returns:
            `tuple[MergedModel, FittedModel]`: The merge, and what the trainee can hold of it.
        """
        # Imported here so that importing the callback does not import mergekit.
        from .full_merge import MergedModel

        sources = [score.adapter for score in selection.scores]
        if len(sources) == 1 and isinstance(sources[0], Checkpoint):
            merged = MergedModel(sources[0].path, "", "linear", {}, (1.0,), owned=False)
            return merged, self._fit(sources[0])
        if len(sources) == 1:
            method, parameters = "linear", {}
        merged = self._merge(sources, selection.weights, method, parameters)
        return merged, self.fitted(merged.path)

    def fitted(self, path: Path) -> FittedModel:
        """Returns what the trainee can hold of a merge on disk."""
        vocabulary = vocabulary_of(self.tokenizer)
        return self._fit(check_checkpoint(read_checkpoint(path), self.trainee.tensors, vocabulary))

    def kept(self, merged: "MergedModel") -> "MergedModel":
        """Returns a merge with files of its own: a candidate that is used as it is is copied."""
        from .full_merge import check_space

        if merged.owned:
            return merged
        path = self.workspace.new("copy")
        decided(partial(check_space, self.workspace.path(), self.trainee.tensors.bytes))
        return decided(lambda: merged.copied(path))

    def discard(self, merged: "MergedModel") -> None:
        """Removes a merge that is not used from the disk; a candidate's own files stay."""
        if merged.owned:
            decided(lambda: shutil.rmtree(merged.path, ignore_errors=True))

    def _merge(
        self, sources: Sequence[Adapter | Checkpoint], weights: Sequence[float], method: str, parameters: Mapping
    ) -> "MergedModel":
        from .contracts import MergeRule
        from .full_merge import ModelInput, check_space, merge_models

        tensors = self.trainee.tensors
        resized = any(isinstance(source, Checkpoint) and source.resized for source in sources)
        adapters = [source for source in sources if isinstance(source, Adapter)]
        needs_base = bool(adapters) or resized or MergeRule.create(method).spec.contract.base.name == "REQUIRED"
        output = self.workspace.new("merge")
        decided(partial(check_space, self.workspace.path(), tensors.bytes * (1 + len(adapters))))
        base = self._base_directory(resized) if needs_base else None
        inputs = [
            ModelInput(source.path) if isinstance(source, Checkpoint) else ModelInput(base, self._adapter(source))
            for source in sources
        ]
        merged = decided(
            lambda: merge_models(
                inputs,
                output,
                weights=weights,
                method=method,
                parameters=parameters,
                base=base,
                tokenizer=base if resized else None,
                out_dtype=str(tensors.dtype).removeprefix("torch."),
                seed=self.config.seed,
            )
        )
        return replace(merged, recipe=self._named(merged.recipe, sources))

    def _named(self, recipe: str, sources: Sequence[Adapter | Checkpoint]) -> str:
        """Returns mergekit's configuration with what others know the inputs by, not where they were for this merge."""
        hub = [source.candidate for source in sources if source.candidate.repo_id]
        names = {str(path): name for (name, _), path in self._adapters.items()}
        names |= {str(item.path): f"{item.repo_id}@{item.revision}" for item in hub if not item.subfolder}
        if self._base_is_own:
            names[str(self._base)] = self.config.base_model or base_model_name(self.model) or "path/to/the/base/model"
        for path, name in names.items():
            recipe = recipe.replace(path, name or path)
        return recipe

    def _base_directory(self, with_tokenizer: bool) -> Path:
        """Returns where the model is on disk as it is in memory now; it is written there if need be."""
        from .full_merge import check_space

        if self._base is None or (with_tokenizer and not self._base_is_own):
            found = decided(lambda: _directory_of(base_model_name(self.model)))
            self._base_is_own = with_tokenizer or found is None or not is_model_on_disk(self.model, found)
            self._base = found
            if self._base_is_own:
                decided(partial(check_space, self.workspace.path(), self.trainee.tensors.bytes))
                self._base = save_model(self.model, self.workspace.new("base"))
                decided(lambda: self.tokenizer and self.tokenizer.save_pretrained(self._base))
        return self._base

    def _adapter(self, adapter: Adapter) -> Path:
        # mergekit has peft load it: what peft gets is written by us from checked tensors, not by a stranger.
        key = adapter.candidate.key
        if key not in self._adapters:
            path = self.workspace.new("adapter")
            decided(lambda: save_adapter(path, load_factors(adapter), base_model=None))
            self._adapters[key] = path
        return self._adapters[key]

    def _fit(self, checkpoint: Checkpoint) -> FittedModel:
        names = self.trainee.names & frozenset(checkpoint.tensors)
        frozen = tuple(name for name in checkpoint.tensors if name not in names)
        lost = self._distance(checkpoint, frozen)
        total = lost + (self._distance(checkpoint, sorted(names)) if lost else 0.0)
        return FittedModel(Replacement(checkpoint, names), lost / total if total else 0.0, frozen if lost else ())

    def _distance(self, checkpoint: Checkpoint, names: Sequence[str]) -> float:
        """Squared distance of a checkpoint's tensors from the model's, in float64."""
        total = 0.0
        for name in names:
            value = read_parameters(self.model, [name])[name].cpu()
            found = read_tensor(checkpoint, name)
            rows = min(len(value), len(found)) if value.ndim else None
            total += (found[:rows].double() - value[:rows].double()).square().sum().item()
        return total


@dataclass(frozen=True, eq=False)
class ModelHandling:
    """
    What full checkpoints need.

    Args:
        merger (`ModelMerger`, *optional*): What merges them, where all weights are trained.
        admit (`Callable[[Candidate], Adapter | Checkpoint]`): Makes of one on disk what is scored: the weights as they
            are, or a low-rank update.
        check (`Callable[[Checkpoint], Checkpoint]`): Checks by its description alone that one fits; raises an
            `AdapterError` otherwise.
    """

    merger: ModelMerger | None
    admit: Callable[[Candidate], Adapter | Checkpoint]
    check: Callable[[Checkpoint], Checkpoint]


def handle_models(
    model: nn.Module,
    trainee: Trainee | FullTrainee,
    workspace: Workspace,
    config: MashupConfig,
    tokenizer: Any = None,
) -> ModelHandling:
    """
    Returns what full checkpoints need.

    Args:
        model (`torch.nn.Module`):
            The model that is trained.
        trainee (`Trainee` or `FullTrainee`):
            What is trained in it.
        workspace (`Workspace`):
            Where merges and extracted adapters go.
        config (`MashupConfig`):
            The settings.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The Trainer's processing class.
    """
    vocabulary = vocabulary_of(tokenizer)
    if isinstance(trainee, FullTrainee):
        merger = ModelMerger(model, trainee, workspace, config, tokenizer if vocabulary is not None else None)
        return ModelHandling(
            merger,
            admit=lambda candidate: admit_checkpoint(model, candidate, vocabulary),
            check=lambda checkpoint: fit_checkpoint(model, checkpoint, vocabulary),
        )
    extractor = Extractor(model, trainee, workspace, config.min_kept_energy, vocabulary)
    return ModelHandling(None, extractor, extractor.check)


def vocabulary_of(tokenizer: Any) -> Vocabulary | None:
    """Returns the tokens of a Trainer's processing class, None where it has none (image processors)."""
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None


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
