"""One run of the protocol: a task, an arm, a seed; and the curve that it leaves."""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback, set_seed

from mashup_callback import MashupCallback

from .worlds import World


LIBRARY = "library"
LIBRARY_SEED = 1000
NO_LIBRARY = {"scratch", "eva", "lora_ga"}
SWEPT = ("scratch", "mashup")


@dataclass(frozen=True)
class Job:
    """One run, and all that it depends on: another field, or another value, is another file."""

    world: str
    # The held-out task.
    task: str
    # `LIBRARY` is the run that trains the task's own adapter.
    arm: str
    # Of initialization and data order.
    seed: int
    learning_rate: float
    steps: int
    eval_every: int
    # Steps after which the oracle compares subsets; 0 for the other arms.
    oracle_steps: int = 0
    # Settings of the callback that differ from the arm's, as sorted pairs.
    settings: tuple[tuple[str, Any], ...] = ()
    # Base model, for the worlds that have a choice.
    model: str | None = None

    @property
    def key(self) -> str:
        """Name of the job's file: the task and arm, to be read, and a hash of everything."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.task}-{self.arm}-{digest[:12]}"


@dataclass(frozen=True)
class Point:
    """One point of a curve: the world's metric after so many steps."""

    step: int
    # Of training so far, without evaluations and without the arm's overhead.
    seconds: float
    value: float


@dataclass
class Begin:
    """What an arm hands to the Trainer."""

    # The base model, or a `PeftModel` whose adapter the arm initialized; else the Trainer adds one by `peft_config`.
    model: nn.Module
    peft_config: LoraConfig | None = None
    # The callbacks whose time is charged, and those that the Trainer is given.
    mashups: list[MashupCallback] = field(default_factory=list)
    callbacks: list[TrainerCallback] = field(default_factory=list)
    # Charged besides.
    seconds: float = 0.0
    # Candidates that the arm itself chose.
    chosen: tuple[str, ...] = ()

    @property
    def overhead(self) -> float:
        """Seconds before the first step: finding, downloading, scoring, merging and swapping, or a search."""
        return self.seconds + sum(mashup.report.seconds for mashup in self.mashups)


class Curve(TrainerCallback):
    """Measures the model at the beginning, every few steps and at the end, and stops the clock meanwhile."""

    def __init__(self, world: World, task: str, every: int, stop_after: int | None = None) -> None:
        self.world, self.task, self.every, self.stop_after = world, task, every, stop_after
        self.points: list[Point] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._seconds, self._started = 0.0, time.perf_counter()
        if self.stop_after is None:
            self._record(model, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        step = state.global_step
        last = step in (args.max_steps, state.max_steps, self.stop_after)
        if last or step % self.every == 0:
            self._seconds += time.perf_counter() - self._started
            self._record(model, step)
        if step == self.stop_after:
            control.should_training_stop = True

    def _record(self, model: nn.Module, step: int) -> None:
        self.points.append(Point(step, self._seconds, self.world.evaluate(model, self.task)))
        self._started = time.perf_counter()


def train(world: World, job: Job, begin: Begin, stop_after: int | None = None) -> tuple[list[Point], nn.Module]:
    """Trains one adapter; `stop_after` ends it early, on the learning-rate schedule of the whole run."""
    curve = Curve(world, job.task, stop_after or job.eval_every, stop_after)
    with tempfile.TemporaryDirectory() as scratch:
        set_seed(job.seed)
        trainer = world.trainer(
            begin.model,
            job.task,
            job.seed,
            Path(scratch),
            steps=job.steps,
            learning_rate=job.learning_rate,
            # The curve comes last: its step 0 is then the arm's start.
            callbacks=[*begin.callbacks, curve],
            peft_config=begin.peft_config,
        )
        # The order of the data is drawn from here on: the same for every arm.
        set_seed(job.seed)
        trainer.train()
    return curve.points, trainer.model


def plan(world: World, model: str | None = None) -> Iterator[Job]:
    """
    Yields every job of a world's budget once: the main table first, the arms of one task and seed after one another,
    so that a machine that slows down over hours does so for all of them; then the sweep and the studies.
    """
    budget, seen = world.budget, set()
    rate, few = budget.learning_rate, budget.sweep_seeds
    studies = [{"sample_size": count} for count in budget.sample_sizes]
    studies += [{"guard": False, "merge_method": m, "top_k": k} for m in budget.methods for k in budget.top_ks]
    studied = [task for task in budget.study_tasks or budget.tasks if task in budget.tasks]
    swept = budget.tuned or SWEPT
    parts = (
        # Tuned arms run on the other seeds at their own rates, which the sweep has yet to find.
        (few if budget.tuned else budget.seeds, budget.tasks, [(arm, rate, {}) for arm in budget.arms]),
        (few, budget.tasks, [(arm, other, {}) for other in budget.learning_rates for arm in swept]),
        (few, studied, [("mashup", rate, settings) for settings in studies]),
    )
    for seeds, tasks, variants in parts:
        for seed, task, (arm, learning_rate, settings) in product(seeds, tasks, variants):
            job = make_job(world, task, arm, seed, learning_rate, settings, model)
            if job not in seen:
                seen.add(job)
                yield job


def plan_library(world: World, model: str | None = None) -> Iterator[Job]:
    """Yields the runs that train the missing adapters, each from a seed of its own; none where no arm needs them."""
    if set(world.budget.arms) <= NO_LIBRARY:
        return
    for index, task in enumerate((*world.library_tasks, *world.controls())):
        if not world.adapter(task).is_dir():
            rate = world.budget.library_rate or world.budget.learning_rate
            job = make_job(world, task, LIBRARY, LIBRARY_SEED + index, rate, {}, model)
            steps = world.budget.library_steps or job.steps
            # Nobody reads the curve of a library's adapter.
            yield replace(job, steps=steps, eval_every=steps)


def make_job(
    world: World, task: str, arm: str, seed: int, learning_rate: float, settings: dict, model: str | None = None
) -> Job:
    """Makes a job with the world's sizes."""
    oracle_steps = world.budget.oracle_steps if arm == "oracle" else 0
    pairs = tuple(sorted(settings.items()))
    budget = world.budget
    steps = world.steps(task)
    return Job(world.name, task, arm, seed, learning_rate, steps, budget.eval_every, oracle_steps, pairs, model)
