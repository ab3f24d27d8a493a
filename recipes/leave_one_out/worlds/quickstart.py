"""The quickstart's small world: eight multiple-choice tasks, a character-level Llama, adapters in the repository."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from datasets import Dataset

from ...quickstart import world
from .base import Budget, World


TASKS = tuple(world.TASKS)
FULL = Budget(TASKS, world.STEPS, eval_every=15, learning_rate=world.LEARNING_RATE, oracle_steps=10)
FULL = replace(FULL, learning_rates=(1e-3, 3e-3, 6e-3), study_tasks=TASKS[::2], sample_sizes=(8, 32, 256))
FULL = replace(FULL, methods=("linear", "ties"), top_ks=(1, 3, 5))
FAST = replace(FULL, tasks=("largest", "last"), steps=60, eval_every=10, seeds=(1,), learning_rates=(1e-3, 3e-3))
FAST = replace(FAST, study_tasks=(), sample_sizes=(16, 256), top_ks=(1, 3))
TEST_SEED = 0


class Quickstart(World):
    """Multiple choice by letter; the metric is the test accuracy."""

    name = "quickstart"
    metric = "accuracy"
    rank = world.RANK
    tokenizer = property(lambda self: _tokenizer())

    def all_tasks(self, budget: Budget) -> tuple[str, ...]:
        return TASKS

    def adapter(self, task: str) -> Path:
        return world.ADAPTERS / task

    def base_model(self):
        return world.load_model()

    def arguments(self, output_dir, seed, steps, learning_rate, **settings):
        settings |= {"max_steps": steps, "learning_rate": learning_rate, "warmup_steps": max(1, steps // 10)}
        return world.training_arguments(output_dir, seed, **settings)

    def train_rows(self, target, seed, steps):
        return world.rows(target, steps * world.BATCH_SIZE, seed)

    def evaluate(self, model, target):
        return world.accuracy(model, _tokenizer(), _test_rows(target))


@cache
def _tokenizer():
    return world.load_tokenizer()


@cache
def _test_rows(target: str) -> Dataset:
    return world.rows(target, world.TEST_ROWS, TEST_SEED, "test")


def make(home: Path, fast: bool, model: str | None) -> Quickstart:
    return Quickstart(home, FAST if fast else FULL)
