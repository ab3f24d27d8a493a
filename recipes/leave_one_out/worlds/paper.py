"""The paper's protocol: eight benchmarks from the Hub, a Gemma model, one epoch for each adapter. Needs a GPU."""

import math
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from .base import Budget, World, silenced
from .benchmarks import BENCHMARKS, Question


MODELS = ("google/gemma-3-1b-it", "google/gemma-2-2b-it", "google/gemma-3-4b-it")
BATCH_SIZE, EVAL_BATCH_SIZE = 32, 32
FULL = Budget(
    tasks=tuple(BENCHMARKS),
    steps=10**9,
    eval_every=20,
    learning_rate=2e-4,
    learning_rates=(5e-5, 1e-4, 2e-4, 3e-4, 5e-4),
    sweep_seeds=(1, 2, 3),
    sample_sizes=(16, 32, 64, 128, 256, 512),
    methods=("linear", "ties", "dare_ties", "karcher"),
    top_ks=(1, 2, 3, 5, 7),
)
FAST = Budget(
    tasks=("arc_easy", "openbookqa"), steps=20, eval_every=10, learning_rate=2e-4, seeds=(1,), oracle_steps=5
)
TEST_ROWS, TEST_ROWS_FAST = None, 100


class Paper(World):
    """Benchmarks answered by letter; the metric is the accuracy on the validation split."""

    name = "paper"
    metric = "accuracy"

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

    def trainer(self, model, target, seed, output_dir, *, steps, learning_rate, callbacks=(), peft_config=None):
        args = SFTConfig(
            output_dir=str(output_dir),
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(0.1 * steps),
            completion_only_loss=True,
            bf16=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        )
        rows = [question.chat() for question in questions(target, "train")]
        trainer = SFTTrainer(
            model,
            args=args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=self.tokenizer,
            peft_config=peft_config,
            callbacks=list(callbacks),
        )
        return silenced(trainer)

    @torch.no_grad()
    def evaluate(self, model, target):
        asked = questions(target, "validation")[: self.test_rows]
        was_training = model.training
        model.eval()
        starts = range(0, len(asked), EVAL_BATCH_SIZE)
        right = sum(right_answers(model, self.tokenizer, asked[start : start + EVAL_BATCH_SIZE]) for start in starts)
        model.train(was_training)
        return right / len(asked)


@cache
def questions(task: str, split: str) -> tuple[Question, ...]:
    """Loads a split of a benchmark from the Hub."""
    benchmark = BENCHMARKS[task]
    rows = datasets.load_dataset(benchmark.path, benchmark.subset, split=split, revision=benchmark.revision)
    return tuple(benchmark.read(row) for row in rows)


def right_answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, asked: tuple[Question, ...]) -> int:
    """Number of questions whose right letter is the likeliest of the options' letters at the start of the answer."""
    prompts = [question.chat()["prompt"] for question in asked]
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    batch = batch.to(next(model.parameters()).device)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=positions, logits_to_keep=1).logits[:, -1]
    ids = {letter: tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in "ABCDE"}
    found = (row[[ids[letter] for letter in q.letters]].argmax().item() for row, q in zip(logits, asked, strict=True))
    return sum(index == question.answer for index, question in zip(found, asked, strict=True))


def make(home: Path, fast: bool, model: str | None) -> Paper:
    return Paper(home, FAST if fast else FULL, model or MODELS[0], TEST_ROWS_FAST if fast else TEST_ROWS)
