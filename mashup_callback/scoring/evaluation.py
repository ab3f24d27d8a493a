"""The losses of the live model on rows, with a low-rank update applied by hooks, on one process or on all together."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from ..distributed import exchange, place
from ..errors import OutOfStepError
from ..factors import Factors
from ..full.weights import FullUpdate, applied_to
from ..model.isolation import without_adapters
from ..model.parameters import is_sharded
from .losses import RowLosses, head_chunks, language_model_losses
from .metrics import TrainerLoss
from .sample import Rows


logger = logging.getLogger(__name__)

Metric = str | Callable[[nn.Module, Mapping[str, Any]], tuple[float, float]]


def evaluate(
    model: nn.Module,
    rows: Rows,
    metric: Metric = "loss",
    factors: Factors | FullUpdate | None = None,
    *,
    share: bool = False,
) -> RowLosses:
    """
    Returns the losses of a model on rows, with low-rank updates applied by hooks or other weights in its place.

    To be called inside [`undisturbed`], and inside [`bare`] unless the model's own adapters are meant.
    Batches are halved for good when memory runs out, except on a sharded model, whose processes go in step.

    Args:
        model (`torch.nn.Module`):
            The model.
        rows (`Rows`):
            What to evaluate on.
        metric (`str` or `Callable`, *optional*, defaults to `"loss"`):
            As in [`score_candidates`].
        factors (`Mapping[str, LoraFactors]` or `FullUpdate`, *optional*):
            Updates by the name of the layer in the base model, or a full checkpoint's weights.
        share (`bool`, *optional*, defaults to `False`):
            Deal the rows out: every process calls this, looks at its share, and gets the losses of all rows.

    Raises:
        OutOfStepError: A process failed in the middle of a forward pass of a sharded model.
    """
    mine = rows.share(*place()) if share else rows
    in_step = share and is_sharded(model)
    with _applied(model, metric, factors):
        losses, seen = _in_step(model, mine, metric) if in_step else _one_by_one(model, mine, metric)
    return RowLosses(*_together(losses, seen) if share else losses)


def bare(model: nn.Module, metric: Metric) -> AbstractContextManager[None]:
    """Returns the context in which candidates are applied: the base model's, or the trainee's for a trainer's loss."""
    return nullcontext() if isinstance(metric, TrainerLoss) else without_adapters(model)


def _applied(model: nn.Module, metric: Metric, update: Factors | FullUpdate | None) -> AbstractContextManager[None]:
    return metric.applied(model, update) if isinstance(metric, TrainerLoss) else applied_to(model, update or {})


def _one_by_one(model: nn.Module, rows: Rows, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    sums, seen = empty_sums(rows)
    for indices, batch in rows.batches():
        try:
            losses = _batch_losses(model, batch, metric)
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or not rows.halve(indices):
                raise
            clear_device_cache(garbage_collection=True)
            logger.info("Out of memory with %d rows; the batch is halved.", len(indices))
            continue
        enter(losses, indices, sums, seen)
    return sums, seen


def _in_step(model: nn.Module, rows: Rows, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with every process in the same forward pass at the same time, and with as many calls of the head."""
    sums, seen = empty_sums(rows)
    for indices, batch in rows.batches():
        chunks = max(exchange(head_chunks(model, batch)))
        with _Passes(model) as passes:
            try:
                losses = _batch_losses(model, batch, metric, chunks)
            except Exception as error:
                passes.make_up(lambda batch=batch, chunks=chunks: _dummy_pass(model, batch, metric, chunks), error)
                raise
        enter(losses, indices, sums, seen)
    return sums, seen


def empty_sums(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns zeros for the sums of each row, as [`RowLosses`] has them, and which rows were seen: none."""
    return torch.zeros(3, len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.bool)


def enter(losses: RowLosses, indices: list[int], sums: torch.Tensor, seen: torch.Tensor) -> None:
    """Writes the losses of one batch to the places of its rows."""
    values = torch.stack([losses.loss, losses.correct, losses.tokens])
    seen[indices] = True
    if values.shape[1] == len(indices):
        sums[:, indices] = values
    else:
        # A batch that is not one row per row (padding-free) counts as a whole, in the place of its first row.
        sums[:, indices[0]] = values.sum(1)


def _together(sums: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(sums)
    for values, rows in exchange((sums, seen)):
        total[:, rows] = values[:, rows]
    return total


class _Passes:
    """Counts the forward passes of a model, so that a process that failed before one can still join the others."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.begun = self.ended = 0

    def __enter__(self) -> "_Passes":
        # The wrapper of a sharded model is left out of some passes; the model within never is.
        inner = extract_model_from_parallel(self.model)
        self.handles = [inner.register_forward_pre_hook(self._begin), inner.register_forward_hook(self._end)]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _begin(self, *args: object) -> None:
        self.begun += 1

    def _end(self, *args: object) -> None:
        self.ended += 1

    def make_up(self, dummy: Callable[[], None], error: Exception) -> None:
        """Runs the forward pass that the others wait in, if it was not run."""
        if self.begun != self.ended:
            raise OutOfStepError(
                f"A forward pass of the sharded model failed on process {place()[0]} ({type(error).__name__}: {error})"
                ", and the other processes cannot finish it alone. If memory ran out, set a smaller `batch_size`."
            ) from error
        if not self.begun:
            dummy()


def _dummy_pass(model: nn.Module, batch: Mapping[str, Any], metric: Metric, chunks: int) -> None:
    batch = on_device(batch, model)
    if callable(metric) or "labels" not in batch:
        model(**{name: value for name, value in batch.items() if name != "labels"})
    else:
        # With its calls of the head, which may be sharded on its own.
        language_model_losses(model, batch, chunks)


def on_device(batch: Any, model: nn.Module) -> Any:
    """Returns a copy of a batch on the model's device."""
    # A copy: a BatchEncoding is moved in place, and trainers take the labels out of their inputs.
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return send_to_device(batch, next(model.parameters()).device)


def _batch_losses(model: nn.Module, batch: Mapping[str, Any], metric: Metric, chunks: int | None = None) -> RowLosses:
    batch = on_device(batch, model)
    if not callable(metric):
        return language_model_losses(model, batch, chunks)
    loss, count = (torch.tensor([float(value)], dtype=torch.float64) for value in metric(model, batch))
    return RowLosses(loss, torch.zeros_like(loss), count)
