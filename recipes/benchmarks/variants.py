"""
The starts that `choice.py` compares.

- `default`: equal weights, linear, delta, cut to the trainee's rank. `scratch` and `single` for comparison.
- `fitted`: one weight a candidate and layer, by AdamW on half of the selection rows with LoraHub's L1 (arXiv
  2307.13269); the other half stops it. `more_steps`: as many ordinary training steps from the default instead.
- `scale`: the default times the best of five scales, by the loss on the selection rows.
- `METHOD_SPACE`: other methods and spaces. `shared` projects every candidate into one subspace of the trainee's rank
  before it merges, so that nothing is cut afterwards (arXiv 2606.03723).
- `exact_frozen`: the uncut merge added to the frozen base, a fresh adapter on top; `cut_frozen`: the cut one so.
- `screen`: the three candidates of the lowest loss as a linear expansion around the mean of all predicts it.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import cycle, islice, product
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import Trainer, set_seed

from mashup_callback import score_candidates
from mashup_callback.lora import LoraUpdate, applied, merge_factors
from mashup_callback.lowrank import Factors, LoraFactors, shared_cores
from mashup_callback.methods import MergeRule
from mashup_callback.model import undisturbed
from mashup_callback.scoring import SampleRows, evaluate
from recipes.benchmarks.samples import sample_of
from recipes.leave_one_out.worlds import World


K, FIT_STEPS, FIT_RATE, L1, CHECK_EVERY, PATIENCE = 3, 30, 0.02, 0.05, 5, 2
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)


@dataclass(frozen=True, eq=False)
class Start:
    """What an arm trains from: an update for the trainee or one for the frozen base, and what it took to find it."""

    update: Factors | None = None
    frozen: Factors = field(default_factory=dict)
    cost: float = 0.0
    more_steps: int = 0
    note: str = ""


class Case:
    """A held-out task and a seed: its sample, its candidates with their losses."""

    def __init__(self, world: World, task: str, seed: int, steps: int, sample_rows: int) -> None:
        self.world, self.task, self.seed, self.steps = world, task, seed, steps
        self.base = world.base_model()
        with self.trainer(world.base_model()) as trainer:
            set_seed(seed)
            self.sample = sample_of(trainer, sample_rows, seed=seed)
            self.rows = trainer.args.train_batch_size

    @contextmanager
    def trainer(self, model: nn.Module) -> Iterator[Trainer]:
        """The world's Trainer for a model, the same for every arm."""
        rate = self.world.budget.learning_rate
        with tempfile.TemporaryDirectory() as directory:
            yield self.world.trainer(
                model, self.task, self.seed, Path(directory), steps=self.steps, learning_rate=rate
            )

    @cached_property
    def scores(self) -> list:
        library = self.world.candidates(self.task)
        return score_candidates(self.base, library, self.sample.selection, search="exhaustive")

    @cached_property
    def candidates(self) -> list[Factors]:
        """All of them, the best first."""
        return [score.source.load().factors for score in self.scores]

    @property
    def best(self) -> list[Factors]:
        return self.candidates[:K]

    def merged(self, inputs: Sequence[Factors], ranks: int | None = None, **settings) -> Factors:
        weights = [1 / len(inputs)] * len(inputs)
        return merge_factors(inputs, weights=weights, ranks=ranks or self.world.rank, **settings).factors

    def loss(self, update: Factors, rows: SampleRows) -> float:
        with undisturbed(self.base):
            return evaluate(self.base, rows, update=LoraUpdate(update)).mean_loss

    def forwards(self, rows: int) -> float:
        """The cost of forward passes over rows, in training steps: backward takes twice as long as forward."""
        return rows / self.rows / 3


def merged_by(case: Case, method: str, space: str) -> Start:
    parameters = {} if method == "linear" else {"density": 0.5}
    if space == "shared":
        return Start(merge_shared(case.best, method, parameters, case.world.rank))
    return Start(case.merged(case.best, method=method, parameters=parameters, space=space))


def merge_shared(inputs: Sequence[Factors], method: str, parameters: dict, rank: int) -> Factors:
    """Merges the candidates' coordinates in the two subspaces that keep the most of all of them together."""
    rule, weights = MergeRule.create(method, parameters), [1 / len(inputs)] * len(inputs)
    merged = {}
    for name in inputs[0]:
        (left, right), cores = shared_cores([one[name] for one in inputs])
        U, V = _subspaces(torch.stack(cores), rank)
        with torch.random.fork_rng():
            torch.manual_seed(42)
            core = rule.merge([U.T @ one @ V for one in cores], weights)
        merged[name] = LoraFactors((right @ V).T.float(), (left @ U @ core).float(), 1.0)
    return merged


