"""Real text: a small Llama pre-trained on the Python standard library's sources, and packages that it has not seen."""

import random
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import SFTTrainer

from ...quickstart.world import build_model
from .base import Budget
from .sources import PACKAGES, read, source_files, split_files
from .text import Text, token_blocks


END = "<|endoftext|>"
VOCABULARY, LENGTH, BATCH_SIZE = 2048, 256, 8
SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6}
PRETRAIN_BATCH_SIZE, PRETRAIN_LEARNING_RATE = 16, 2e-3
ARMS, RATES = ("scratch", "mashup", "best_single", "random", "all"), (1e-3, 2e-3, 4e-3)
FULL = Budget(PACKAGES[:4], steps=60, eval_every=5, learning_rate=2e-3, arms=ARMS, learning_rates=RATES)
FAST = replace(FULL, tasks=PACKAGES[:1], steps=10, eval_every=2, seeds=(1,), learning_rates=())
PRETRAIN_STEPS, PRETRAIN_STEPS_FAST = 700, 20
TEST_BLOCKS, TEST_BLOCKS_FAST = 24, 4


class Stdlib(Text):
    """Language modeling of a package's sources with a base model that is trained on the rest of the library."""

    name = "stdlib"
    end, length, batch_size = END, LENGTH, BATCH_SIZE
    split_files = staticmethod(split_files)

    def __init__(self, home: Path, budget: Budget, pretrain_steps: int, test_rows: int) -> None:
        super().__init__(home, budget)
        self.pretrain_steps, self.test_rows, self.base = pretrain_steps, test_rows, home / "base"

    def all_tasks(self, budget: Budget) -> tuple[str, ...]:
        return PACKAGES

    def prepare(self) -> None:
        if not self.base.is_dir():
            self.pretrain(self.pretrain_steps)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(self.base)

    def base_model(self):
        return LlamaForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def pretrain(self, steps: int, seed: int = 0) -> None:
        """Trains the tokenizer and the base model on the library without the held-out packages, and saves both."""
        files = source_files()
        draft = self.base.with_name(self.base.name + ".draft")
        tokenizer = train_tokenizer(files)
        tokenizer.save_pretrained(draft)
        drawn = random.Random(seed).choices(token_blocks(tokenizer, files, END, LENGTH), k=steps * PRETRAIN_BATCH_SIZE)
        set_seed(seed)
        batch = {"per_device_train_batch_size": PRETRAIN_BATCH_SIZE}
        trainer = SFTTrainer(
            small_llama(tokenizer),
            args=self.arguments(draft / "trainer", seed, steps, PRETRAIN_LEARNING_RATE, **batch),
            train_dataset=Dataset.from_dict({"input_ids": drawn}),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.model.save_pretrained(draft)
        draft.replace(self.base)


def train_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on the files."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(map(read, files), VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END, pad_token=END)


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about three million parameters."""
    return build_model(tokenizer, **SIZES, max_position_embeddings=LENGTH)


def make(home: Path, fast: bool, model: str | None) -> Stdlib:
    if fast:
        return Stdlib(home, FAST, PRETRAIN_STEPS_FAST, TEST_BLOCKS_FAST)
    return Stdlib(home, FULL, PRETRAIN_STEPS, TEST_BLOCKS)
