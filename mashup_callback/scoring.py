"""How good each candidate is on the target's data, measured on the Trainer's own model without touching it."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .adapters import Adapter, AdapterError, check_adapter, load_factors, read_adapter
from .candidates import Candidate
from .distributed import deal, is_main_process
from .factors import Factors, LoraFactors
from .isolation import undisturbed, without_adapters
from .layers import layer_shape, linear_layers
from .losses import RowLosses, language_model_losses
from .racing import joined, ranking_value, rung_sizes, survivors
from .sampling import Rows, as_rows


logger = logging.getLogger(__name__)

Metric = str | Callable[[nn.Module, Mapping[str, Any]], tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Score:
    """
    What scoring found out about one candidate.

    Args:
        candidate (`Candidate`): The candidate.
        status (`str`): `"scored"`, `"eliminated"` in an early rung, `"rejected"` as unfit or `"failed"` while scored.
        reason (`str`, *optional*): Why it was not scored to the end.
        losses (`RowLosses`, *optional*): Its losses on the rows it was scored on.
        seconds (`float`): Time spent on it.
        adapter (`Adapter`, *optional*): Its adapter, with module names as in the model.
        metric (`str` or `Callable`): What it is ranked by.
    """

    candidate: Candidate
    status: str = "scored"
    reason: str | None = None
    losses: RowLosses | None = None
    seconds: float = 0.0
    adapter: Adapter | None = None
    metric: Metric = "loss"

    @property
    def loss(self) -> float | None:
        """Loss per label token in nats, or what a callable metric returned; None if never scored."""
        return None if self.losses is None else self.losses.mean_loss

    @property
    def value(self) -> float:
        """What candidates are ranked by; lower is better, and infinite if never scored."""
        return math.inf if self.losses is None else ranking_value(self.losses, self.metric)

    @property
    def rows(self) -> int:
        """Rows it was scored on."""
        return 0 if self.losses is None else len(self.losses.loss)

    @property
    def tokens(self) -> int:
        """Label tokens it was scored on."""
        return 0 if self.losses is None else int(self.losses.tokens.sum())


def score_candidates(
    model: nn.Module,
    candidates: Sequence[Candidate | Adapter | str | Path],
    batches: Rows | Sequence[Mapping[str, Any]],
    metric: Metric = "loss",
    *,
    search: str = "exhaustive",
    keep: int = 1,
    base_model: str | None = None,
    max_seconds: float | None = None,
) -> list[Score]:
    """
    Scores candidate adapters on batches of the target's data.

    The model computes what its base does, with its own adapters switched off, and a candidate is applied by forward
    hooks on the layers it targets: y + s·(x Aᵀ) Bᵀ. No module is added, no random number is drawn, and afterwards the
    model is exactly as it was. At any time the tensors of one candidate are in memory.

    Args:
        model (`torch.nn.Module`):
            The model that is trained, or a bare model.
        candidates (`Sequence` of `Candidate`, `Adapter` or paths):
            What to score.
        batches (`Rows` or `Sequence` of mappings):
            Batches as the model takes them, with labels.
        metric (`str` or `Callable`, *optional*, defaults to `"loss"`):
            `"loss"`: negative log-likelihood in nats per label token; `"token_accuracy"`: share of the label tokens
            predicted; or a callable that is given the model with the candidate applied and a batch, and returns a loss
            summed over the batch and what to divide it by.
        search (`str`, *optional*, defaults to `"exhaustive"`):
            `"exhaustive"`: every candidate sees every row; `"racing"`: successive halving, see [`survivors`].
        keep (`int`, *optional*, defaults to `1`):
            Training runs that racing must leave.
        base_model (`str`, *optional*):
            Name of the base model, to warn about adapters that record another one.
        max_seconds (`float`, *optional*):
            When it is over, no further candidate is scored on further rows.

    Returns:
        `list[Score]`: One for each candidate, the best first; those that were not scored to the end come last.
    """
    race = _Race(model, as_rows(batches), metric, max_seconds)
    shapes = {name: layer_shape(layer) for name, layer in linear_layers(model).items()}
    scores = [replace(_admitted(candidate, shapes, base_model), metric=metric) for candidate in candidates]
    with undisturbed(model), without_adapters(model):
        scores = race.run(scores, rung_sizes(len(race.rows), search), keep)
    order = {"scored": 0, "eliminated": 1}
    return sorted(scores, key=lambda score: (order.get(score.status, 2), -score.rows, score.value))


def evaluate(model: nn.Module, rows: Rows, metric: Metric = "loss", factors: Factors | None = None) -> RowLosses:
    """
    Returns the losses of a model on rows, with low-rank updates applied by hooks.

    To be called inside [`undisturbed`], and inside [`without_adapters`] unless the model's own adapters are meant.
    Batches are halved for good when memory runs out.

    Args:
        model (`torch.nn.Module`):
            The model.
        rows (`Rows`):
            What to evaluate on.
        metric (`str` or `Callable`, *optional*, defaults to `"loss"`):
            As in [`score_candidates`].
        factors (`Mapping[str, LoraFactors]`, *optional*):
            Updates by the name of the layer in the base model.
    """
    sums = torch.zeros(3, len(rows), dtype=torch.float64)
    with _applied(model, factors or {}):
        for indices, batch in rows.batches():
            try:
                losses = _batch_losses(model, batch, metric)
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or not rows.halve(indices):
                    raise
                clear_device_cache(garbage_collection=True)
                logger.info("Out of memory with %d rows; the batch is halved.", len(indices))
                continue
            values = torch.stack([losses.loss, losses.correct, losses.tokens])
            # A batch that is not one row per row (padding-free) counts as a whole, in the place of its first row.
            sums[:, indices if values.shape[1] == len(indices) else indices[:1]] = (
                values if values.shape[1] == len(indices) else values.sum(1, keepdim=True)
            )
    return RowLosses(*sums)


class _Race:
    """The candidates' way through the rungs, one after the other on ever more rows."""

    def __init__(self, model: nn.Module, rows: Rows, metric: Metric, max_seconds: float | None) -> None:
        self.model, self.rows, self.metric = model, rows, metric
        self.deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds

    def run(self, scores: list[Score], sizes: list[int], keep: int) -> list[Score]:
        start = 0
        for size in sizes:
            alive = [index for index, score in enumerate(scores) if score.status == "scored"]
            part = self.rows.part(start, size) if len(sizes) > 1 else self.rows
            with tqdm(total=len(alive), desc=f"mashup: {size} rows", disable=not is_main_process()) as bar:
                results = deal(
                    lambda score, part=part, bar=bar: self._score(score, part, bar), [scores[i] for i in alive]
                )
            for index, result in zip(alive, results, strict=True):
                scores[index] = replace(result, candidate=scores[index].candidate, adapter=scores[index].adapter)
            if size != sizes[-1]:
                scores = self._cut(scores, size, keep)
            start = size
        return scores

    def _score(self, score: Score, part: Rows, bar: tqdm) -> Score:
        started = time.monotonic()
        bar.update()
        if started > self.deadline:
            # What was scored on fewer rows stays comparable by its mean.
            reason = "max_seconds was over"
            return replace(score, status="scored" if score.losses else "eliminated", reason=reason)
        try:
            losses = evaluate(self.model, part, self.metric, load_factors(score.adapter))
        except AdapterError as error:
            return replace(score, status="rejected", reason=str(error))
        except (RuntimeError, OSError) as error:
            return replace(score, status="failed", reason=f"{type(error).__name__}: {error}")
        losses = joined([score.losses, losses] if score.losses else [losses])
        seconds = score.seconds + time.monotonic() - started
        if not math.isfinite(losses.mean_loss):
            return replace(score, status="failed", reason=f"its loss is {losses.mean_loss}", seconds=seconds)
        return replace(score, losses=losses, seconds=seconds)

    def _cut(self, scores: list[Score], size: int, keep: int) -> list[Score]:
        values = {index: score.losses for index, score in enumerate(scores) if score.status == "scored"}
        runs = {index: scores[index].candidate.run for index in values}
        stay = set(survivors(values, runs, keep, self.metric))
        reason = f"behind after {size} rows"
        out = [index for index in values if index not in stay]
        return [
            replace(score, status="eliminated", reason=reason) if index in out else score
            for index, score in enumerate(scores)
        ]


