"""Language modeling of packages' sources: blocks of tokens, and the NLL per byte of files that are not trained on."""

import random
from abc import abstractmethod
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .base import World, evaluating
from .sources import read


class Text(World):
    """A world whose tasks are packages; the metric is the NLL per byte of unseen files."""

    metric = "NLL per byte (nats)"
    higher_is_better = False
    # Token behind each file.
    end: str
    # Blocks that measure, at the most.
    test_rows: int

    @staticmethod
    @abstractmethod
    def split_files(package: str, split: str) -> list[Path]:
        """Returns the files of a package to train on, or those that are unseen."""

    def train_rows(self, target, seed, steps):
        drawn = random.Random(seed).choices(self.blocks_of(target, "train"), k=steps * self.batch_size)
        return Dataset.from_dict({"input_ids": drawn})

    def evaluate(self, model, target):
        return self.nll(model, target, "test")

    def nll(self, model: nn.Module, package: str, split: str) -> float:
        """NLL per byte on blocks of a split's files."""
        tokens, size = self.unseen_blocks(package, split)
        device = next(model.parameters()).device
        with evaluating(model):
            return sum(summed_nll(model, part.to(device)) for part in tokens.split(self.batch_size)) / size

    def blocks_of(self, package: str, split: str) -> list[list[int]]:
        """All blocks of a split's files."""
        return token_blocks(self.tokenizer, self.split_files(package, split), self.end, self.length)

    @cache  # noqa: B019 (a process has one world)
    def unseen_blocks(self, package: str, split: str) -> tuple[torch.Tensor, int]:
        """Blocks of a split's files, the same for every run, and the bytes that are predicted in them."""
        blocks = self.blocks_of(package, split)
        drawn = random.Random(0).sample(blocks, min(self.test_rows, len(blocks)))
        return torch.tensor(drawn), sum(text_bytes(self.tokenizer, block[1:]) for block in drawn)


def token_blocks(tokenizer: PreTrainedTokenizerBase, files: list[Path], end: str, length: int) -> list[list[int]]:
    """Cuts the files' tokens, an end-of-text after each file, into blocks of equal length; the rest is dropped."""
    stream = [token for path in files for token in tokenizer.encode(read(path) + end)]
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def summed_nll(model: nn.Module, tokens: torch.Tensor) -> float:
    """Sum of the NLL of every token but the first of each block."""
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()


def text_bytes(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> int:
    """Bytes of text that tokens stand for; a character that a block cuts in two counts as a few."""
    return len(tokenizer.decode(tokens, skip_special_tokens=True).encode())
