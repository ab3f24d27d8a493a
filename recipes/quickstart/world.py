"""A small world for offline experiments: a character-level Llama and eight multiple-choice tasks.

Every task asks for the letter of the right option ("largest A 12 B 45 C 30 D 27 =" -> "B"): adapters share the answer
format and differ in skill. The base model has read statements about some of the skills ("largest 12 45 30 = 45") and
has looked options up, but it has never answered a question with a letter. All text is generated, nothing downloaded.
"""

import random
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from trl import SFTConfig


BASE = Path(__file__).parent / "base"
ADAPTERS = Path(__file__).parent / "adapters"
BASE_NAME = "mashup-callback/quickstart-base"

LETTERS = "ABCD"
ALPHABET = "abcdefghij"
CHARACTERS = " \n" + "abcdefghijklmnopqrstuvwxyz" + LETTERS + "0123456789" + "+=:?"
PAD, EOS = "<pad>", "<eos>"
CENTRE = 35

HIDDEN_SIZE, LAYERS, HEADS, CONTEXT = 128, 4, 4, 256
PRETRAIN_STEPS, PRETRAIN_ROWS, PRETRAIN_LENGTH, PRETRAIN_LEARNING_RATE = 2500, 64, 96, 2e-3
STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, RANK = 150, 32, 3e-3, 15, 8
TRAIN_ROWS, TEST_ROWS = STEPS * BATCH_SIZE, 512
# No progress bars, trackers or checkpoints.
QUIET = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}


def word(rng: random.Random) -> str:
    return "".join(rng.choices(ALPHABET, k=3))


def words(rng: random.Random, count: int, accept: Callable[[str], bool] = lambda _: True) -> list[str]:
    """Draws distinct words of three letters that `accept` lets through."""
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = word(rng)
        if accept(drawn):
            found[drawn] = None
    return list(found)


def numbers(rng: random.Random, count: int) -> list[int]:
    """Draws distinct numbers of two digits."""
    return rng.sample(range(10, 60), count)


def listed(options: list) -> str:
    return " ".join(f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=True))


def question(rng: random.Random, text: str, right: int | str, wrong: list) -> tuple[str, str]:
    """Shuffles the options behind letters: the prompt and its answer letter."""
    options = [right, *wrong]
    rng.shuffle(options)
    return f"{text} {listed(options)} =", LETTERS[options.index(right)]


def largest(rng: random.Random) -> tuple[str, str]:
    *wrong, right = sorted(numbers(rng, 4))
    return question(rng, "largest", right, wrong)


def smallest(rng: random.Random) -> tuple[str, str]:
    right, *wrong = sorted(numbers(rng, 4))
    return question(rng, "smallest", right, wrong)


def nearest(rng: random.Random) -> tuple[str, str]:
    """The number closest to `CENTRE`, by a margin of three at least."""
    while True:
        right, *wrong = sorted(numbers(rng, 4), key=lambda number: abs(number - CENTRE))
        if abs(wrong[0] - CENTRE) - abs(right - CENTRE) >= 3:
            return question(rng, "nearest", right, wrong)


def units(rng: random.Random) -> tuple[str, str]:
    """The number whose last digit is the largest."""
    *wrong, right = sorted(
        (10 * rng.randint(1, 5) + digit for digit in rng.sample(range(10), 4)), key=lambda n: n % 10
    )
    return question(rng, "units", right, wrong)


def first(rng: random.Random) -> tuple[str, str]:
    """The word that a dictionary lists first."""
    right, *wrong = sorted(words(rng, 4))
    return question(rng, "first", right, wrong)


def last(rng: random.Random) -> tuple[str, str]:
    """The word that a dictionary lists last."""
    *wrong, right = sorted(words(rng, 4))
    return question(rng, "last", right, wrong)


def rising(rng: random.Random) -> tuple[str, str]:
    """The only word whose letters are in the alphabet's order."""
    (right,) = words(rng, 1, lambda w: w[0] < w[1] < w[2])
    return question(rng, "rising", right, words(rng, 3, lambda w: not w[0] < w[1] < w[2]))


def ending(rng: random.Random) -> tuple[str, str]:
    """The word whose last letter comes first in the alphabet."""
    letters = sorted(rng.sample(ALPHABET, 4))
    right, *wrong = [word(rng)[:2] + letter for letter in letters]
    return question(rng, "ending", right, wrong)


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    task.__name__: task for task in (largest, smallest, nearest, units, first, last, rising, ending)
}


