"""Tiny models, tokenizers, data sets and trainers built from configurations, for tests on a CPU without a network."""

import gc
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer


# A Trainer collects garbage as it begins and ends, which takes seconds where it looks through all of the libraries.
gc.freeze()
WORDS = 80
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' <|end|> ' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' <|end|> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    vocabulary = {word: index for index, word in enumerate(special + [f"w{i}" for i in range(WORDS)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
    )


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    config = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**config, **settings}))
    torch.set_rng_state(state)
    return model


def rows(kind: str = "text", count: int = 32, seed: int = 0, columns: int = 2) -> Dataset:
    """Rows of one of the forms that SFTTrainer takes: `text`, `prompt_completion` or `chat`."""
    generator = random.Random(seed)

    def words(low: int, high: int) -> str:
        # Each word follows from the one before, so that an adapter has something to learn.
        start = generator.randrange(WORDS)
        return " ".join(f"w{(start + 7 * i) % WORDS}" for i in range(generator.randrange(low, high)))

    pairs = [(words(3, 10), words(4, 14)) for _ in range(count)]
    if kind == "text":
        return Dataset.from_list([{"text": f"{a} {b}"} for a, b in pairs])
    if kind == "prompt_completion":
        return Dataset.from_list([{"prompt": f"{a} ", "completion": b} for a, b in pairs])
    roles = ("user", "assistant")
    return Dataset.from_list(
        [
            {"messages": [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]}
            for pair in pairs
        ]
    )


def preferences(count: int = 24) -> Dataset:
    """Rows that DPO and its relatives take."""
    prompts = [f"w{i % 7} w{i % 5} " for i in range(count)]
    return Dataset.from_list(
        [{"prompt": p, "chosen": "w1 w2 w3", "rejected": f"w{9 + i % 9} w8"} for i, p in enumerate(prompts)]
    )


def stream(kind: str = "text", count: int = 32, seed: int = 0) -> IterableDataset:
    return rows(kind, count, seed).to_iterable_dataset()


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings})


def save_random_adapter(
    directory: Path, seed: int, scale: float = 0.2, base: LlamaForCausalLM | None = None, **settings: Any
) -> Path:
    """Saves an adapter with random factors, as peft saves it."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = get_peft_model(base or llama(), lora(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn_like(parameter))
    model.save_pretrained(directory, save_embedding_layers=False)
    torch.set_rng_state(state)
    return Path(directory)


def save_trained_adapter(directory: Path, seed: int, steps: int = 30, **settings: Any) -> Path:
    """Saves an adapter trained on rows like those of [`rows`]."""
    set_seed(seed)
    trainer = sft_trainer(
        Path(directory).with_name("training"),
        train_rows=rows("text", 64, seed=100 + seed),
        max_steps=steps,
        **settings,
    )
    trainer.train()
    trainer.model.save_pretrained(directory)
    return Path(directory)


def save_scaled_adapter(directory: Path, source: Path, factor: float) -> Path:
    """Saves an adapter whose update is that of another one times a factor; a negative one unlearns."""
    shutil.copytree(source, directory)
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(
        {name: factor * value if "lora_B" in name else value for name, value in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    return Path(directory)


def run_settings(output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a short run on a CPU that logs the loss of every step, with some of them changed."""
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "log_level": "warning",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    return {**settings, **changes}


def trainer_settings(output_dir: Path, **changes: Any) -> dict[str, Any]:
    """The same of a trainer that cuts its rows."""
    return run_settings(output_dir, **{"max_length": 32, **changes})


def sft_trainer(
    output_dir: Path,
    *,
    callbacks: list[TrainerCallback] | None = None,
    model: Any = None,
    train_rows: Any = None,
    peft_config: LoraConfig | None = None,
    **settings: Any,
) -> SFTTrainer:
    model = llama() if model is None else model
    has_adapter = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    args = SFTConfig(**trainer_settings(output_dir, **settings))
    # As newer releases of trl do, before the adapter is drawn.
    set_seed(args.seed)
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows() if train_rows is None else train_rows,
        processing_class=tokenizer(),
        peft_config=None if has_adapter else (peft_config or lora()),
        callbacks=callbacks or [],
    )


def trained(output_dir: Path, *callbacks: TrainerCallback, **settings: Any) -> SFTTrainer:
    """The trainer of [`sft_trainer`] after its run."""
    trainer = sft_trainer(output_dir, callbacks=[*callbacks], **settings)
    trainer.train()
    return trainer


def losses(trainer: SFTTrainer) -> list[float]:
    """The training losses that the Trainer logged, step by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def lora_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}
