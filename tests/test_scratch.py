"""With the decision scratch, training is bit-identical to training without the callback, however it is set up."""

import itertools
import random
from functools import partial

import numpy as np
import pytest
import torch
from datasets import IterableDataset as Stream
from torch.utils.data import IterableDataset, RandomSampler
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTTrainer

from mashup_callback import MashupCallback
from tests.tiny import llama, lora, losses, rows, save_scaled_adapter, sft_trainer, stream, tokenizer


TOKENS = [{"input_ids": [7 + (i * j) % 80 for j in range(12)], "labels": [7 + i % 80] * 12} for i in range(1, 33)]


class Ups:
    """A metric by which each thing is worse than what was measured before it; fresh comes first."""

    def __init__(self):
        self.calls = itertools.count(1)

    def __call__(self, model, batch):
        return float(next(self.calls)), 1


class Counting:
    """A collator with a generator and a counter of its own."""

    def __init__(self, collate):
        self.collate, self.calls = collate, 0
        self.generator = np.random.default_rng(3)

    def __call__(self, features):
        self.calls += 1
        batch = self.collate(features)
        noise = torch.from_numpy(self.generator.random(batch["labels"].shape)) < 0.1 + 0.01 * (self.calls % 3)
        return batch | {"labels": batch["labels"].masked_fill(noise, -100)}


class Transformed(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        return {name: [*value[: 6 + random.randrange(6)]] for name, value in TOKENS[index].items()}


class Once(IterableDataset):
    def __init__(self):
        self.rows = iter(TOKENS)

    def __iter__(self):
        yield from self.rows


class OwnSampler(SFTTrainer):
    def _get_train_sampler(self, *args):
        return RandomSampler(self.train_dataset, generator=torch.Generator().manual_seed(5))


def sft(trainer=None, **settings):
    def make(directory, callbacks):
        made = sft_trainer(
            directory, callbacks=callbacks, **{n: v() if callable(v) else v for n, v in settings.items()}
        )
        if trainer is not None:
            made.__class__ = trainer
        return made

    return make


def with_collator(wrap, **settings):
    def make(directory, callbacks):
        trainer = sft_trainer(directory, callbacks=callbacks, **settings)
        trainer.data_collator = wrap(trainer.data_collator)
        return trainer

    return make


def in_a_closure(collate):
    generator = torch.Generator().manual_seed(0)
    return lambda features: (
        (batch := collate(features))
        | {"labels": batch["labels"].masked_fill(torch.rand(batch["labels"].shape, generator=generator) < 0.1, -100)}
    )


def with_a_transform():
    data = rows().map(lambda row: tokenizer()(row["text"]), remove_columns=["text"])
    # Rows of another length every time, by the global generator.
    data.set_transform(lambda batch: {"input_ids": [x[: 3 + int(torch.randint(5, ()))] for x in batch["input_ids"]]})
    return data


def plain(directory, callbacks, data=TOKENS, collator=None, model=None, **settings):
    arguments = TrainingArguments(
        str(directory),
        max_steps=3,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        per_device_train_batch_size=4,
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    model = model or llama()
    model.add_adapter(lora(target_modules=["query", "value"] if model.config.model_type == "bert" else None))
    return Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=callbacks)


def bert():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=96, **size))


def masked(seed, data=TOKENS, return_tensors="pt"):
    collator = {"mlm_probability": 0.3, "seed": seed}
    return lambda directory, callbacks: plain(
        directory,
        callbacks,
        [{"input_ids": row["input_ids"]} for row in data],
        DataCollatorForLanguageModeling(tokenizer_with_mask(), **collator),
        bert(),
    )


def tokenizer_with_mask():
    made = tokenizer()
    made.add_special_tokens({"mask_token": "w79"})
    return made