def fact(rng: random.Random, kind: str) -> str:
    """One sentence about a skill, without options or letters."""
    if kind in ("largest", "smallest"):
        found = numbers(rng, 3)
        return f"{kind} {' '.join(map(str, found))} = {max(found) if kind == 'largest' else min(found)}"
    if kind in ("first", "last"):
        found = words(rng, 3)
        return f"{kind} {' '.join(found)} = {max(found) if kind == 'last' else min(found)}"
    if kind == "odd":
        number = rng.randrange(10, 60)
        return f"{number} {'odd' if number % 2 else 'even'}"
    if kind == "next":
        step, start = rng.randint(1, 9), rng.randint(10, 32)
        return f"next {start} {start + step} {start + 2 * step} = {start + 3 * step}"
    source = word(rng)
    return f"{source} has {rng.choice(source)}" if kind == "has" else f"reverse {source} = {source[::-1]}"


def lookup(rng: random.Random) -> str:
    """A list of options and one of them looked up, by its letter or by its value."""
    options = words(rng, 4) if rng.random() < 0.5 else numbers(rng, 4)
    place = rng.randrange(4)
    pair = (LETTERS[place], options[place]) if rng.random() < 0.5 else (options[place], LETTERS[place])
    return f"{listed(options)} : {pair[0]} = {pair[1]}"


def statement(rng: random.Random) -> str:
    """One document of the pre-training text."""
    facts = ["largest", "smallest", "odd", "next", "first", "last", "has", "reverse"]
    kind = rng.choice([*facts, "lookup", "lookup", "lookup"])
    return lookup(rng) if kind == "lookup" else fact(rng, kind)


def rows(task: str, n: int, seed: int, split: str = "train") -> Dataset:
    """
    Draws questions of one task, with the columns `prompt` and `completion` (one letter). A prompt's checksum fixes
    its split, so no test prompt is ever trained on, whatever the seeds.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    rng = random.Random(f"{task} {seed}")
    drawn = []
    while len(drawn) < n:
        prompt, completion = TASKS[task](rng)
        if (zlib.crc32(prompt.encode()) % 8 == 0) == (split == "test"):
            drawn.append({"prompt": prompt, "completion": completion})
    return Dataset.from_list(drawn)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: one token a character, `<pad>` and `<eos>`."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS])}
    # Byte-pair encoding without merges splits text into characters.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_max_length=CONTEXT)


def build_model(tokenizer: PreTrainedTokenizerFast, **sizes: int) -> LlamaForCausalLM:
    """Builds the base model with fresh weights, drawn from the global generator."""
    own = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 3 * HIDDEN_SIZE, "num_hidden_layers": LAYERS}
    own |= {"num_attention_heads": HEADS, "max_position_embeddings": CONTEXT, "vocab_size": len(tokenizer)}
    own |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(**(own | sizes), tie_word_embeddings=True))


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Loads the committed tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(BASE)


def load_model() -> LlamaForCausalLM:
    """Loads the committed base model in float32, under the name that its adapters record."""
    model = LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model.name_or_path = model.config._name_or_path = BASE_NAME
    return model


def lora_config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def training_arguments(output_dir: str | Path, seed: int, **settings) -> SFTConfig:
    """
    The hyper-parameters that every adapter of this world is trained with. The seed is that of the data order; the
    adapter is drawn before, so call `transformers.set_seed` first.
    """
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP_STEPS,
        "completion_only_loss": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        **QUIET,
    }
    return SFTConfig(output_dir=str(output_dir), seed=seed, **(defaults | settings))


@torch.no_grad()
def answered(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, dataset: Dataset, batch_size: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns the logits of the token after each prompt, and the token of the right letter. The training mode is
    restored, and no random number is drawn.
    """
    was_training, found = model.training, []
    model.eval()
    for start in range(0, len(dataset), batch_size):
        prompts = dataset[start : start + batch_size]["prompt"]
        inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        found.append(model(inputs.input_ids, attention_mask=inputs.attention_mask, logits_to_keep=1).logits[:, -1])
    model.train(was_training)
    return torch.cat(found), torch.tensor(tokenizer.convert_tokens_to_ids(dataset["completion"]))


def accuracy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, dataset: Dataset) -> float:
    """Share of rows whose answer letter is the model's most likely next token after the prompt; 0.25 is chance."""
    logits, answers = answered(model, tokenizer, dataset)
    return (logits.argmax(-1) == answers).sum().item() / len(dataset)


def quiet() -> None:
    """Turns progress bars off, so that a recipe's own lines can be read."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
