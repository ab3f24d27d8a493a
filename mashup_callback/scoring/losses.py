"""The loss of a language model on a batch, row by row, without ever building the logits of the whole batch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn import functional as F

from ..distributed import gather
from ..errors import UsageError
from ..model import output_head, unwrapped


# Logits built at a time: 2²⁵ numbers are 128 MiB in float32.
CHUNK_ELEMENTS = 2**25
IGNORE = -100
# Configuration fields that multiply the head's output: Cohere, Muse, Falcon-H1.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Heads that are followed by an operation that `logit_postprocessing` does not know.
_UNKNOWN_HEADS: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, eq=False)
class RowLosses:
    """Sums over the label tokens of each row: nats, tokens that were the most likely ones, and all; in float64."""

    loss: torch.Tensor
    correct: torch.Tensor
    tokens: torch.Tensor

    @property
    def mean_loss(self) -> float:
        """Loss per label token, or per what a callable metric counts."""
        return self.mean(self.loss)

    @property
    def accuracy(self) -> float:
        """Share of the label tokens that were the most likely ones."""
        return self.mean(self.correct)

    def mean(self, values: torch.Tensor) -> float:
        """Returns the sum of values of the rows per label token; raises `ValueError` where there is none."""
        count = self.tokens.sum()
        if not count > 0:
            raise ValueError(
                f"The losses of {len(self.tokens)} rows count {count.item():g} in all, expected more than 0: no row "
                f"has a label other than {IGNORE} (is the text cut off, masked, or a response template not found?), "
                "or a callable metric returned such counts."
            )
        return (values.sum() / count).item()


def joined(parts: Sequence[RowLosses]) -> RowLosses:
    """Returns the losses on several parts of a sample as one."""
    return RowLosses(*(torch.cat([getattr(part, name) for part in parts]) for name in ("loss", "correct", "tokens")))


def sum_error(differences: torch.Tensor) -> float:
    """Returns the standard error of a sum of independent differences; NaN where there are fewer than two."""
    return differences.std().item() * math.sqrt(len(differences)) if len(differences) > 1 else math.nan


def paired_gain(losses: RowLosses, base: RowLosses) -> tuple[float, float]:
    """Returns by how much a mean loss is below that of the base on the same rows, and the standard error of that."""
    # Where a batch counts as a whole, it is one difference in the place of its first row.
    counted = (losses.tokens > 0) & (base.tokens > 0)
    groups = (counted.cumsum(0) - 1).clamp(min=0)
    differences = torch.zeros(max(1, int(counted.sum())), dtype=base.loss.dtype)
    differences.index_add_(0, groups, base.loss - losses.loss)
    return base.mean_loss - losses.mean_loss, sum_error(differences) / base.tokens.sum().item()


def language_model_losses(model: nn.Module, batch: Mapping[str, Any], chunks: int | None = None) -> RowLosses:
    """
    Returns the negative log-likelihood of the labels of a batch, summed over each row; to be called without gradients.

    Only the positions that have a label reach the language model head, in chunks (of a sharded model so many as
    `chunks` says), so the logits of the batch, (rows, length, vocabulary), never exist.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or labels.is_floating_point():
        found = sorted(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise UsageError(
            f"The batch holds {found} and no `labels` for each token, so it does not give a language model loss. "
            "Call `callback.bind(trainer)` to use the trainer's own loss (DPO, KTO, reward modelling, ...), or pass "
            "`score=` (GRPO) or a callable `metric`."
        )
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "num_items_in_batch")}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs.setdefault("decoder_input_ids", _decoder_inputs(model, labels))
    elif not _is_aligned(model):
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    with _LabelPositions(model, labels, chunks) as head:
        losses = head.finish(model(**inputs))
    return language_model_losses(model, batch, chunks) if losses is None else losses