CONFIGURATIONS = {
    "plain": sft(),
    "dropout": sft(peft_config=lambda: lora(lora_dropout=0.3)),
    "rslora": sft(peft_config=lambda: lora(use_rslora=True)),
    "modules_to_save": sft(peft_config=lambda: lora(modules_to_save=["lm_head"])),
    "few layers": sft(peft_config=lambda: lora(target_modules=["q_proj", "v_proj"])),
    "bf16": sft(bf16=True),
    "bf16 weights": sft(model=lambda: llama().bfloat16()),
    "checkpointing": sft(gradient_checkpointing=True),
    "reentrant checkpointing": sft(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "accumulation": sft(gradient_accumulation_steps=2),
    "packing": sft(packing=True, max_length=24),
    "wrapped packing": sft(packing=True, packing_strategy="wrapped", max_length=24),
    "workers": sft(dataloader_num_workers=1),
    "group by length": sft(train_sampling_strategy="group_by_length"),
    "sampler in order": sft(train_sampling_strategy="sequential"),
    "prompt and completion": sft(train_rows=lambda: rows("prompt_completion")),
    "assistant only": sft(train_rows=lambda: rows("chat"), assistant_only_loss=True),
    "neftune": sft(neftune_noise_alpha=5.0),
    "label smoothing": lambda d, c: plain(d, c, label_smoothing_factor=0.1),
    "own generator in the sampler": sft(trainer=OwnSampler),
    "streaming": sft(train_rows=stream),
    "shuffled streaming": sft(train_rows=lambda: stream().shuffle(seed=1, buffer_size=8)),
    "stream of a function": lambda d, c: plain(d, c, Stream.from_generator(lambda: iter(TOKENS))),
    "one-shot stream": lambda d, c: plain(d, c, Once()),
    "random rows": lambda d, c: plain(d, c, Transformed(), with_padding()),
    "set_transform": lambda d, c: plain(d, c, with_a_transform(), causal(), remove_unused_columns=False),
    "masks of the global generator": masked(None),
    "masks of a seed": masked(1),
    "collator with a state": with_collator(Counting),
    "collator with a closure": with_collator(in_a_closure),
    "cosine schedule and warm-up": sft(lr_scheduler_type="cosine", warmup_steps=1),
    "adafactor": sft(optim="adafactor"),
    "another seed of the data": lambda d, c: plain(d, c, data_seed=7),
}


ON_TOKENS = {"label smoothing", "stream of a function", "one-shot stream", "random rows", "another seed of the data"}


def causal():
    return DataCollatorForLanguageModeling(tokenizer(), mlm=False)


def with_padding():
    def collate(features):
        length = max(len(row["input_ids"]) for row in features)
        fill = {"input_ids": 0, "labels": -100}
        return {
            name: torch.tensor([[*row[name], *[value] * length][:length] for row in features])
            for name, value in fill.items()
        }

    return collate


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Adapters that have unlearned what each kind of data teaches."""
    directory = tmp_path_factory.mktemp("library")
    for kind, make in {"text": sft(), "tokens": plain, "masks": masked(None)}.items():
        trainer = make(directory / "out", [])
        trainer.args.max_steps = 20
        trainer.train()
        trainer.model.save_pretrained(directory / kind)
        for factor in (-0.5, -1.0):
            save_scaled_adapter(directory / f"{kind}-{-factor:g}", directory / kind, factor)
    return directory


def kind_of(name):
    if name.startswith("masks"):
        return "masks"
    return "tokens" if name in ON_TOKENS else "text"


def seeded(make):
    def made(directory, callbacks):
        # A fresh adapter is drawn before the Trainer sets its seed.
        torch.manual_seed(0)
        return make(directory, callbacks)

    return made


def trained(trainer):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    trainer.train()
    values = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    return losses(trainer), values, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_scratch_is_training_without_the_callback(tmp_path, library, name):
    make = seeded(CONFIGURATIONS[name])
    alone = trained(make(tmp_path / "alone", []))
    assert len(alone[0]) == 3
    for settings in ({}, {"metric": Ups()}):
        callback = MashupCallback(
            str(library / f"{kind_of(name)}-*"), sample_size=16, top_k=2, on_error="raise", **settings
        )
        run = trained(make(tmp_path / "run", [callback]))
        report = callback.report
        assert report.decision == "scratch" and "nothing is better" in report.reason
        assert report.merged_loss > report.base_loss and report.sample["selection"] > 0
        assert run[0] == alone[0] and run[3:] == alone[3:] and torch.equal(run[2], alone[2])
        assert run[1].keys() == alone[1].keys()
        assert all(torch.equal(value, alone[1][key]) for key, value in run[1].items())


def test_a_stream_that_cannot_start_over_is_left_alone(tmp_path, library):
    def make(callbacks):
        data = Once()
        data.rows = (row for row in TOKENS)
        return seeded(partial(plain, data=data))(tmp_path / "out", callbacks)

    callback = MashupCallback(str(library / "tokens-*"), sample_size=16)
    run, alone = trained(make([callback])), trained(make([]))
    assert callback.report.decision == "scratch" and "can be read once" in callback.report.reason
    assert run[0] == alone[0]
    assert all(torch.equal(value, alone[1][key]) for key, value in run[1].items())
