"""Trainers whose batches do not give the loss: their own loss, the user's score, or a clear error."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from mashup_callback import MashupCallback
from tests.full_model import same
from tests.lora.variants import MODELS
from tests.tiny import (
    llama,
    lora,
    lora_parameters,
    losses,
    preferences,
    rows,
    run_settings,
    save_random_adapter,
    save_scaled_adapter,
    tokenizer,
    trainer_settings,
)


def maker(trainer_class, config_class, data=preferences):
    """Returns what makes a trainer of preferences."""

    def make(output_dir, callbacks=()):
        return trainer_class(
            llama(),
            args=config_class(**trainer_settings(output_dir, max_steps=2)),
            train_dataset=data(),
            processing_class=tokenizer(),
            peft_config=lora(),
            callbacks=list(callbacks),
        )

    return make


def labelled():
    """The preferences row by row, as KTO takes them."""
    pairs = [(row, kind) for row in preferences() for kind in ("chosen", "rejected")]
    return Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"} for row, kind in pairs]
    )


MAKERS = {"kto": maker(KTOTrainer, KTOConfig, labelled), "dpo": maker(DPOTrainer, DPOConfig)}
# These compare the model with no other.
MAKERS |= {"orpo": maker(ORPOTrainer, ORPOConfig), "cpo": maker(CPOTrainer, CPOConfig)}
dpo = MAKERS["dpo"]


@pytest.fixture(scope="module")
def preferring(tmp_path_factory):
    """An adapter that DPO trained on the preferences, and its opposite."""
    directory = tmp_path_factory.mktemp("preferring")
    trainer = dpo(directory / "training")
    trainer.args.max_steps = 12
    trainer.train()
    trainer.model.save_pretrained(directory / "runs/good")
    save_scaled_adapter(directory / "runs/bad", directory / "runs/good", -1.0)
    return directory / "runs"


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_bound_trainer_ranks_by_its_own_loss(tmp_path, preferring, make):
    callback = MashupCallback(str(preferring / "*"), top_k=1, on_error="raise")
    trainer = make(tmp_path / "out", [callback])
    callback.bind(trainer)
    trainer.train()
    fresh = make(tmp_path / "fresh")
    fresh.train()
    assert callback.report.decision == "single"
    assert callback.report.candidates[0].name.endswith("good")
    assert callback.report.base_loss == pytest.approx(losses(fresh)[0], abs=0.02)
    assert callback.report.single_loss < callback.report.base_loss - 0.02
    assert losses(trainer)[0] == pytest.approx(callback.report.single_loss, abs=0.1)
    card = (tmp_path / "out/mashup/README.md").read_text()
    assert f"loss of {type(trainer).__name__}" in card and "token" not in card


def test_bound_trainer_leaves_no_trace_with_scratch(tmp_path, preferring):
    callback = MashupCallback(str(preferring / "bad"))
    trainer = dpo(tmp_path / "out", [callback])
    callback.bind(trainer)
    trainer.train()
    alone = dpo(tmp_path / "alone")
    alone.train()
    assert callback.report.decision == "scratch", callback.report.reason
    timeless = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time", "total_flos")

    def logged(trainer):
        entries = [entry for entry in trainer.state.log_history if "mashup/seconds" not in entry]
        return [{key: value for key, value in entry.items() if key not in timeless} for entry in entries]

    assert logged(trainer) == logged(alone)
    assert same(lora_parameters(trainer.model), lora_parameters(alone.model))


def test_unbound_trainer_says_what_to_do(tmp_path, preferring):
    trainer = dpo(tmp_path / "out", [MashupCallback(str(preferring / "*"))])
    with pytest.raises(ValueError, match=r"callback\.bind\(trainer\)"):
        trainer.train()


def grpo(output_dir, callback):
    return GRPOTrainer(
        llama(),
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=GRPOConfig(**run_settings(output_dir, max_steps=2, num_generations=4, max_completion_length=4)),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in preferences(32)]),
        processing_class=tokenizer(),
        peft_config=lora(),
        callbacks=[callback],
    )


def test_grpo_ranks_by_score(tmp_path, preferring):
    seen = []

    def score(model, batch):
        seen.append(batch)
        tokens = tokenizer()([row["prompt"] for row in batch], return_tensors="pt", padding=True)
        return model(tokens.input_ids, attention_mask=tokens.attention_mask).logits[:, -1, 8].mean()

    callback = MashupCallback(str(preferring / "*"), score=score, top_k=1, on_error="raise")
    grpo(tmp_path / "out", callback).train()
    report = callback.report
    assert seen and report.candidates[0].loss < report.candidates[1].loss
    assert report.decision == "single" and report.single_loss < report.base_loss


def test_grpo_without_score_is_a_clear_error(tmp_path, preferring):
    with pytest.raises(ValueError, match="score="):
        grpo(tmp_path / "out", MashupCallback(str(preferring / "*"))).train()


def test_sequence_to_sequence(tmp_path):
    t5, _ = MODELS["t5"]
    config = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    for seed in range(3):
        save_random_adapter(tmp_path / "runs" / str(seed), seed, scale=1.0, base=t5(), **config)
    tokens = [{"input_ids": list(range(7, 20)), "labels": list(range(i, i + 6))} for i in range(10, 42)]
    callback = MashupCallback(str(tmp_path / "runs/*"), on_error="raise", guard=False)
    trainer = Trainer(
        get_peft_model(t5(), lora(**config)),
        TrainingArguments(**run_settings(tmp_path / "out", max_steps=2)),
        train_dataset=tokens,
        callbacks=[callback],
    )
    trainer.train()
    assert [row.status for row in callback.report.candidates] == ["scored"] * 3
    assert losses(trainer)[0] == pytest.approx(callback.report.merged_loss, abs=0.3)


class AtBeginning(TrainerCallback):
    """Keeps what the adapter holds when training begins, trial by trial."""

    def __init__(self):
        self.held = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.held.append((lora_parameters(model), args.learning_rate))


def test_every_trial_of_a_hyperparameter_search_starts_from_a_mashup(tmp_path, library):
    pytest.importorskip("optuna")
    fresh = []

    def model_init(trial=None):
        model = get_peft_model(llama(), lora())
        fresh.append(lora_parameters(model))
        return model

    tokens = rows().map(lambda row: {"input_ids": tokenizer()(row["text"])["input_ids"]}, remove_columns=["text"])
    tokens = tokens.map(lambda row: {"labels": row["input_ids"]})
    callback, beginning = MashupCallback(str(library / "trained-*"), on_error="raise"), AtBeginning()
    trainer = Trainer(
        model_init=model_init,
        args=TrainingArguments(**run_settings(tmp_path / "out", max_steps=2)),
        train_dataset=tokens,
        eval_dataset=tokens,
        data_collator=DataCollatorForSeq2Seq(tokenizer()),
        callbacks=[callback, beginning],
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        n_trials=2,
        backend="optuna",
    )
    assert callback.report.decision != "scratch"
    saved = load_file(tmp_path / "out/mashup/adapter_model.safetensors")
    [(first, rate), (second, other_rate)] = beginning.held
    assert rate != other_rate
    for held, before in ((first, fresh[-2]), (second, fresh[-1])):
        for name, value in held.items():
            assert torch.equal(value, saved[name.replace(".default", "")])
            assert not torch.equal(value, before[name])
