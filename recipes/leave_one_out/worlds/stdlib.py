"""Real text: a small Llama pre-trained on the Python standard library's sources, and packages that it has not seen."""

import random
from functools import cache, cached_property
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import SFTTrainer

from ...quickstart.world import quiet
from .base import Budget, World, evaluating
from .smollm2_code import summed_nll
from .sources import PACKAGES, read, source_files, split_files


END = "<|endoftext|>"
VOCABULARY, LENGTH, BATCH_SIZE = 2048, 256, 8
HIDDEN, LAYERS, HEADS, INTERMEDIATE = 192, 6, 6, 512
PRETRAIN_BATCH_SIZE, PRETRAIN_LEARNING_RATE = 16, 2e-3
FULL = Budget(
    tasks=PACKAGES[:4],
    steps=60,
    eval_every=5,
    learning_rate=2e-3,
    arms=("scratch", "mashup", "best_single", "random", "all"),
    learning_rates=(1e-3, 2e-3, 4e-3),
)
FAST = Budget(
    tasks=PACKAGES[:1],
    steps=10,
    eval_every=2,
    learning_rate=2e-3,
    seeds=(1,),
    arms=("scratch", "mashup", "best_single", "random", "all"),
)
PRETRAIN_STEPS, PRETRAIN_STEPS_FAST = 700, 20
TEST_BLOCKS, TEST_BLOCKS_FAST = 24, 4


class Stdlib(World):
    """Language modeling of a package's sources; the metric is the NLL per byte of unseen files."""

    name = "stdlib"
    metric = "NLL per byte (nats)"
    higher_is_better = False

    def __init__(self, home: Path, budget: Budget, pretrain_steps: int, test_blocks: int) -> None:
        super().__init__(home, budget)
        self.pretrain_steps, self.test_blocks, self.base = pretrain_steps, test_blocks, home / "base"

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

    def train_rows(self, target, seed, steps):
        blocks = token_blocks(self.tokenizer, split_files(target, "train"))
        return Dataset.from_dict({"input_ids": random.Random(seed).choices(blocks, k=steps * BATCH_SIZE)})

    def arguments(self, output_dir, seed, steps, learning_rate, **settings):
        sizes = {"per_device_train_batch_size": BATCH_SIZE, "max_length": LENGTH, "warmup_steps": max(1, steps // 10)}
        cpu = {"gradient_checkpointing": False, "bf16": False}
        return super().arguments(output_dir, seed, steps, learning_rate, **{**sizes, **cpu, **settings})

    def evaluate(self, model, target):
        tokens, size = self.unseen(target)
        device = next(model.parameters()).device
        with evaluating(model):
            return sum(summed_nll(model, part.to(device)) for part in tokens.split(BATCH_SIZE)) / size

    @cache  # noqa: B019 (a process has one world)
    def unseen(self, target: str) -> tuple[torch.Tensor, int]:
        """Blocks of the target's unseen files and their bytes."""
        return unseen_blocks(self.tokenizer, target, self.test_blocks)

    def pretrain(self, steps: int, seed: int = 0) -> None:
        """Trains the tokenizer and the base model on the library without the held-out packages, and saves both."""
        files = source_files()
        draft = self.base.with_name(self.base.name + ".draft")
        tokenizer = train_tokenizer(files)
        tokenizer.save_pretrained(draft)
        drawn = random.Random(seed).choices(token_blocks(tokenizer, files), k=steps * PRETRAIN_BATCH_SIZE)
        set_seed(seed)
        batch = {"per_device_train_batch_size": PRETRAIN_BATCH_SIZE}
        trainer = SFTTrainer(
            LlamaForCausalLM(model_config(tokenizer)),
            args=self.arguments(draft / "trainer", seed, steps, PRETRAIN_LEARNING_RATE, **batch),
            train_dataset=Dataset.from_dict({"input_ids": drawn}),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.model.save_pretrained(draft)
        draft.replace(self.base)


def token_blocks(tokenizer: PreTrainedTokenizerFast, files: list[Path]) -> list[list[int]]:
    """Cuts the files' tokens, an end-of-text after each file, into blocks of `LENGTH`; the rest is dropped."""
    stream = [token for path in files for token in tokenizer.encode(read(path) + END)]
    return [stream[start : start + LENGTH] for start in range(0, len(stream) - LENGTH + 1, LENGTH)]


def unseen_blocks(tokenizer: PreTrainedTokenizerFast, package: str, count: int) -> tuple[torch.Tensor, int]:
    """Returns blocks of a package's unseen files, the same for every run, and the bytes that are predicted in them."""
    blocks = token_blocks(tokenizer, split_files(package, "test"))
    drawn = random.Random(0).sample(blocks, min(count, len(blocks)))
    return torch.tensor(drawn), sum(byte_count(tokenizer, block[1:]) for block in drawn)


def byte_count(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> int:
    """Bytes of text that tokens stand for: a byte-level token has one character for each byte."""
    end = tokenizer.convert_tokens_to_ids(END)
    return sum(len(text) for text in tokenizer.convert_ids_to_tokens([token for token in tokens if token != end]))


def train_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on the files."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(map(read, files), VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END, pad_token=END)


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of about three million parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make(home: Path, fast: bool, model: str | None) -> Stdlib:
    quiet()
    if fast:
        return Stdlib(home, FAST, PRETRAIN_STEPS_FAST, TEST_BLOCKS_FAST)
    return Stdlib(home, FULL, PRETRAIN_STEPS, TEST_BLOCKS)
