"""The paper's protocol: eight benchmarks from the Hub, a Gemma model, one epoch for each adapter. Needs a GPU."""

import math
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .base import Budget, World, evaluating
from .benchmarks import BENCHMARKS, Question, letter_scores


MODEL = "google/gemma-3-1b-it"
BATCH_SIZE, EVAL_BATCH_SIZE, LENGTH = 32, 32, 1024
FULL = Budget(tuple(BENCHMARKS), steps=10**9, eval_every=20, learning_rate=2e-4, sweep_seeds=(1, 2, 3))
FULL = replace(FULL, learning_rates=(5e-5, 1e-4, 2e-4, 3e-4, 5e-4), sample_sizes=(16, 32, 64, 128, 256, 512))
FULL = replace(FULL, methods=("linear", "ties", "dare_ties", "karcher"), top_ks=(1, 2, 3, 5, 7))
FAST = Budget(("arc_easy", "openbookqa"), 20, eval_every=10, learning_rate=2e-4, seeds=(1,), oracle_steps=5)
TEST_ROWS, TEST_ROWS_FAST = None, 100


class Paper(World):
    """Benchmarks answered by letter; the metric is the accuracy on the validation split."""

    name = "paper"
    metric = "accuracy"
    batch_size, length = BATCH_SIZE, LENGTH

    def __init__(self, home: Path, budget: Budget, model: str, test_rows: int | None) -> None:
        super().__init__(home / model.replace("/", "--"), budget)
        self.model_name, self.test_rows = model, test_rows

    def all_tasks(self, budget: Budget) -> tuple[str, ...]:
        return tuple(BENCHMARKS)

    def steps(self, task: str) -> int:
        return min(self.budget.steps, math.ceil(BENCHMARKS[task].rows / BATCH_SIZE))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.model_name)

    def base_model(self):
        return AutoModelForCausalLM.from_pretrained(self.model_name, dtype=torch.bfloat16)

    def lora_config(self, **settings: Any):
        return super().lora_config(**{"lora_dropout": 0.0, **settings})

    def arguments(self, output_dir, seed, steps, learning_rate, **settings):
        settings |= {"warmup_steps": math.ceil(0.1 * steps), "completion_only_loss": True}
        settings |= {"gradient_checkpointing": True, "bf16": torch.cuda.is_available()}
        return super().arguments(output_dir, seed, steps, learning_rate, **settings)

    def train_rows(self, target, seed, steps):
        return datasets.Dataset.from_list([question.chat() for question in questions(target, "train")])

    def evaluate(self, model, target):
        asked = questions(target, "validation")[: self.test_rows]
        prompts = [question.chat()["prompt"] for question in asked]
        texts = self.tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
        parts = [slice(start, start + EVAL_BATCH_SIZE) for start in range(0, len(asked), EVAL_BATCH_SIZE)]
        with evaluating(model):
            scores = [
                letter_scores(model, self.tokenizer, asked[part], texts[part], add_special_tokens=False)
                for part in parts
            ]
        return sum(right for part in scores for _, right in part) / len(asked)


@cache
def questions(task: str, split: str) -> tuple[Question, ...]:
    """Loads a split of a benchmark from the Hub."""
    benchmark = BENCHMARKS[task]
    rows = datasets.load_dataset(benchmark.path, benchmark.subset, split=split, revision=benchmark.revision)
    return tuple(benchmark.read(row) for row in rows)


def make(home: Path, fast: bool, model: str | None) -> Paper:
    return Paper(home, FAST if fast else FULL, model or MODEL, TEST_ROWS_FAST if fast else TEST_ROWS)
