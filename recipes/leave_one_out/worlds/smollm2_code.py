"""A real language model on real code: SmolLM2-135M-Instruct learns the style of eight packages, unlike each other."""

import importlib.util
import random
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTTrainer

from ...quickstart.world import quiet
from . import smollm2
from .base import Budget, World, silenced
from .sources import LEFT_OUT, largest_first
from .stdlib import arguments, summed_nll, token_blocks


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
    tasks=("asyncio",),
    steps=12,
    eval_every=4,
    learning_rate=2e-3,
    seeds=(1,),
    arms=("scratch", "mashup", "random"),
)
FAST_PACKAGES = ("asyncio", "email", "mpmath", "networkx")
BLOCKS, BLOCKS_FAST = 16, 8


class SmolLM2Code(World):
    """Language modeling of a package's sources; the metric is the NLL per byte of unseen files."""

    name = "smollm2_code"
    metric = "NLL per byte (nats)"
    higher_is_better = False

    def __init__(self, home: Path, budget: Budget, packages: tuple[str, ...], blocks: int, model: str) -> None:
        self.packages, self.blocks, self.model_name = packages, blocks, model
        super().__init__(home / model, budget)
        self._unseen: dict[tuple[str, str], tuple[torch.Tensor, int]] = {}

    def all_tasks(self, budget: Budget) -> tuple[str, ...]:
        return self.packages

    def prepare(self) -> None:
        smollm2.base(self.model_name)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(smollm2.base(self.model_name))

    def base_model(self):
        return AutoModelForCausalLM.from_pretrained(smollm2.base(self.model_name), dtype=torch.float32)

    def trainer(self, model, target, seed, output_dir, *, steps, learning_rate, callbacks=(), peft_config=None):
        blocks = self.blocks_of(target, "train")
        drawn = random.Random(seed).choices(blocks, k=steps * BATCH_SIZE)
        trainer = SFTTrainer(
            model,
            args=arguments(output_dir, seed, steps, learning_rate, BATCH_SIZE, LENGTH),
            train_dataset=Dataset.from_dict({"input_ids": drawn}),
            processing_class=self.tokenizer,
            peft_config=peft_config,
            callbacks=list(callbacks),
        )
        return silenced(trainer)

    def evaluate(self, model, target):
        return self.nll(model, target, "test")

    def final(self, model, target):
        return {"validation": self.nll(model, target, "validation")}

    @torch.no_grad()
    def nll(self, model: torch.nn.Module, package: str, split: str) -> float:
        """NLL per byte on blocks of a split's files."""
        if (package, split) not in self._unseen:
            self._unseen[package, split] = self.unseen_blocks(package, split)
        tokens, size = self._unseen[package, split]
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        loss = sum(summed_nll(model, part.to(device)) for part in tokens.split(BATCH_SIZE))
        model.train(was_training)
        return loss / size

    def blocks_of(self, package: str, split: str) -> list[list[int]]:
        """All blocks of a split's files."""
        return token_blocks(self.tokenizer, split_files(package, split), LENGTH, smollm2.MODELS[self.model_name].end)

    def unseen_blocks(self, package: str, split: str) -> tuple[torch.Tensor, int]:
        """Blocks of a split's files, the same for every run, and the bytes that are predicted in them."""
        blocks = self.blocks_of(package, split)
        drawn = random.Random(0).sample(blocks, min(self.blocks, len(blocks)))
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


def text_bytes(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> int:
    """Bytes of text that tokens stand for; a character that a block cuts in two counts as a few."""
    return len(tokenizer.decode(tokens, skip_special_tokens=True).encode())


def make(home: Path, fast: bool, model: str | None) -> SmolLM2Code:
    quiet()
    model = smollm2.known(model)
    if fast:
        return SmolLM2Code(home, FAST, FAST_PACKAGES, BLOCKS_FAST, model)
    return SmolLM2Code(home, FULL, tuple(PACKAGES), BLOCKS, model)
