"""What is trained, as the stages see it: the protocols of a trainee, of what a candidate is and of what it changes."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.state import AcceleratorState
from torch import nn

from .candidates import Candidate, read_source
from .config import MashupConfig
from .formats import BaseModel
from .full import CheckpointSource, FullTrainee, find_trained_weights
from .lora import AdapterSource, LoraTrainee, find_adapter
from .model import BaseWeights
from .report import MergeInfo
from .storage import Workspace


class Update(Protocol):
    """What a candidate or a merge changes in a model."""

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which `model` computes with the update; afterwards every bit is as it was."""

    def warnings(self, model: nn.Module) -> tuple[str, ...]:
        """Returns what of it is lost when it is applied to `model`, known once it has been."""


class Source(Protocol):
    """A candidate on disk that fits the model."""

    @property
    def rank(self) -> int | None:
        """Largest rank over the layers; None for a full checkpoint."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is worth knowing but no reason to reject it."""

    def load(self, device: torch.device | str = "cpu") -> Update:
        """Returns what it changes; raises `AdapterError` where its files changed or hold unusable values."""

    def fingerprint(self) -> str | None:
        """Returns a hash of what it computes, by which its scores are cached; None where they are not."""

    def release(self) -> None:
        """Forgets what was read and kept in memory; it is read again when it is needed."""


class Trainee(Protocol):
    """
    What is trained: a LoRA adapter, or the model's own weights.

    Every process of a distributed run calls each method at the same point.
    """

    @property
    def relations(self) -> tuple[str, ...]:
        """Relations to the base model that a Hub search lists, `"adapter"` and `"finetune"`."""

    def check(self, description: Any) -> Any:
        """Returns a candidate's description as it fits the model, by its headers alone; raises `AdapterError`."""

    def admit(self, candidate: Candidate) -> Source:
        """Returns a candidate on disk as something that can be scored and merged; raises `AdapterError`."""

    def merge(
        self, sources: Sequence[Any], weights: Sequence[float], method: str, parameters: Mapping[str, Any]
    ) -> tuple[Update, MergeInfo]:
        """Merges candidates in the form that the trainee can hold."""

    def written(self, update: Any) -> AbstractContextManager[None]:
        """Returns a context in which the trainee holds an update, and after which it holds what it held before."""

    def write(self, update: Any) -> None:
        """Fills the trainee's parameters, reads them back, and puts back what they held where that fails."""

    def undo(self) -> None:
        """Gives the trainee what it held before [`Trainee.write`]."""

    def keep(self, update: Any) -> Update:
        """Returns an update whose files are its own: those of a candidate are copied."""

    def discard(self, update: Any) -> None:
        """Forgets an update that was not chosen, with the files that were made for it."""

    def save(self, update: Any, directory: Path, base_model: str | None) -> None:
        """Writes an update as an adapter or a model; never takes a candidate's files."""

    def close(self) -> None:
        """Removes the temporary files of the run."""


def find_trainee(
    model: nn.Module, config: MashupConfig | None = None, directory: str | os.PathLike[str] = "mashup"
) -> Trainee:
    """
    Finds what is trained, a LoRA adapter or the model's own weights, and checks that a merge can be written into it;
    temporary files go beside the `directory` of the mashup.

    Raises:
        ValueError: The model trains nothing, or adapters without LoRA layers, or several adapters, its initialization
            alters the base or freezes a factor, it is a variant such as DoRA, or it is already trained; or the model
            or its sequences are split by tensor, context or sequence parallelism.
    """
    _refuse_parallel(model)
    config, workspace = config or MashupConfig(seed=42), Workspace(Path(directory))
    adapter = find_adapter(model, config.overwrite)
    if adapter is not None:
        return LoraTrainee(model, adapter, config, workspace)
    names = find_trained_weights(model)
    if not names:
        raise ValueError(
            "The model trains no LoRA layers, and none of its own weights. A mashup is written into what is trained: "
            "give the Trainer a `peft_config=LoraConfig(...)`, wrap the model with `peft.get_peft_model`, call "
            "`model.add_adapter`, or leave the weights trainable for full fine-tuning. An adapter that is loaded "
            "without `is_trainable=True`, or added before `prepare_model_for_kbit_training`, is frozen."
        )
    weights = BaseWeights(model)
    return FullTrainee(model, names, config, workspace, lambda found: AdapterSource(found, weights))


def _refuse_parallel(model: nn.Module) -> None:
    parallel = AcceleratorState._shared_state.get("parallelism_config")
    kinds = {
        "The model is split by tensor": getattr(model, "tp_size", None),
        "Sequences are split by context": getattr(parallel, "cp_size", None),
        "Sequences are split by Ulysses sequence": getattr(parallel, "sp_size", None),
    }
    if found := [kind for kind, size in kinds.items() if (size or 1) > 1]:
        raise ValueError(
            f"{found[0]} parallelism: all processes compute each batch together, so that candidates and rows cannot "
            "be dealt out to them. Use FSDP2 or ZeRO-3, or train without the mashup."
        )


def admit_to(model: nn.Module, base_model: str | None = None) -> Callable[[Candidate], Source]:
    """Returns what makes of a candidate on disk something to score on any model, trained or not."""
    base, weights = BaseModel.of(model, base_model), BaseWeights(model)
    sources: dict[str, Callable[[Any], Source]] = {
        "adapter": lambda found: AdapterSource(found, weights),
        "model": CheckpointSource,
    }
    return lambda candidate: sources[candidate.kind](read_source(candidate, lambda found: found.fit(base)))