def head_chunks(model: nn.Module, batch: Any) -> int:
    """Returns into how many parts the labels of a batch are split so that their logits fit."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return _chunks_of(int((labels != IGNORE).sum()) if isinstance(labels, torch.Tensor) else 0, output_head(model))


def _is_aligned(model: nn.Module) -> bool:
    """Whether a label is of the token in its own place, and not of the next one."""
    kind = getattr(model, "loss_type", None) or type(unwrapped(model)).__name__
    return "MaskedLM" in kind or "TokenClassification" in kind


def _decoder_inputs(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
    return F.pad(labels.masked_fill(labels == IGNORE, padding)[:, :-1], (1, 0), value=start)


class _LabelPositions:
    """
    Context in which the language model head sees the label positions only.

    A pre-hook gives the model's own code these positions only. Where their logits would be too many, it runs the head
    on them itself, chunk by chunk, and lets a single position through to the model's own code. What that code does to
    the head's output is read from the configuration and checked at that position. Where the check fails, the head is
    remembered as unknown and the model's own logits are used from then on.
    """

    def __init__(self, model: nn.Module, labels: torch.Tensor, chunks: int | None) -> None:
        self.head, self.chunks = output_head(model), chunks
        self.postprocess = logit_postprocessing(model.config)
        self.mask = labels != IGNORE
        self.targets = labels[self.mask]
        self.inside = False
        self.reduced = False
        self.sums: tuple[torch.Tensor, torch.Tensor] | None = None
        self.probe: torch.Tensor | None = None

    def __enter__(self) -> "_LabelPositions":
        self.handle = self.head.register_forward_pre_hook(self._before_head) if self.head is not None else None
        return self

    def __exit__(self, *error: object) -> None:
        if self.handle is not None:
            self.handle.remove()

    def _before_head(self, head: nn.Module, args: tuple) -> tuple | None:
        if self.inside or not args or args[0].shape[:2] != self.mask.shape:
            return None
        hidden = args[0][self.mask.to(args[0].device)]
        chunks = self.chunks or _chunks_of(len(hidden), head)
        if head in _UNKNOWN_HEADS or chunks == 1:
            self.reduced = True
            # A batch without labels still needs a position for the model's own code.
            return (hidden[None] if len(hidden) else args[0][:1, :1], *args[1:])
        self.inside = True
        try:
            self.sums, self.probe = self._in_chunks(hidden, chunks), head(args[0][:1, :1])
        finally:
            self.inside = False
        return (args[0][:1, :1], *args[1:])

    def _in_chunks(self, hidden: torch.Tensor, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = zip(hidden.tensor_split(chunks), self.targets.tensor_split(chunks), strict=True)
        losses = [_token_losses(self.postprocess(self.head(part)), targets) for part, targets in pairs]
        return tuple(torch.cat(values) for values in zip(*losses, strict=True))

    def finish(self, outputs: Any) -> RowLosses | None:
        logits = getattr(outputs, "logits", None)
        if logits is None:
            raise ValueError(f"The model returned {type(outputs).__name__} without `logits`. Pass a callable metric.")
        if self.sums is None:
            at_labels = logits.flatten(0, 1) if self.reduced else logits[self.mask.to(logits.device)]
            self.sums = _token_losses(at_labels[: len(self.targets)], self.targets)
        else:
            agrees = _agree(self.postprocess(self.probe), logits)
            # The model is run again where they disagree, and a sharded one by all processes or none.
            if not (agrees if self.chunks is None else all(gather(agrees))):
                _UNKNOWN_HEADS.add(self.head)
                return None
        loss, correct = self.sums
        rows = self.mask.nonzero()[:, 0].cpu()
        # In this order: Apple's GPUs have no float64.
        values = torch.stack([loss, correct, torch.ones_like(loss)]).cpu().double()
        return RowLosses(*torch.zeros(3, len(self.mask), dtype=torch.float64).index_add_(1, rows, values))


def logit_postprocessing(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what a model does to its head's output, in place: scaling, then soft-capping."""
    config = config.get_text_config()
    scale = next((value for name in _SCALES if (value := getattr(config, name, None)) is not None), 1.0)
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    cap = getattr(config, "final_logit_softcapping", None)

    def apply(logits: torch.Tensor) -> torch.Tensor:
        logits = logits if scale == 1 else logits.mul_(scale)
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    return apply


def _chunks_of(positions: int, head: nn.Module | None) -> int:
    # Sharded heads (ZeRO-3) hide their shape; any vocabulary is at least assumed to be a large one.
    size = max(1, CHUNK_ELEMENTS // max(getattr(head, "out_features", 0), 2**12))
    return max(1, math.ceil(positions / size))


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of each position and whether it is predicted; `logits` is used up."""
    targets, logits = targets.to(logits.device), logits.float()
    largest, predicted = logits.max(-1)
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    # In place: with a large vocabulary, each copy of the logits takes as long as a layer.
    sums = logits.sub_(largest[:, None]).exp_().sum(-1)
    return sums.log() + (largest - chosen), (predicted == targets).float()


def _agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    ours, theirs = ours.float().flatten(), theirs.float().flatten()
    # bfloat16 keeps 8 bits: two ways through the same operation may differ by a few parts in 2⁸.
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2, equal_nan=True)
