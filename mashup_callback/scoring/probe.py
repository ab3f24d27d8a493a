"""What a candidate becomes: its loss after a few steps of training, on temporary copies of its factors."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from ..distributed import deal
from ..errors import AdapterError
from ..factors import Factors, LoraFactors
from ..formats.adapter import Adapter, load_factors
from ..lora.hooks import applied
from ..lora.trainee import fit
from ..model.layers import Trainee, find_trainee
from .evaluation import evaluate, on_device
from .losses import language_model_losses
from .sample import Rows


if TYPE_CHECKING:
    from .halving import Score

logger = logging.getLogger(__name__)

# Optimizer steps from each candidate, and the share of the rows that they learn from; the rest judges.
STEPS = 16
TRAINED_SHARE = 0.75
# Candidates that are probed, the best by their loss: this many, or twice as many as will be merged.
AT_LEAST = 8


def probe(
    model: nn.Module,
    scores: Sequence["Score"],
    rows: Rows,
    keep: int,
    *,
    trainee: Trainee | None,
    learning_rate: float,
    deadline: float = math.inf,
) -> list["Score"]:
    """
    Ranks the best candidates by their loss after a few steps of training, since the candidate with the lowest loss is
    not always the best one to start from.

    Each of the best `max(8, 2 * keep)` candidates is brought into the trainee's ranks and target layers, as the swap
    would do it (on a model that trains no adapter, it keeps its own), and trained for 16 steps of AdamW on three
    quarters of the rows, whose other quarter then judges it. What is trained are copies of the factors that hooks
    apply; no parameter or gradient of the model is touched, and no random number is drawn. A step costs about three
    forward passes of a batch, so a probe costs about as much as scoring on 48 batches, and the memory of a training
    step.

    To be called inside [`undisturbed`] with the model's own adapters switched off.

    Args:
        model (`torch.nn.Module`):
            The model.
        scores (`Sequence[Score]`):
            The scores by loss.
        rows (`Rows`):
            The selection rows.
        keep (`int`):
            Training runs that will be merged.
        trainee (`Trainee`, *optional*):
            The adapter that is trained, from [`trained_adapter`].
        learning_rate (`float`):
            AdamW's.
        deadline (`float`, *optional*):
            Time, by `time.monotonic`, after which no further probe begins.

    Returns:
        `list[Score]`: All scores, those that were probed with a `probe_loss`, and those that were left out eliminated.
        The ranking by loss stays where time ran out before all were probed, and where there are too few rows or full
        checkpoints.
    """
    fit_rows, judge = _split(rows)
    if judge is None:
        logger.warning("%d rows are too few to train on some and judge by the others; the loss ranks.", len(rows))
        return list(scores)
    if not all(isinstance(score.adapter, Adapter) for score in scores if score.status == "scored"):
        logger.warning("Full checkpoints cannot be probed, only adapters; the loss ranks.")
        return list(scores)
    places = _best(scores, max(AT_LEAST, 2 * keep), keep)

    def run(place: int) -> float | str | None:
        if time.monotonic() > deadline:
            return None
        try:
            return _probed(model, _start(scores[place].adapter, trainee), fit_rows, judge, learning_rate)
        except (AdapterError, OSError, RuntimeError) as error:
            return f"{type(error).__name__} while it was probed: {error}"

    found = dict(zip(places, deal(run, places), strict=True))
    if None in found.values():
        logger.warning("max_seconds was over before all %d candidates were probed; the loss ranks.", len(places))
        return list(scores)
    return [_with_result(score, found.get(place), len(rows)) for place, score in enumerate(scores)]


def _split(rows: Rows) -> tuple[Rows, Rows | None]:
    middle = math.ceil(TRAINED_SHARE * len(rows))
    return (rows.part(0, middle), rows.part(middle, len(rows))) if 0 < middle < len(rows) else (rows, None)


def _best(scores: Sequence["Score"], count: int, keep: int) -> list[int]:
    usable = [place for place, score in enumerate(scores) if score.status == "scored"]
    order = sorted(usable, key=lambda place: scores[place].loss)
    runs: dict[str, int] = {}
    for place in order:
        runs.setdefault(scores[place].candidate.run or scores[place].candidate.name, place)
    # One checkpoint of a run enters a merge: the best ones of different runs come before further ones of a run.
    needed = list(runs.values())[: max(keep, 1)]
    return sorted({*needed, *order[:count]})


def trained_adapter(model: nn.Module) -> Trainee | None:
    """Returns the adapter that a model trains, None if there is none; to be called while it is switched on."""
    try:
        trainee = find_trainee(model, overwrite=True)
    except ValueError:
        return None
    return trainee if isinstance(trainee, Trainee) else None


def _start(adapter: Adapter, trainee: Trainee | None) -> Factors:
    factors = load_factors(adapter)
    if trainee is None:
        return factors
    # Imported here so that scoring does not import mergekit.
    from ..lora.merge import merge_factors

    merged = merge_factors([factors], weights=[1.0], ranks=trainee.ranks)
    return fit(merged.factors, trainee).factors


def _probed(model: nn.Module, start: Factors, rows: Rows, judge: Rows, learning_rate: float) -> float:
    device = next(model.parameters()).device
    copies = {name: _copy(factors, device) for name, factors in start.items()}
    tensors = [tensor for factors in copies.values() for tensor in (factors.A, factors.B)]
    optimizer = torch.optim.AdamW(tensors, lr=learning_rate, weight_decay=0.0)
    done = 0
    while done < STEPS:
        for indices, batch in rows.batches():
            if done == STEPS:
                break
            try:
                _gradients(model, copies, tensors, on_device(batch, model))
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or not rows.halve(indices):
                    raise
                clear_device_cache(garbage_collection=True)
                continue
            optimizer.step()
            done += 1
    trained = {name: LoraFactors(item.A.detach(), item.B.detach(), item.scaling) for name, item in copies.items()}
    return evaluate(model, judge, "loss", trained).mean_loss


def _copy(factors: LoraFactors, device: torch.device) -> LoraFactors:
    A, B = (tensor.detach().to(device, torch.float32, copy=True) for tensor in (factors.A, factors.B))
    return LoraFactors(A.requires_grad_(), B.requires_grad_(), factors.scaling)


def _gradients(model: nn.Module, factors: Factors, tensors: list[torch.Tensor], batch: dict) -> None:
    with torch.enable_grad(), applied(model, factors):
        losses = language_model_losses(model, batch)
        loss = losses.loss.sum() / losses.tokens.sum().clamp(min=1)
        # Not backward(): it would leave gradients on the model's own parameters.
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient


def _with_result(score: "Score", result: float | str | None, rows: int) -> "Score":
    if isinstance(result, str):
        return replace(score, status="failed", reason=result)
    if result is not None and not math.isfinite(result):
        return replace(score, status="failed", reason=f"its loss is {result} after {STEPS} steps of training")
    if result is None and score.status == "scored":
        return replace(score, status="eliminated", reason=f"behind after {rows} rows, before the probe")
    return replace(score, probe_loss=result)
