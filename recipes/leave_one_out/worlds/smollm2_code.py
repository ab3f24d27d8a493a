"""A real language model on real code: SmolLM2-135M-Instruct learns the style of eight packages, unlike each other."""

import importlib.util
import random
from pathlib import Path

from . import smollm2
from .base import Budget
from .sources import LEFT_OUT, largest_first
from .text import Text


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
TASKS, RATES, SEEDS = tuple(PACKAGES)[:4], (1e-3, 2e-3, 4e-3), (1, 2)
# Past runs that were tuned and finished: the rate that is best from scratch, twice the steps.
LIBRARY = {"library_steps": 48, "library_rate": 4e-3}
FULL = Budget(
    TASKS, 24, eval_every=6, learning_rate=1e-3, seeds=SEEDS, arms=ARMS, learning_rates=RATES, tuned=ARMS, **LIBRARY
)
FAST = Budget(("asyncio",), 12, eval_every=4, learning_rate=2e-3, seeds=(1,), arms=("scratch", "mashup", "random"))
FAST_PACKAGES = ("asyncio", "email", "mpmath", "networkx")
BLOCKS, BLOCKS_FAST = 16, 8


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


class SmolLM2Code(Text, smollm2.SmolLM2):
    """Language modeling of a package's sources; unseen files are split once more, to choose a learning rate."""

    name = "smollm2_code"
    batch_size, length = BATCH_SIZE, LENGTH
    split_files = staticmethod(split_files)

    def final(self, model, target):
        return {"validation": self.nll(model, target, "validation")}


def make(home: Path, fast: bool, model: str | None) -> SmolLM2Code:
    sizes = (FAST, FAST_PACKAGES, BLOCKS_FAST) if fast else (FULL, tuple(PACKAGES), BLOCKS)
    return SmolLM2Code(home, *sizes, model)
