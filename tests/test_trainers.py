"""Trainers whose batches do not give the loss: their own loss, the user's score, or a clear error."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from mashup_callback import MashupCallback
from tests.tiny import (
    llama,
    lora,
    lora_parameters,
    losses,
    preferences,
    rows,
    save_random_adapter,
    save_scaled_adapter,
    tokenizer,
)


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


def maker(trainer_class, config_class, data=preferences):
    """Returns what makes a trainer of preferences."""

    def make(output_dir, callbacks=()):
        return trainer_class(
            llama(),
            args=config_class(str(output_dir), max_length=32, **COMMON),
            train_dataset=data(),
            processing_class=tokenizer(),
            peft_config=lora(),
            callbacks=list(callbacks),
        )

    return make


def labelled():
    """The preferences row by row, as KTO takes them."""
    kinds = ("chosen", "rejected")
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[k], "label": k == kinds[0]}
            for row in preferences()
            for k in kinds
        ]
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


def reward(output_dir, callbacks=(), task_type="SEQ_CLS", max_steps=2):
    torch.manual_seed(0)
    config = llama().config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    # The backbone is that of the other tests; the head is as fresh as any reward model's.
    model.model.load_state_dict(llama().model.state_dict())
    return RewardTrainer(
        model,
        args=RewardConfig(str(output_dir), max_length=32, **{**COMMON, "max_steps": max_steps}),
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
    merge = load_file(tmp_path / "out/mashup/adapter_model.safetensors")
    loaded = reward(tmp_path / "loaded", task_type=task_type)
    fill(loaded.model, merge)
    loaded.train()
    assert losses(trainer) == losses(loaded)


def fill(model, saved):
    """Puts saved factors into the adapter of a model, whatever wraps the model."""
    named = {name.replace(".default.weight", ".weight"): value for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, value in saved.items():
            [parameter] = [
                named[key]
                for key in named
                if key.removeprefix("base_model.model.") == name.removeprefix("base_model.model.")
            ]
            parameter.copy_(value)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=96, max_position_embeddings=64, **sizes)).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


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
    settings = {**COMMON, "max_steps": max_steps, "per_device_train_batch_size": 8}
    return SentenceTransformerTrainer(
        model,
        args=SentenceTransformerTrainingArguments(str(output_dir), **settings),
        train_dataset=Dataset.from_list(
            [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 40} w{i + 3}"} for i in range(32)]
        ),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=list(callbacks),
    )


def test_sentence_transformers(tmp_path, bert):
    pytest.importorskip("sentence_transformers")
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
        args=TrainingArguments(str(tmp_path / "out"), **COMMON),
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
