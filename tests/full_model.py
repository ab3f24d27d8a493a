"""Full checkpoints of the tiny model, and a Trainer that trains all of its weights."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.tiny import llama, rows, tokenizer, trainer_settings


def save_full(directory: Path, seed: int, steps: int = 30, tied: bool = False, **settings: Any) -> Path:
    """Saves the tiny model after some training, in several shards."""
    model = llama(tie_word_embeddings=tied, **settings)
    trainer = full_trainer(
        Path(directory).with_name("training"),
        model=model,
        train_rows=rows("text", 64, seed=100 + seed),
        max_steps=steps,
        learning_rate=3e-3,
    )
    trainer.train()
    model.save_pretrained(directory, max_shard_size="20KB")
    tokenizer().save_pretrained(directory)
    return Path(directory)


def save_models(directory: Path, count: int, **settings: Any) -> Path:
    """Saves several of them as `model-<seed>`, each after training of its own."""
    for seed in range(count):
        save_full(directory / f"model-{seed}", seed, **settings)
    return directory


def full_trainer(
    output_dir: Path,
    *,
    callbacks: list[TrainerCallback] | None = None,
    model: LlamaForCausalLM | None = None,
    train_rows: Any = None,
    **settings: Any,
) -> SFTTrainer:
    return SFTTrainer(
        model=llama() if model is None else model,
        args=SFTConfig(**trainer_settings(output_dir, **{"learning_rate": 1e-4, **settings})),
        train_dataset=rows() if train_rows is None else train_rows,
        processing_class=tokenizer(),
        callbacks=callbacks or [],
    )


def trained_full(output_dir: Path, *callbacks: TrainerCallback, **settings: Any) -> SFTTrainer:
    """The trainer of [`full_trainer`] after its run."""
    trainer = full_trainer(output_dir, callbacks=[*callbacks], **settings)
    trainer.train()
    return trainer


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def run_mergekit(recipes):
    """Runs mergekit's command on recipes in a process of its own."""
    code = (
        "import sys; from mergekit.scripts.run_yaml import main\n"
        "for recipe in sys.argv[1:]: main([recipe, recipe + '.out', '--random-seed', '42'], standalone_mode=False)"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, recipes)], check=True, capture_output=True)
