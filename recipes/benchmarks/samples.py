"""Rows as a Trainer sees them."""

import tempfile

from transformers import Trainer
from trl import SFTTrainer

from mashup_callback.scoring import Sample, draw_sample
from recipes.quickstart import world


def sample_of(trainer: Trainer, size: int, **settings: int) -> Sample:
    """Draws rows from what a Trainer trains on."""
    loader = trainer.get_train_dataloader()
    return draw_sample(loader, size, batch_size=trainer.args.train_batch_size, **settings)


def quickstart_rows(task: str, count: int, split: str = "train", **settings: int) -> Sample:
    """Rows of one of the quickstart's tasks, half of them held out."""
    world.quiet()
    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            world.load_model(),
            args=world.training_arguments(directory, 0, **settings),
            train_dataset=world.rows(task, count, 0, split),
            processing_class=world.load_tokenizer(),
        )
        return sample_of(trainer, count)
