"""Scores against peft's own forward pass with the adapter loaded, for every form of data."""

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from mashup_callback import score_candidates
from mashup_callback.errors import OutOfStepError, UsageError
from mashup_callback.scoring import CallableMetric, SampleRows, ScoreMetric, evaluate
from tests.tiny import llama, lora, rows, save_random_adapter, save_scaled_adapter, sft_trainer, stream, tokenizer


def peft_loss(path, batches, base=None, **settings):
    """Sum of peft's own losses over all label tokens, by their number."""
    model = PeftModel.from_pretrained(base or llama(), path).eval()
    total = count = 0.0
    for batch in batches:
        with torch.no_grad():
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**inputs, use_cache=False).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


def trainer_batches(trainer, count=3, size=4):
    loader = trainer.get_train_dataloader()
    dataset = loader.dataset
    examples = list(dataset) if not hasattr(dataset, "__len__") else [dataset[i] for i in range(len(dataset))]
    return [loader.collate_fn(examples[i * size : (i + 1) * size]) for i in range(count) if examples[i * size :]]


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (lambda: rows("text"), {}),
        (lambda: rows("prompt_completion"), {}),
        (lambda: rows("chat"), {"assistant_only_loss": True}),
        (lambda: rows("text"), {"packing": True}),
        (lambda: rows("prompt_completion"), {"packing": True, "packing_strategy": "wrapped"}),
        (lambda: rows("text"), {"padding_free": True, "max_length": None}),
        (lambda: stream("text"), {}),
        (lambda: stream("prompt_completion"), {}),
    ],
    ids=["text", "completion", "chat", "packed", "wrapped", "padding-free", "stream", "completion-stream"],
)
def test_score_equals_peft(tmp_path, data, settings):
    trainer = sft_trainer(tmp_path / "out", train_rows=data(), **settings)
    batches = trainer_batches(trainer)
    path = save_random_adapter(tmp_path / "adapter", 0, scale=1.0)
    [score] = score_candidates(trainer.model, [path], batches)
    assert score.loss == pytest.approx(peft_loss(path, batches), abs=1e-6)
    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches])
    assert score.tokens == int((labels != -100).sum())


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"r": 16}, {"target_modules": ["q_proj", "lm_head"]}])
def test_any_plain_lora(tmp_path, settings):
    path = save_random_adapter(tmp_path / "adapter", 1, scale=1.0, **settings)
    batches = trainer_batches(sft_trainer(tmp_path / "out"))
    [score] = score_candidates(get_peft_model(llama(), lora()), [path], batches)
    assert score.loss == pytest.approx(peft_loss(path, batches), abs=1e-6)


def test_plain_trainer_and_other_collator(tmp_path):
    tokens = tokenizer()
    data = [{"input_ids": list(range(7 + i, 20 + 2 * i))} for i in range(12)]
    trainer = Trainer(
        get_peft_model(llama(), lora()),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False),
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokens, mlm=False),
    )
    batches = trainer_batches(trainer)
    path = save_random_adapter(tmp_path / "adapter", 0, scale=1.0)
    [score] = score_candidates(trainer.model, [path], batches)
    assert score.loss == pytest.approx(peft_loss(path, batches), abs=1e-6)


def test_batching_does_not_change_the_loss(tmp_path):
    loader = sft_trainer(tmp_path / "out").get_train_dataloader()
    examples = [loader.dataset[i] for i in range(13)]
    path = save_random_adapter(tmp_path / "adapter", 0, scale=1.0)
    found = []
    for size in (1, 4, 13):
        [score] = score_candidates(llama(), [path], SampleRows(examples, loader.collate_fn, size))
        found.append(score.losses)
    for other in found[1:]:
        torch.testing.assert_close(other.loss, found[0].loss, atol=1e-4, rtol=0)
        assert torch.equal(other.tokens, found[0].tokens) and torch.equal(other.correct, found[0].correct)


def test_token_accuracy_ranks_by_accuracy(tmp_path):
    batches = trainer_batches(sft_trainer(tmp_path / "out"))
    paths = [save_random_adapter(tmp_path / f"a{seed}", seed, scale=3.0) for seed in range(6)]
    scores = score_candidates(llama(), paths, batches, metric="token_accuracy")
    accuracies = []
    for score in scores:
        model = PeftModel.from_pretrained(llama(), score.candidate.path).eval()
        right = count = 0
        for batch in batches:
            labels = batch["labels"][:, 1:]
            with torch.no_grad():
                predictions = (
                    model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
                )
            right += ((predictions == labels) & (labels != -100)).sum().item()
            count += (labels != -100).sum().item()
        accuracies.append(right / count)
        assert score.losses.accuracy == pytest.approx(accuracies[-1])
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > accuracies[-1]


def test_out_of_memory_halves_the_batch(tmp_path):
    loader = sft_trainer(tmp_path / "out").get_train_dataloader()
    path = save_random_adapter(tmp_path / "adapter", 0, scale=1.0)
    model, sizes = llama(), []

    def forward(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(forward, with_kwargs=True)
    data = SampleRows([loader.dataset[i] for i in range(8)], loader.collate_fn, 8)
    first, second = score_candidates(model, [path, path], data)
    # The batch is halved, and halved again, for both candidates.
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 2, 2, 2, 2]
    [expected] = score_candidates(llama(), [path], SampleRows(data.rows, loader.collate_fn, 8))
    assert first.loss == second.loss == pytest.approx(expected.loss, abs=1e-6)


