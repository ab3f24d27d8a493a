"""What the protocol asks of a world."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from mashup_callback import MashupCallback

from ...quickstart.world import QUIET


ARMS = ("scratch", "mashup", "paper", "best_single", "random", "all", "eva", "lora_ga", "oracle")
# Only where a world has such an adapter.
EVERY_ARM = (*ARMS, "format")


@dataclass(frozen=True)
class Budget:
    """How much of the protocol a world runs."""

    # Tasks that are held out in turn.
    tasks: tuple[str, ...]
    # Optimizer steps of a run, or the most of them where a world runs whole epochs.
    steps: int
    eval_every: int
    # Of every arm in the main table.
    learning_rate: float
    # Of the library's adapters; None: as above.
    library_steps: int | None = None
    library_rate: float | None = None
    # Of initialization and data order.
    seeds: tuple[int, ...] = (1, 2, 3)
    arms: tuple[str, ...] = ARMS
    # The sweep, and the seeds of it and of the two studies below.
    learning_rates: tuple[float, ...] = ()
    sweep_seeds: tuple[int, ...] = (1,)
    # Those of `tasks` in the studies of `sample_size` and of merge method and k; empty: all.
    study_tasks: tuple[str, ...] = ()
    sample_sizes: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    top_ks: tuple[int, ...] = ()
    # Steps after which the oracle compares subsets.
    oracle_steps: int = 30
    # Arms that have the learning rate which is best on validation rows in the main table; they need `World.final`.
    tuned: tuple[str, ...] = ()


class World(ABC):
    """A base model and tasks, each with an adapter of its own in the library below `home`, trained by TRL."""

    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    rank: ClassVar[int] = 8
    batch_size: ClassVar[int]
    length: ClassVar[int]
    all_arms: ClassVar[tuple[str, ...]] = ARMS
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, home: Path, budget: Budget) -> None:
        self.home, self.budget = home, budget
        self.library_tasks = self.all_tasks(budget)

    def all_tasks(self, budget: Budget) -> tuple[str, ...]:
        """Tasks with an adapter in the library; those that are held out are among them."""
        return budget.tasks

    def controls(self) -> tuple[str, ...]:
        """Adapters that the protocol trains besides the library, for the arms that need them."""
        return ()

    def steps(self, task: str) -> int:
        """Optimizer steps of a run on the task."""
        return self.budget.steps

    def prepare(self) -> None:  # noqa: B027 (most worlds have nothing to prepare)
        """Builds what is missing and cannot be trained by the protocol, such as a base model."""

    def adapter(self, task: str) -> Path:
        """Directory of the task's adapter in the library, which the protocol trains where it is missing."""
        return self.home / "library" / task

    def candidates(self, target: str) -> list[str]:
        """What the callback is given for a target: the adapters of all other tasks."""
        return [str(self.adapter(task)) for task in self.library_tasks if task != target]

    def save_adapter(self, model: nn.Module, directory: Path) -> None:
        """Saves a trained adapter where the library wants it."""
        model.save_pretrained(directory, save_embedding_layers=False)

    def mashup(self, target: str, candidates: Sequence[str] | None = None, **settings: Any) -> MashupCallback:
        """The callback for a target. A stage that fails must stop the experiment, not look like scratch."""
        found = self.candidates(target) if candidates is None else list(candidates)
        return MashupCallback(found, **{"on_error": "raise", "seed": 42, **settings})

    def lora_config(self, **settings: Any) -> LoraConfig | None:
        """The trainee's LoRA configuration; None where all weights are trained."""
        defaults = {"r": self.rank, "lora_alpha": 2 * self.rank, "target_modules": "all-linear"}
        return LoraConfig(**{**defaults, "task_type": "CAUSAL_LM", **settings})

    @abstractmethod
    def base_model(self) -> nn.Module:
        """Loads the base model."""

    def train_rows(self, target: str, seed: int, steps: int) -> Dataset:
        """The rows of a run."""
        raise NotImplementedError

    def arguments(self, output_dir: Path, seed: int, steps: int, learning_rate: float, **settings: Any) -> SFTConfig:
        """The hyper-parameters that every adapter of the world shares."""
        shared = {"lr_scheduler_type": "cosine", "warmup_steps": max(1, steps // 10), "max_steps": steps, **QUIET}
        shared |= {"per_device_train_batch_size": self.batch_size, "max_length": self.length}
        shared |= {"learning_rate": learning_rate, "gradient_checkpointing": False, "bf16": False, **settings}
        return SFTConfig(output_dir=str(output_dir), seed=seed, **shared)

    def trainer(
        self,
        model: nn.Module,
        target: str,
        seed: int,
        output_dir: Path,
        *,
        steps: int,
        learning_rate: float,
        callbacks: Sequence[TrainerCallback] = (),
        peft_config: LoraConfig | None = None,
    ) -> Trainer:
        """Makes the Trainer that a user would make for the target."""
        trainer = SFTTrainer(
            model,
            args=self.arguments(output_dir, seed, steps, learning_rate),
            train_dataset=self.train_rows(target, seed, steps),
            processing_class=self.tokenizer,
            peft_config=peft_config,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    @abstractmethod
    def evaluate(self, model: nn.Module, target: str) -> float:
        """Measures the model on the target's test rows; draws no random number and leaves the model as it was."""

    def final(self, model: nn.Module, target: str) -> dict[str, float]:
        """
        Measures the trained model once more: `validation`, by which a learning rate is chosen, is the metric on rows
        that are neither trained nor tested on; `accuracy`, `chance` and `rows` say whether the task was learned.
        """
        return {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, for a while."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)
