"""Full checkpoints as candidates of a LoRA trainee: their update of the base, at the trainee's rank."""

import dataclasses
import logging

import torch
from torch import nn

from ..candidates.candidate import Candidate
from ..distributed import decided, is_main_process
from ..errors import AdapterError, CheckpointError
from ..factors import LoraFactors
from ..formats.adapter import Adapter, check_adapter, read_adapter, save_adapter
from ..formats.checkpoint import Checkpoint, read_checkpoint, read_tensor
from ..formats.vocabulary import Vocabulary
from ..full.weights import fit_checkpoint
from ..lowrank import truncate_dense
from ..model.layers import Trainee, layer_shape, layer_shapes, linear_layers
from ..model.parameters import read_parameters
from ..storage import Workspace


logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Extraction:
    """
    The low-rank part of a checkpoint's update.

    Args:
        factors (`Mapping[str, LoraFactors]`): Best approximation of the update by layer, scaling 1.0.
        kept_energy (`float`): Share of the squared Frobenius norm of the whole update, embeddings and all, that the
            factors keep.
    """

    factors: dict[str, LoraFactors]
    kept_energy: float


class Extractor:
    """
    Turns full checkpoints into adapters of the trainee's ranks.

    Args:
        model (`torch.nn.Module`):
            The model with the trainee on it.
        trainee (`Trainee`):
            The adapter that is trained.
        workspace (`Workspace`):
            Where the adapters go.
        min_kept_energy (`float`):
            Share of an update's squared Frobenius norm below which it is refused.
        vocabulary (`Mapping[str, int]`, *optional*):
            Tokens of the tokenizer that training uses.
    """

    def __init__(
        self,
        model: nn.Module,
        trainee: Trainee,
        workspace: Workspace,
        min_kept_energy: float,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.model, self.trainee, self.workspace = model, trainee, workspace
        self.min_kept_energy, self.vocabulary = min_kept_energy, vocabulary

    def __call__(self, candidate: Candidate) -> Adapter:
        """
        Returns the adapter that stands for a full checkpoint.

        Every process must call it with the same candidates in the same order.

        Args:
            candidate (`Candidate`):
                The checkpoint.

        Raises:
            AdapterError: It does not fit the model, or too little of its update is of low rank.
        """
        checkpoint = self.check(read_checkpoint(candidate))
        extraction = extract(self.model, checkpoint, self.trainee.ranks)
        kept, rank = extraction.kept_energy, max(self.trainee.ranks.values())
        if kept < self.min_kept_energy:
            raise CheckpointError(
                f"rank {rank} keeps {kept:.1%} of its update's squared norm, less than "
                f"min_kept_energy={self.min_kept_energy:.1%}: raise the rank, lower `min_kept_energy` to accept it, "
                "or train all weights"
            )
        return self._saved(candidate, extraction, f"rank {rank} keeps {kept:.1%} of its full update")

    def check(self, checkpoint: Checkpoint) -> Checkpoint:
        """
        Checks by its description alone that a checkpoint's update of the model can be extracted.

        Args:
            checkpoint (`Checkpoint`):
                The checkpoint.

        Raises:
            CheckpointError: The reason why not.
        """
        checkpoint = fit_checkpoint(self.model, checkpoint, self.vocabulary)
        if checkpoint.resized:
            raise CheckpointError(f"another vocabulary: {checkpoint.resized[0]} has another number of rows")
        return checkpoint

    def _saved(self, candidate: Candidate, extraction: Extraction, warning: str) -> Adapter:
        path = self.workspace.new("extracted")
        decided(lambda: save_adapter(path, extraction.factors, base_model=None))
        found = dataclasses.replace(candidate, kind="adapter", path=path)
        adapter = check_adapter(read_adapter(found), layer_shapes(self.model))
        return dataclasses.replace(adapter, warnings=(*adapter.warnings, warning))


@torch.no_grad()
def extract(model: nn.Module, checkpoint: Checkpoint, ranks: dict[str, int]) -> Extraction:
    """
    Approximates a checkpoint's update of the model's weights by factors (Eckart-Young), one tensor at a time.

    Args:
        model (`torch.nn.Module`):
            The model with the base's weights; its adapters are left out. Every process must call it.
        checkpoint (`Checkpoint`):
            From [`check_checkpoint`].
        ranks (`Mapping[str, int]`):
            Largest rank of each layer; what other weights changed is lost.

    Raises:
        AdapterError: No layer has an update.
    """
    factors, kept, total = {}, 0.0, 0.0
    for name in checkpoint.tensors:
        base = read_parameters(model, [name])[name]
        update = read_tensor(checkpoint, name).to(base.device, torch.float32) - base.float()
        energy = torch.linalg.vector_norm(update, dtype=torch.float64).item() ** 2
        total += energy
        layer = name.removesuffix(".weight")
        if layer in ranks and energy > 0 and is_main_process():
            truncated = truncate_dense(_as_linear(update, layer, model), ranks[layer], width=ranks[layer])
            factors[layer] = truncated.factors
            kept += truncated.kept_energy * energy
    factors, kept = decided(lambda: (factors, kept))
    if not factors:
        raise AdapterError("its update is zero in every layer that the trainee has: it is the base model itself")
    return Extraction(factors, min(1.0, kept / total))


def _as_linear(update: torch.Tensor, layer: str, model: nn.Module) -> torch.Tensor:
    """Returns the update as (out_features, in_features); Conv1D keeps it the other way round."""
    shape = layer_shape(linear_layers(model)[layer])
    return update if tuple(update.shape) == (shape[1], shape[0]) and not _is_conv1d(model, layer) else update.T


def _is_conv1d(model: nn.Module, layer: str) -> bool:
    return hasattr(linear_layers(model)[layer], "nf")