def test_out_of_memory_with_one_row_fails_the_candidate_only(tmp_path):
    loader = sft_trainer(tmp_path / "out").get_train_dataloader()
    model = llama()

    def forward(module, args):
        raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(forward)
    path = save_random_adapter(tmp_path / "adapter", 0)
    [score] = score_candidates(model, [path], SampleRows([loader.dataset[i] for i in range(4)], loader.collate_fn, 4))
    assert score.status == "failed" and "out of memory" in score.reason


def test_out_of_memory_where_all_processes_compute_one_loss_ends_the_run(monkeypatch):
    """Halves would be further exchanges of this process, and the others would not take part in them."""

    def fail(model, batch):
        raise RuntimeError("CUDA out of memory.")

    class Collective(CallableMetric):
        collective = True

    monkeypatch.setattr("mashup_callback.scoring.evaluation.process_index_and_count", lambda: (1, 2))
    data = SampleRows([{"input_ids": [1, 2]}] * 4, lambda rows: {"input_ids": torch.ones(len(rows), 2)}, 4)
    with pytest.raises(OutOfStepError, match="process 1, .* smaller `batch_size`"):
        evaluate(llama(), data, Collective(fail))


def test_a_score_of_rows_that_are_no_mapping_on_a_sharded_model(monkeypatch):
    """As GRPO's batches are, lists of rows; what fails before the model is called cannot be made up for."""
    monkeypatch.setattr("mashup_callback.scoring.evaluation.is_sharded", lambda model: True)
    data = SampleRows([{"prompt": "a"}] * 4, list, 2)
    found = evaluate(llama(), data, ScoreMetric(lambda model, batch: len(batch)), share=True)
    assert found.mean_loss == -2.0
    with pytest.raises(OutOfStepError, match="'answer'"):
        evaluate(llama(), data, ScoreMetric(lambda model, batch: batch[0]["answer"]), share=True)


@pytest.mark.parametrize("labels", [{}, {"labels": torch.ones(1, 5)}], ids=["none", "of several classes"])
def test_batches_without_labels_say_what_to_do(labels):
    with pytest.raises(UsageError, match="callable"):
        evaluate(llama(), SampleRows([{"input_ids": torch.tensor([[7, 8]]), **labels}], lambda rows: rows[0]))


def test_not_a_number_is_a_failure(tmp_path):
    path = save_random_adapter(tmp_path / "adapter", 0)
    batch = {"input_ids": torch.tensor([[7, 8, 9]]), "labels": torch.tensor([[7, 8, 9]])}
    [score] = score_candidates(llama(), [path], [batch], metric=lambda model, batch: (math.nan, 1))
    assert score.status == "failed" and "nan" in score.reason


def test_time_limit_keeps_what_was_scored(tmp_path):
    batches = trainer_batches(sft_trainer(tmp_path / "out"))
    paths = [save_random_adapter(tmp_path / f"a{seed}", seed) for seed in range(3)]
    scores = score_candidates(llama(), paths, batches, max_seconds=0)
    assert {score.status for score in scores} == {"eliminated"}
    assert all("max_seconds" in score.reason for score in scores)


def test_racing_finds_the_best_with_fewer_rows(tmp_path, library):
    loader = sft_trainer(tmp_path / "out", train_rows=rows("text", 128)).get_train_dataloader()
    data = SampleRows([loader.dataset[i] for i in range(128)], loader.collate_fn, 16)
    factors = (1.0, 0.5, 0.1, -0.5, -1.0, -1.5, -2.0, -2.5)
    paths = [save_scaled_adapter(tmp_path / str(factor), library / "trained-0", factor) for factor in factors]
    everything = score_candidates(llama(), paths, data, search="exhaustive")
    race = score_candidates(llama(), paths, data, search="racing", keep=2)
    assert race[0].candidate == everything[0].candidate
    assert race[0].rows == 128 and race[0].loss == pytest.approx(everything[0].loss, abs=1e-6)
    assert sum(score.rows for score in race) < 0.6 * sum(score.rows for score in everything)
    eliminated = [score for score in race if score.status == "eliminated"]
    assert eliminated and all(score.reason.startswith("behind after") for score in eliminated)


def test_time_that_ends_within_a_round_keeps_the_best_so_far(tmp_path, monkeypatch):
    loader = sft_trainer(tmp_path / "out", train_rows=rows("text", 64)).get_train_dataloader()
    data = SampleRows([loader.dataset[i] for i in range(64)], loader.collate_fn, 16)
    paths = [save_random_adapter(tmp_path / f"a{seed}", seed) for seed in range(3)]
    model, passes = llama(), []
    clock = iter([0.0] * 10**6)
    monkeypatch.setattr(
        "mashup_callback.scoring.race.time.monotonic", lambda: 100.0 if len(passes) > 4 else next(clock)
    )
    model.model.register_forward_pre_hook(lambda *args: passes.append(1))
    scores = score_candidates(model, paths, data, search="racing", keep=3, max_seconds=50)
    assert {score.rows for score in scores} == {16, 32}
    assert all(score.status == "scored" for score in scores)


def test_a_metric_that_takes_the_labels_out_leaves_the_batch_alone(tmp_path):
    batches = trainer_batches(sft_trainer(tmp_path / "out"))
    paths = [save_random_adapter(tmp_path / f"a{seed}", seed) for seed in range(2)]

    def metric(model, batch):
        batch.pop("labels")
        return 1.0, 1

    from transformers import BatchEncoding

    scores = score_candidates(llama(), paths, [BatchEncoding(dict(batch)) for batch in batches], metric=metric)
    assert [score.status for score in scores] == ["scored"] * 2
