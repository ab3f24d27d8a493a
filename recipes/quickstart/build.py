"""Builds the small world's artefacts: the base model, its tokenizer and one LoRA adapter a task.

python recipes/quickstart/build.py                        # about 25 minutes on two cores
python recipes/quickstart/build.py --tasks first last     # these adapters only, on the committed base
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from itertools import islice

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import SFTTrainer

from recipes.quickstart import world


TEST_SEED = 0
FILES = ("adapter_model.safetensors", "adapter_config.json")


def token_blocks(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Yields batches of packed statements, `<eos>` between them, of shape `(rows, length)`."""
    rng, stream = random.Random(seed), []
    size = world.PRETRAIN_ROWS * world.PRETRAIN_LENGTH
    while True:
        while len(stream) < size:
            stream += tokenizer.encode(world.statement(rng) + world.EOS)
        yield torch.tensor(stream[:size]).view(world.PRETRAIN_ROWS, world.PRETRAIN_LENGTH)
        stream = stream[size:]


def pretrain(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """Trains the base model on generated text and rounds its weights to bfloat16."""
    set_seed(seed)
    model = world.build_model(tokenizer)
    peak, steps = world.PRETRAIN_LEARNING_RATE, world.PRETRAIN_STEPS
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    for step, tokens in enumerate(islice(token_blocks(tokenizer, seed), steps)):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"pre-training step {step}: loss {loss.item():.4f}", flush=True)
    return model.to(torch.bfloat16)


def train_adapter(task: str, seed: int) -> float:
    """Trains and saves one task's adapter from its own seed and returns its test accuracy."""
    tokenizer = world.load_tokenizer()
    set_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            world.load_model(),
            args=world.training_arguments(scratch, seed),
            train_dataset=world.rows(task, world.TRAIN_ROWS, seed),
            processing_class=tokenizer,
            peft_config=world.lora_config(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    folder = world.ADAPTERS / task
    trainer.model.save_pretrained(folder, save_embedding_layers=False)
    for path in folder.iterdir():
        if path.name not in FILES:
            path.unlink()
    return world.accuracy(trainer.model, tokenizer, world.rows(task, world.TEST_ROWS, TEST_SEED, "test"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(world.TASKS), help="rebuild these adapters only")
    tasks = parser.parse_args().tasks
    world.quiet()
    if tasks is None:
        tokenizer = world.build_tokenizer()
        pretrain(tokenizer).save_pretrained(world.BASE)
        tokenizer.save_pretrained(world.BASE)
    for task in tasks or world.TASKS:
        seed = 101 + list(world.TASKS).index(task)
        print(f"{task}: seed {seed}, test accuracy {train_adapter(task, seed):.3f}", flush=True)


if __name__ == "__main__":
    main()
