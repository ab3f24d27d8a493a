"""Trainers whose batches do not give the loss: their own loss, the user's score, or a clear error."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from mashup_callback import MashupCallback
from tests.tiny import llama, lora, lora_parameters, losses, save_random_adapter, save_scaled_adapter, tokenizer


COMMON = {
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}


def preferences(count=24):
    prompts = [f"w{i % 7} w{i % 5} " for i in range(count)]
    rows = [{"prompt": p, "chosen": "w1 w2 w3", "rejected": f"w{9 + i % 9} w8"} for i, p in enumerate(prompts)]
    return Dataset.from_list(rows)


def dpo(output_dir, callbacks=()):
    arguments = DPOConfig(str(output_dir), max_length=32, **COMMON)
    return DPOTrainer(
        llama(),
        args=arguments,
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=lora(),
        callbacks=list(callbacks),
    )


def kto(output_dir, callbacks=()):
    rows = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in preferences()
        for kind in ("chosen", "rejected")
    ]
    return KTOTrainer(
        llama(),
        args=KTOConfig(str(output_dir), max_length=32, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora(),
        callbacks=list(callbacks),
    )


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


@pytest.mark.parametrize("make", [dpo, kto])
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
    weights = lora_parameters(alone.model)
    assert all(torch.equal(value, weights[name]) for name, value in lora_parameters(trainer.model).items())


def test_unbound_trainer_says_what_to_do(tmp_path, preferring):
    trainer = dpo(tmp_path / "out", [MashupCallback(str(preferring / "*"))])
    with pytest.raises(ValueError, match=r"callback\.bind\(trainer\)"):
        trainer.train()


def grpo(output_dir, callback):
    return GRPOTrainer(
        llama(),
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=GRPOConfig(str(output_dir), num_generations=4, max_completion_length=4, **COMMON),
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(16)]),
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


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def test_sequence_to_sequence(tmp_path):
    config = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    for seed in range(3):
        save_random_adapter(tmp_path / "runs" / str(seed), seed, scale=1.0, base=t5(), **config)
    tokens = [{"input_ids": list(range(7, 20)), "labels": list(range(i, i + 6))} for i in range(10, 42)]
    callback = MashupCallback(str(tmp_path / "runs/*"), on_error="raise", guard=False)
    trainer = Trainer(
        get_peft_model(t5(), lora(**config)),
        TrainingArguments(str(tmp_path / "out"), **{**COMMON, "logging_steps": 1}),
        train_dataset=tokens,
        callbacks=[callback],
    )
    trainer.train()
    assert [row.status for row in callback.report.candidates] == ["scored"] * 3
    assert losses(trainer)[0] == pytest.approx(callback.report.merged_loss, abs=0.3)
