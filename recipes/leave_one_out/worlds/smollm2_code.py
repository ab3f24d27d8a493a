"""A real language model on real code: SmolLM2-135M-Instruct learns the style of eight packages, unlike each other."""

import importlib.util
import random
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...quickstart.world import quiet
from . import smollm2
from .base import Budget, evaluating
from .sources import LEFT_OUT, largest_first, read


# The first four are held out. Each is the standard library's or comes with this package's own dependencies.
PACKAGES = {
    "asyncio": "asyncio",
    "networkx": "networkx/algorithms",
    "sympy": "sympy/solvers",
    "matplotlib": "matplotlib",
    "email": "email",
    "torch": "torch/nn",
    "pandas": "pandas/core",
    "mpmath": "mpmath",
}
# Smaller files are imports, larger ones are often tables.
SMALLEST, LARGEST, MOST_FILES = 1_000, 60_000, 40
LENGTH, BATCH_SIZE = 128, 4
ARMS = ("scratch", "mashup", "best_single", "random", "all")
FULL = Budget(
    tasks=tuple(PACKAGES)[:4],
    steps=24,
    eval_every=6,
    learning_rate=1e-3,
    seeds=(1, 2),
    arms=ARMS,
    learning_rates=(1e-3, 2e-3, 4e-3),
    tuned=ARMS,
)
FAST = Budget(
    tasks=("asyncio",), steps=12, eval_every=4, learning_rate=2e-3, seeds=(1,), arms=("scratch", "mashup", "random")
)
FAST_PACKAGES = ("asyncio", "email", "mpmath", "networkx")
BLOCKS, BLOCKS_FAST = 16, 8


class SmolLM2Code(smollm2.SmolLM2):
    """Language modeling of a package's sources; the metric is the NLL per byte of unseen files."""

    name = "smollm2_code"
    metric = "NLL per byte (nats)"
    batch_size, length = BATCH_SIZE, LENGTH

    def train_rows(self, target, seed, steps):
        drawn = random.Random(seed).choices(self.blocks_of(target, "train"), k=steps * BATCH_SIZE)
        return Dataset.from_dict({"input_ids": drawn})

    def evaluate(self, model, target):
        return self.nll(model, target, "test")

    def final(self, model, target):
        return {"validation": self.nll(model, target, "validation")}

    def nll(self, model: nn.Module, package: str, split: str) -> float:
        """NLL per byte on blocks of a split's files."""
        tokens, size = self.unseen_blocks(package, split)
        device = next(model.parameters()).device
        with evaluating(model):
            return sum(summed_nll(model, part.to(device)) for part in tokens.split(BATCH_SIZE)) / size

    def blocks_of(self, package: str, split: str) -> list[list[int]]:
        """All blocks of a split's files."""
        return token_blocks(self.tokenizer, split_files(package, split), smollm2.MODELS[self.model_name].end)

    @cache  # noqa: B019 (a process has one world)
    def unseen_blocks(self, package: str, split: str) -> tuple[torch.Tensor, int]:
        """Blocks of a split's files, the same for every run, and the bytes that are predicted in them."""
        blocks = self.blocks_of(package, split)
        drawn = random.Random(0).sample(blocks, min(self.test_rows, len(blocks)))
        return torch.tensor(drawn), sum(text_bytes(self.tokenizer, block[1:]) for block in drawn)


def source_files(package: str) -> list[Path]:
    """Returns a package's source files, the largest first, no tests; the package itself is not imported."""
    top, *rest = PACKAGES[package].split("/")
    root = Path(importlib.util.find_spec(top).origin).parent
    files = [path for path in root.joinpath(*rest).rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)]
    return largest_first(path for path in files if SMALLEST <= path.stat().st_size <= LARGEST)


def split_files(package: str, split: str) -> list[Path]:
    """
    Returns the files of a split, at most `MOST_FILES` of them: by size, every fourth one for the test, every fourth
    for validation, which chooses the learning rate and nothing else, the others for training.
    """
    files = source_files(package)
    unseen = {"test": files[1::4], "validation": files[3::4]}
    found = unseen[split] if split in unseen else files[::2]
    return sorted(random.Random(0).sample(found, min(MOST_FILES, len(found))))


def token_blocks(tokenizer: PreTrainedTokenizerBase, files: list[Path], end: str) -> list[list[int]]:
    """Cuts the files' tokens, an end-of-text after each file, into blocks of `LENGTH`; the rest is dropped."""
    stream = [token for path in files for token in tokenizer.encode(read(path) + end)]
    return [stream[start : start + LENGTH] for start in range(0, len(stream) - LENGTH + 1, LENGTH)]


def summed_nll(model: nn.Module, tokens: torch.Tensor) -> float:
    """Sum of the NLL of every token but the first of each block."""
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()


def text_bytes(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> int:
    """Bytes of text that tokens stand for; a character that a block cuts in two counts as a few."""
    return len(tokenizer.decode(tokens, skip_special_tokens=True).encode())


def make(home: Path, fast: bool, model: str | None) -> SmolLM2Code:
    quiet()
    sizes = (FAST, FAST_PACKAGES, BLOCKS_FAST) if fast else (FULL, tuple(PACKAGES), BLOCKS)
    return SmolLM2Code(home, *sizes, model)
