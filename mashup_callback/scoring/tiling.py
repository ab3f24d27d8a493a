"""Several candidates in one forward pass, where the rows of a batch alone would leave the device idle."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from ..formats.adapter import Adapter
from ..lora.hooks import StackedFactors, Tile, applied_together
from ..model.layers import linear_layers
from .evaluation import empty_sums, enter, on_device
from .losses import RowLosses, language_model_losses, output_head
from .sample import Rows


if TYPE_CHECKING:
    from .halving import Score

logger = logging.getLogger(__name__)

# Tokens of a forward pass up to which candidates share it. Measured on a CPU: more make it slower again, since their
# activations are beyond what the allocator reuses. An accelerator needs more to be busy. Either is what a forward pass
# without gradients needs little memory for.
CPU_TOKENS, TOKENS = 1024, 8192
# Candidates that share a pass: no more, since the time limit is looked at between passes over all rows.
CANDIDATES = 16
# Bytes of their stacked factors, or this share of the model if that is more; and how much of it may be padding.
FACTOR_BYTES, MODEL_SHARE, PADDING = 2**28, 16, 0.5


class Tiling:
    """
    Decides which candidates share a forward pass, and how many.

    Only adapters do, and only where each field of a batch is a tensor with an entry for each row: what is packed into
    one row, or has images of its own, is scored one candidate at a time.

    Args:
        model (`torch.nn.Module`):
            The model that they are scored on.
        enabled (`bool`):
            Whether the metric and the launch mode allow it at all.
    """

    def __init__(self, model: nn.Module, enabled: bool) -> None:
        device = next(model.parameters()).device
        self.tokens = (CPU_TOKENS if device.type == "cpu" else TOKENS) if enabled else 0
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self.bytes = max(FACTOR_BYTES, size // MODEL_SHARE)
        # The head is given the label positions only, which are not the same number for every row.
        head = output_head(model)
        heads = (head, head.get_base_layer() if hasattr(head, "get_base_layer") else head)
        self.heads = {name for name, layer in linear_layers(model).items() if layer in heads}

    def width(self, batch: Mapping[str, Any]) -> int:
        """Returns how many candidates may share the forward pass of a batch."""
        shape = _shape(batch)
        return 1 if shape is None else max(1, self.tokens // (shape[0] * shape[1]))

    def groups(self, scores: Iterable["Score"], rows: Rows) -> Iterator[list["Score"]]:
        """
        Yields candidates in their order, together those that share forward passes; others are among them.

        Args:
            scores (`Iterable[Score]`):
                The candidates, of which those that are not `"scored"` any more need no forward pass.
            rows (`Rows`):
                What they are scored on.
        """
        limit = max((self.width(batch) for _, batch in rows.batches()), default=1) if self.tokens else 1
        group: list[Score] = []
        for score in scores:
            adapters = [member.adapter for member in group if member.status == "scored"]
            if score.status == "scored" and adapters and not self._fit([*adapters, score.adapter], limit):
                yield group
                group = []
            group.append(score)
        if group:
            yield group

    def _fit(self, adapters: Sequence[Any], limit: int) -> bool:
        if len(adapters) > min(limit, CANDIDATES) or not all(isinstance(adapter, Adapter) for adapter in adapters):
            return False
        if any(self.heads & adapter.modules.keys() for adapter in adapters):
            return False
        sizes = [
            {
                name: 4 * shape.rank * (shape.in_features + shape.out_features)
                for name, shape in adapter.modules.items()
            }
            for adapter in adapters
        ]
        names = {name for size in sizes for name in size}
        stacked = len(adapters) * sum(max(size.get(name, 0) for size in sizes) for name in names)
        return stacked <= self.bytes and (1 - PADDING) * stacked <= sum(sum(size.values()) for size in sizes)

    def narrow(self, batch: Mapping[str, Any], width: int) -> bool:
        """Halves the tokens of a forward pass for good; returns whether fewer candidates can share it."""
        if (shape := _shape(batch)) is not None:
            self.tokens = min(self.tokens, width * shape[0] * shape[1] // 2)
            logger.info("Out of memory with %d candidates; at most %d tokens share a pass.", width, self.tokens)
        return width > 1

    def stop(self) -> None:
        """Scores one candidate at a time from now on."""
        self.tokens = 0


def evaluate_together(
    model: nn.Module, rows: Rows, stacked: Sequence[StackedFactors], tiling: Tiling
) -> list[RowLosses]:
    """
    Returns the losses of several candidates on rows, as [`evaluate`] returns those of one.

    Each batch is repeated for each candidate that shares its forward pass. When memory runs out, fewer share it, and
    where it is a single one, the batch is halved.

    Args:
        model (`torch.nn.Module`):
            The model.
        rows (`Rows`):
            What to evaluate on.
        stacked (`Sequence[StackedFactors]`):
            The candidates' updates.
        tiling (`Tiling`):
            Says how many share a forward pass.

    Raises:
        NotTiledError: The model does not keep the rows of a batch apart and in order.
    """
    sums, seen = zip(*(empty_sums(rows) for _ in range(len(stacked[0].A))), strict=True)
    with applied_together(model, stacked) as tile:
        for indices, batch in rows.batches():
            batch, tile.stop = on_device(batch, model), 0
            while tile.stop < len(sums):
                losses = _next_losses(model, batch, tile, len(sums), tiling, partial(rows.halve, indices))
                if losses is None:
                    # The halves of the batch come next, for all candidates.
                    break
                for place, part in enumerate(losses, tile.start):
                    enter(part, indices, sums[place], seen[place])
    return [RowLosses(*values) for values in sums]


def _next_losses(
    model: nn.Module, batch: Mapping[str, Any], tile: Tile, count: int, tiling: Tiling, halve: Callable[[], bool]
) -> list[RowLosses] | None:
    """Returns the losses of the next candidates, of as many as memory allows; None if the batch had to be halved."""
    start = tile.stop
    while True:
        tile.start, tile.stop = start, min(count, start + tiling.width(batch))
        try:
            return _tile_losses(model, batch, tile)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            clear_device_cache(garbage_collection=True)
            if not tiling.narrow(batch, tile.stop - start):
                if not halve():
                    raise
                return None


def _tile_losses(model: nn.Module, batch: Mapping[str, Any], tile: Tile) -> list[RowLosses]:
    count, shape = tile.stop - tile.start, _shape(batch)
    if count == 1:
        tile.rows = tile.tokens = None
        return [language_model_losses(model, batch)]
    rows, length = shape
    tile.rows, tile.tokens = count * rows, count * rows * length
    repeated = {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in batch.items()}
    losses = language_model_losses(model, repeated)
    parts = (values.split(rows) for values in (losses.loss, losses.correct, losses.tokens))
    return [RowLosses(*part) for part in zip(*parts, strict=True)]


def _shape(batch: Any) -> tuple[int, int] | None:
    """Returns rows and length of a batch that can be repeated row by row; None for others."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or not labels.numel():
        return None
    if not all(
        isinstance(value, torch.Tensor) and value.ndim and len(value) == len(labels) for value in batch.values()
    ):
        return None
    positions = batch.get("position_ids")
    # One row with positions is a packed one: flash attention looks for the starts of sequences in a single row only.
    # Positions of three axes (Qwen-VL) have their rows second.
    if positions is not None and (len(labels) == 1 or positions.ndim != 2):
        return None
    return tuple(labels.shape)