def _admitted(
    candidate: Candidate | Adapter | str | Path, shapes: Mapping[str, tuple], base_model: str | None
) -> Score:
    if isinstance(candidate, str | Path):
        candidate = Candidate(name=str(candidate), path=Path(candidate), run=str(candidate))
    found = candidate.candidate if isinstance(candidate, Adapter) else candidate
    if found.reason is not None:
        return Score(found, "rejected", found.reason)
    try:
        adapter = candidate if isinstance(candidate, Adapter) else read_adapter(candidate)
        return Score(found, adapter=check_adapter(adapter, shapes, base_model))
    except AdapterError as error:
        return Score(found, "rejected", str(error))


def _batch_losses(model: nn.Module, batch: Mapping[str, Any], metric: Metric) -> RowLosses:
    batch = send_to_device(batch, next(model.parameters()).device)
    if not callable(metric):
        return language_model_losses(model, batch)
    loss, count = (torch.tensor([float(value)], dtype=torch.float64) for value in metric(model, batch))
    return RowLosses(loss, torch.zeros_like(loss), count)


@contextmanager
def _applied(model: nn.Module, factors: Factors) -> Iterator[None]:
    layers = linear_layers(model) if factors else {}
    with ExitStack() as stack:
        for name, update in factors.items():
            stack.enter_context(layers[name].register_forward_hook(_adds(update, layers[name])))
        yield


def _adds(update: LoraFactors, layer: nn.Module) -> Callable[..., torch.Tensor]:
    device = next(layer.parameters()).device
    A, B = update.A.to(device), (update.scaling * update.B).to(device)

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return (output + F.linear(F.linear(args[0].to(A.dtype), A), B)).to(output.dtype)

    return hook
