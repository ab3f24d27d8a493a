"""What the protocol asks of a world."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from mashup_callback import MashupCallback


ARMS = ("scratch", "mashup", "paper", "best_single", "random", "all", "eva", "lora_ga", "oracle")
# Only where a world has such an adapter.
EVERY_ARM = (*ARMS, "format")


@dataclass(frozen=True)
class Budget:
    """
    How much of the protocol a world runs.

    Args:
        tasks (`tuple[str, ...]`): Tasks that are held out in turn.
        steps (`int`): Optimizer steps of a run, or the most of them where a world runs whole epochs.
        eval_every (`int`): Steps between two points of a curve.
        learning_rate (`float`): Learning rate of every arm in the main table.
        seeds (`tuple[int, ...]`): Seeds of initialisation and data order.
        arms (`tuple[str, ...]`): Arms of the main table.
        learning_rates (`tuple[float, ...]`): The sweep, for scratch and mashup.
        sweep_seeds (`tuple[int, ...]`): Seeds of the sweep and of the two studies below.
        study_tasks (`tuple[str, ...]`): Those of `tasks` in the two studies below; empty: all.
        sample_sizes (`tuple[int, ...]`): Values of `sample_size` for accuracy against the number of selection rows.
        methods (`tuple[str, ...]`): Merge methods of the study of method and k.
        top_ks (`tuple[int, ...]`): Values of k of that study.
        oracle_steps (`int`): Steps after which the oracle compares subsets.
        tuned (`tuple[str, ...]`): Arms whose learning rate is chosen on validation rows, from `learning_rates`; with
            them the main table has each arm at its own rate. The world needs [`World.final`].
    """

    tasks: tuple[str, ...]
    steps: int
    eval_every: int
    learning_rate: float
    seeds: tuple[int, ...] = (1, 2, 3)
    arms: tuple[str, ...] = ARMS
    learning_rates: tuple[float, ...] = ()
    sweep_seeds: tuple[int, ...] = (1,)
    study_tasks: tuple[str, ...] = ()
    sample_sizes: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    top_ks: tuple[int, ...] = ()
    oracle_steps: int = 30
    tuned: tuple[str, ...] = ()


class World(ABC):
    """
    A base model and tasks, each with an adapter of its own in the library.

    Args:
        home (`Path`):
            Where the world keeps what it builds.
        budget (`Budget`):
            How much of the protocol is run.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    rank: ClassVar[int] = 8
    all_arms: ClassVar[tuple[str, ...]] = ARMS

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

    def adapter(self, task: str) -> Path | None:
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

    @abstractmethod
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

    @abstractmethod
    def evaluate(self, model: nn.Module, target: str) -> float:
        """Measures the model on the target's test rows; draws no random number and leaves the model as it was."""

    def final(self, model: nn.Module, target: str) -> dict[str, float]:
        """
        Measures the trained model once more: `validation`, by which a learning rate is chosen, is the metric on rows
        that are neither trained nor tested on; `accuracy`, `chance` and `rows` say whether the task was learned.
        """
        return {}


def silenced(trainer: Trainer) -> Trainer:
    """Removes the callback that prints every log."""
    trainer.remove_callback(PrinterCallback)
    return trainer
