"""Ranks candidates by their loss after a few steps of training, on temporary copies of their factors."""

import itertools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..distributed import map_over_processes
from ..errors import AdapterError
from ..lora import LoraUpdate, TrainedAdapter, bypassed_layers, cut_to, fit
from ..lowrank import Factors, LoraFactors
from ..model import is_sharded
from .evaluation import evaluate, halved, on_device
from .losses import language_model_losses
from .sample import SampleRows
from .score import Score


logger = logging.getLogger(__name__)

# Optimizer steps from each candidate, and the share of the rows that they learn from; the rest judges.
STEPS = 16
TRAINED_SHARE = 0.75
# Candidates that are probed, the best by their loss: this many, or twice as many as will be merged.
AT_LEAST = 8


def probe(
    model: nn.Module,
    scores: list[Score],
    rows: SampleRows,
    keep: int,
    trainee: TrainedAdapter | None,
    learning_rate: float,
    deadline: float = math.inf,
) -> list[Score]:
    """
    Ranks the best candidates by their loss after a few steps of training, since the candidate with the lowest loss is
    not always the best one to start from.

    Each of the best `max(8, 2 * keep)` candidates is brought into the trainee's ranks and target layers (on a model
    that trains no adapter, it keeps its own), and trained for 16 steps of AdamW on three quarters of the rows, whose
    other quarter then judges it. What is trained are copies of the factors; no parameter or gradient of the model is
    touched, and no random number is drawn. A probe costs about as much as scoring on 48 batches, and the memory of a
    training step. Where it is not possible, the ranking by loss stays.
    """
    middle = math.ceil(TRAINED_SHARE * len(rows))
    why_not = _why_not(model, scores, len(rows) - middle)
    if why_not is not None:
        logger.warning("%s; the loss ranks.", why_not)
        return scores
    learn, judge = rows.part(0, middle), rows.part(middle, len(rows))
    chosen = _best(scores, max(AT_LEAST, 2 * keep), keep)

    def run(index: int) -> float | str | None:
        if time.monotonic() > deadline:
            return None
        try:
            start = _in_trainee(scores[index], trainee)
            return _probed(model, start, learn, judge, learning_rate)
        except (AdapterError, OSError, RuntimeError) as error:
            return f"{type(error).__name__} while it was probed: {error}"

    found = dict(zip(chosen, map_over_processes(run, chosen), strict=True))
    if None in found.values():
        logger.warning("max_seconds was over before all %d candidates were probed; the loss ranks.", len(chosen))
        return scores
    return [_with_result(score, found.get(index), len(rows)) for index, score in enumerate(scores)]


def _why_not(model: nn.Module, scores: Sequence[Score], judging: int) -> str | None:
    if is_sharded(model):
        return 'metric="probe" needs the whole model on each process, and this one is sharded'
    if bypassed_layers(model):
        return 'metric="probe" trains updates of layers, and fused kernels bypass some of these'
    if judging < 1:
        return "There are too few rows to train on some and judge by the others"
    if any(score.source.rank is None for score in scores if score.status == "scored"):
        return "Full checkpoints cannot be probed, only adapters"
    return None


def _best(scores: Sequence[Score], count: int, keep: int) -> list[int]:
    usable = [index for index, score in enumerate(scores) if score.status == "scored"]
    order = sorted(usable, key=lambda index: scores[index].loss)
    runs: dict[str, int] = {}
    for index in order:
        runs.setdefault(scores[index].candidate.run or scores[index].candidate.name, index)
    # One checkpoint of a run enters a merge: the best ones of different runs come before further ones of a run.
    return sorted({*list(runs.values())[: max(keep, 1)], *order[:count]})


def _in_trainee(score: Score, trainee: TrainedAdapter | None) -> Factors:
    update = score.source.load()
    assert isinstance(update, LoraUpdate), "full checkpoints are refused before"
    return update.factors if trainee is None else fit(cut_to(update.factors, trainee), trainee)


def _probed(model: nn.Module, start: Factors, learn: SampleRows, judge: SampleRows, learning_rate: float) -> float:
    device = next(model.parameters()).device
    copies = {name: _copy(factors, device) for name, factors in start.items()}
    tensors = [tensor for factors in copies.values() for tensor in (factors.A, factors.B)]
    optimizer = torch.optim.AdamW(tensors, lr=learning_rate, weight_decay=0.0)
    steps = 0
    for indices, batch in itertools.chain.from_iterable(learn.batches() for _ in range(STEPS)):
        if steps == STEPS:
            break
        try:
            gradients = _gradients(model, copies, tensors, on_device(batch, model))
        except RuntimeError as error:
            if not halved(learn, indices, error):
                raise
            continue
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        steps += 1
    trained = {name: LoraFactors(item.A.detach(), item.B.detach(), item.scaling) for name, item in copies.items()}
    return evaluate(model, judge, "loss", LoraUpdate(trained)).mean_loss


def _copy(factors: LoraFactors, device: torch.device) -> LoraFactors:
    A, B = (tensor.detach().to(device, torch.float32, copy=True) for tensor in (factors.A, factors.B))
    return LoraFactors(A.requires_grad_(), B.requires_grad_(), factors.scaling)


def _gradients(model: nn.Module, factors: Factors, tensors: list[torch.Tensor], batch: dict) -> tuple:
    with torch.enable_grad(), LoraUpdate(factors).applied(model):
        losses = language_model_losses(model, batch)
        loss = losses.loss.sum() / losses.tokens.sum().clamp(min=1)
        # Not backward(): it would leave gradients on the model's own parameters.
        return torch.autograd.grad(loss, tensors, allow_unused=True)


def _with_result(score: Score, result: float | str | None, rows: int) -> Score:
    if isinstance(result, str):
        return replace(score, status="failed", reason=result)
    if result is not None and not math.isfinite(result):
        return replace(score, status="failed", reason=f"its loss is {result} after {STEPS} steps of training")
    if result is None and score.status == "scored":
        return replace(score, status="eliminated", reason=f"behind after {rows} rows, before the probe")
    return replace(score, probe_loss=result)