def _subspaces(cores: torch.Tensor, rank: int, rounds: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Alternates between the two sides, as Tucker's decomposition does."""
    V = torch.eye(cores.shape[-1], dtype=cores.dtype)
    for _ in range(rounds):
        U = torch.linalg.svd((cores @ V).transpose(0, 1).flatten(1), full_matrices=False)[0][:, :rank]
        V = torch.linalg.svd((cores.mT @ U).transpose(0, 1).flatten(1), full_matrices=False)[0][:, :rank]
    return U, V


def scaled(factors: Factors, scale: float) -> Factors:
    return {name: LoraFactors(one.A, one.B, one.scaling * scale) for name, one in factors.items()}


def scale(case: Case) -> Start:
    update = case.merged(case.best)
    losses = {scale: case.loss(scaled(update, scale), case.sample.selection) for scale in SCALES}
    best = min(losses, key=losses.__getitem__)
    return Start(scaled(update, best), cost=case.forwards(len(SCALES) * len(case.sample.selection)), note=f"{best:g}")


def weighted(inputs: Sequence[Factors], weights: torch.Tensor) -> Factors:
    """The weighted sum of updates, uncut and differentiable; `weights` has a row a layer and a column an update."""
    return {
        name: LoraFactors(
            torch.cat([one[name].A for one in inputs]),
            torch.cat([w * one[name].scaling * one[name].B for w, one in zip(row, inputs, strict=True)], dim=1),
            1.0,
        )
        for name, row in zip(inputs[0], weights, strict=True)
    }


def gradient(model: nn.Module, inputs: Sequence[Factors], weights: torch.Tensor, batch: dict) -> torch.Tensor:
    """The gradient of the loss of a batch with respect to the weights."""
    weights = weights.detach().requires_grad_()
    with applied(model, weighted(inputs, weights)):
        loss = model(**batch).loss
    return torch.autograd.grad(loss, weights)[0]


@cache
def fitted(case: Case) -> Start:
    rows, half = case.sample.selection, len(case.sample.selection) // 2
    fitting, stopping = rows.part(0, half), rows.part(half, len(rows))
    weights = torch.full((len(case.best[0]), K), 1 / K)
    best, best_loss = weights.clone(), case.loss(weighted(case.best, weights), stopping)
    optimizer = torch.optim.AdamW([weights], FIT_RATE, weight_decay=0)
    cost, waited, taken = case.forwards(len(stopping)), 0, 0
    for step, (indices, batch) in enumerate(islice(cycle(fitting.batches()), FIT_STEPS), 1):
        weights.grad = gradient(case.base, case.best, weights, batch) + L1 * weights.sign() / weights.numel()
        optimizer.step()
        cost, taken = cost + len(indices) / case.rows, step
        if step % CHECK_EVERY == 0:
            loss = case.loss(weighted(case.best, weights), stopping)
            cost += case.forwards(len(stopping))
            waited = 0 if loss < best_loss else waited + 1
            if loss < best_loss:
                best, best_loss = weights.clone(), loss
            if waited == PATIENCE:
                break
    note = f"{taken} steps, weights {best.min():.2f} to {best.max():.2f}"
    return Start(case.merged([weighted(case.best, best)]), cost=cost, note=note)


def more_steps(case: Case) -> Start:
    cost = fitted(case).cost
    return Start(case.merged(case.best), cost=cost, more_steps=round(cost))


def screen(case: Case) -> Start:
    count, layers = len(case.candidates), len(case.candidates[0])
    weights, predicted, cost = torch.full((layers, count), 1 / count), torch.zeros(count), 0.0
    for indices, batch in case.sample.selection.batches():
        predicted += gradient(case.base, case.candidates, weights, batch).sum(0) * len(indices)
        cost += len(indices) / case.rows
    order = predicted.argsort().tolist()
    ranks = pd.Series(predicted.tolist()).corr(pd.Series([score.loss for score in case.scores]), "spearman")
    note = f"ranks {order[:K]} of the scores, Spearman {ranks:.2f}"
    # It replaces the scoring of all candidates.
    cost -= case.forwards(count * len(case.sample.selection))
    return Start(case.merged([case.candidates[index] for index in order[:K]]), cost=cost, note=note)


ARMS: dict[str, Callable[[Case], Start]] = {
    "default": lambda case: Start(case.merged(case.best)),
    "scratch": lambda case: Start(),
    "single": lambda case: Start(case.merged(case.best[:1])),
    "fitted": fitted,
    "more_steps": more_steps,
    "scale": scale,
    **{
        f"{method}_{space}": partial(merged_by, method=method, space=space)
        for method, space in product(("linear", "ties", "dare_ties"), ("delta", "core", "shared"))
        # Linear merging is the same in the first two.
        if method != "linear" or space == "shared"
    },
    "exact_frozen": lambda case: Start(frozen=case.merged(case.best, ranks=K * case.world.rank)),
    "cut_frozen": lambda case: Start(frozen=case.merged(case.best)),
    "screen": screen,
}
