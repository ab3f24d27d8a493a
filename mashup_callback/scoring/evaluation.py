"""The losses of the live model on rows, with a candidate applied, on one process or on all together."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from ..distributed import gather, process_index_and_count
from ..errors import BypassedError, OutOfStepError
from ..lora import note_bypassed, structure_kept
from ..model import is_sharded
from ..progress import advance
from ..trainee import Update
from .losses import RowLosses, head_chunks, language_model_losses
from .metrics import Metric, make_metric
from .sample import SampleRows


logger = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    rows: SampleRows,
    metric: str | Callable | Metric = "loss",
    update: Update | None = None,
    *,
    share: bool = False,
) -> RowLosses:
    """
    Returns the losses of a model on rows, with a candidate applied.

    To be called inside [`undisturbed`], and inside [`Metric.base`] unless the model's own adapters are meant.
    Batches are halved for good when memory runs out, except on a sharded model, whose processes go in step.
    With `share` the rows are split: every process calls this, looks at its share, and gets the losses of all rows.
    """
    metric = make_metric(metric)
    # A loss that the processes compute together gathers a number for each row.
    mine = rows.share(*process_index_and_count(), even=metric.collective) if share else rows
    with structure_kept(model):
        while True:
            sums, seen, bypassed = _sums(model, mine, metric, update, share)
            if share:
                bypassed = frozenset().union(*gather(bypassed))
            if not bypassed:
                break
            # Once more, with the updates of these layers applied in another way.
            note_bypassed(model, bypassed)
    for values, found in gather((sums, seen)) if share else ():
        sums[:, found] = values[:, found]
    return RowLosses(*sums)


def _sums(
    model: nn.Module, rows: SampleRows, metric: Metric, update: Update | None, share: bool
) -> tuple[torch.Tensor, torch.Tensor, frozenset[str]]:
    """Returns the sums of the losses on rows, which rows have some, and layers of the update that were bypassed."""
    sums, seen = torch.zeros(3, len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.bool)
    run = _in_step if share and is_sharded(model) else _alone
    try:
        with metric.applied(model, update):
            for indices, batch in rows.batches():
                losses = run(model, rows, indices, batch, metric)
                if losses is not None:
                    _add_batch(losses, indices, sums, seen)
                    advance(len(indices))
    except BypassedError as error:
        if not error.layers:
            raise
        return sums, seen, error.layers
    return sums, seen, frozenset()


def _alone(model: nn.Module, rows: SampleRows, indices: list[int], batch: Any, metric: Metric) -> RowLosses | None:
    """Returns the losses of a batch; None where memory ran out and its halves come next."""
    try:
        return metric.losses(model, _on_device(batch, model))
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        rank, count = process_index_and_count()
        if metric.collective and count > 1:
            raise OutOfStepError(
                f"Memory ran out on process {rank}, and the other processes cannot compute the trainer's loss alone. "
                "Set a smaller `batch_size`."
            ) from error
        if not rows.halve(indices):
            raise
    clear_device_cache(garbage_collection=True)
    logger.info("Out of memory with %d rows; the batch is halved.", len(indices))
    return None


def _in_step(model: nn.Module, rows: SampleRows, indices: list[int], batch: Any, metric: Metric) -> RowLosses:
    """Returns the losses of a batch, with every process in the same forward pass and as many calls of the head."""
    chunks = max(gather(head_chunks(model, batch)))
    # The wrapper of a sharded model is left out of some passes; the model within never is.
    inner, begun, ended = extract_model_from_parallel(model), [], []
    hooks = [
        inner.register_forward_pre_hook(lambda *args: begun.append(1)),
        inner.register_forward_hook(lambda *args: ended.append(1)),
    ]
    try:
        return metric.losses(model, _on_device(batch, model), chunks)
    except Exception as error:
        # Without a mapping there is nothing to give the model in place of the pass that the others are in.
        if len(begun) != len(ended) or not (begun or isinstance(batch, Mapping)):
            rank, _ = process_index_and_count()
            raise OutOfStepError(
                f"A forward pass of the sharded model failed on process {rank} ({type(error).__name__}: {error})"
                ", and the other processes cannot finish it alone. If memory ran out, set a smaller `batch_size`."
            ) from error
        if not begun:
            # So that the other processes can leave theirs.
            _dummy_pass(model, batch, metric, chunks)
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _add_batch(losses: RowLosses, indices: list[int], sums: torch.Tensor, seen: torch.Tensor) -> None:
    values = torch.stack([losses.loss, losses.correct, losses.tokens])
    seen[indices] = True
    if values.shape[1] == len(indices):
        sums[:, indices] = values
    else:
        # A batch that is not one row per row (padding-free) counts as a whole, in the place of its first row.
        sums[:, indices[0]] = values.sum(1)


def _dummy_pass(model: nn.Module, batch: Any, metric: Metric, chunks: int) -> None:
    batch = _on_device(batch, model)
    if metric.labeled and "labels" in batch:
        # With its calls of the head, which may be sharded on its own.
        language_model_losses(model, batch, chunks)
    else:
        model(**{name: value for name, value in batch.items() if name != "labels"})


def _on_device(batch: Any, model: nn.Module) -> Any:
    # A copy: a BatchEncoding is moved in place, and trainers take the labels out of their inputs.
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return send_to_device(batch, next(model.parameters()).device)
