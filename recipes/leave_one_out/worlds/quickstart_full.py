"""The quickstart's small world with all weights trained: the library holds full checkpoints."""

from dataclasses import replace
from pathlib import Path

from ...quickstart import world
from .base import Budget, World
from .quickstart import TASKS, Quickstart, _tokenizer


# The other arms initialize or imitate a LoRA adapter, of which there is none here.
ARMS = ("scratch", "mashup", "best_single", "all")
RATES = (3e-4, 1e-3, 3e-3)
FULL = Budget(TASKS, world.STEPS, eval_every=10, learning_rate=1e-3, arms=ARMS, learning_rates=RATES)
FAST = replace(FULL, tasks=("largest", "last"), steps=60, seeds=(1,), learning_rates=())


class QuickstartFull(Quickstart):
    """Multiple choice by letter, all weights trained; the metric is the test accuracy."""

    name = "quickstart_full"
    all_arms = ARMS
    # The library is trained by the protocol, as in most worlds; the quickstart's own holds LoRA adapters.
    adapter = World.adapter

    def lora_config(self, **settings) -> None:
        return None

    def save_adapter(self, model, directory):
        model.save_pretrained(directory)
        # Tells the callback which tokens the rows of the embeddings are.
        _tokenizer().save_pretrained(directory)


def make(home: Path, fast: bool, model: str | None) -> QuickstartFull:
    return QuickstartFull(home, FAST if fast else FULL)
