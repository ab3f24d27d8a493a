"""Trainers of a backbone under another head than a language model's, bound to the callback."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from mashup_callback import MashupCallback
from tests.lora.variants import MODELS
from tests.tiny import llama, lora, losses, preferences, run_settings, save_scaled_adapter, tokenizer, trainer_settings


def reward(output_dir, callbacks=(), task_type="SEQ_CLS", max_steps=2):
    torch.manual_seed(0)
    config = llama().config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    # The backbone is that of the other tests; the head is as fresh as any reward model's.
    model.model.load_state_dict(llama().model.state_dict())
    return RewardTrainer(
        model,
        args=RewardConfig(**trainer_settings(output_dir, max_steps=max_steps)),
        train_dataset=preferences().map(
            lambda row: {kind: row["prompt"] + row[kind] for kind in ("chosen", "rejected")}
        ),
        processing_class=tokenizer(),
        peft_config=lora(task_type=task_type),
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def rewarding(tmp_path_factory):
    """Adapters of a reward model: a good one that leaves the head alone, its opposite, one with a head of its own."""
    directory = tmp_path_factory.mktemp("rewarding")
    for name, task_type in (("good", None), ("headed", "SEQ_CLS")):
        trainer = reward(directory / "training", task_type=task_type, max_steps=12)
        trainer.train()
        trainer.model.save_pretrained(directory / "runs" / name)
    save_scaled_adapter(directory / "runs/bad", directory / "runs/good", -1.0)
    return directory / "runs"


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None], ids=["head trained", "head frozen"])
def test_reward_model_starts_from_adapters_without_a_head(tmp_path, rewarding, task_type):
    callback = MashupCallback(str(rewarding / "*"), top_k=1, on_error="raise")
    trainer = reward(tmp_path / "out", [callback], task_type)
    callback.bind(trainer)
    trainer.train()
    found = {row.name.rsplit("/", 1)[-1]: row for row in callback.report.candidates}
    assert callback.report.decision == "single" and found["good"].loss < found["bad"].loss - 0.02
    assert found["headed"].status == "rejected"
    for part in ("`modules_to_save`", "score", "SEQ_CLS", "head of its own"):
        assert part in found["headed"].reason
    assert callback.report.single_loss < callback.report.base_loss - 0.02
    loaded = reward(tmp_path / "loaded", task_type=task_type)
    fill(loaded.model, load_file(tmp_path / "out/mashup/adapter_model.safetensors"))
    loaded.train()
    assert losses(trainer) == losses(loaded)


def fill(model, saved):
    """Puts saved factors into the adapter of a model, whatever wraps the model."""
    named = {
        name.replace(".default.weight", ".weight").removeprefix("base_model.model."): value
        for name, value in model.named_parameters()
    }
    with torch.no_grad():
        for name, value in saved.items():
            named[name.removeprefix("base_model.model.")].copy_(value)


def sentence_trainer(bert, output_dir, callbacks=(), max_steps=2):
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(0)
    model = SentenceTransformer(modules=[Transformer(str(bert)), Pooling(32)], device="cpu")
    model.add_adapter(lora(target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    return SentenceTransformerTrainer(
        model,
        args=SentenceTransformerTrainingArguments(
            **run_settings(output_dir, max_steps=max_steps, per_device_train_batch_size=8)
        ),
        train_dataset=Dataset.from_list(
            [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 40} w{i + 3}"} for i in range(32)]
        ),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=list(callbacks),
    )


def test_sentence_transformers(tmp_path):
    pytest.importorskip("sentence_transformers")
    bert = tmp_path / "bert"
    MODELS["bert"][0]().save_pretrained(bert)
    tokenizer().save_pretrained(bert)
    trainer = sentence_trainer(bert, tmp_path / "training", max_steps=20)
    trainer.train()
    trainer.model.transformers_model.save_pretrained(tmp_path / "runs/good")
    save_scaled_adapter(tmp_path / "runs/bad", tmp_path / "runs/good", -1.0)
    callback = MashupCallback(str(tmp_path / "runs/*"), top_k=1, on_error="raise")
    trainer = sentence_trainer(bert, tmp_path / "out", [callback])
    callback.bind(trainer)
    trainer.train()
    assert callback.report.decision == "single" and callback.report.candidates[0].name.endswith("good")
    assert callback.report.candidates[0].loss < callback.report.candidates[1].loss - 0.1
    loaded = sentence_trainer(bert, tmp_path / "loaded")
    fill(loaded.model, load_file(tmp_path / "out/mashup/adapter_model.safetensors"))
    loaded.train()
    assert losses(trainer) == losses(loaded)
