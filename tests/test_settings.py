"""What a run does with each setting, and mistakes that raise before any work."""

from pathlib import Path

import pytest
import torch
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from mashup_callback import MashupCallback, MashupConfig
from tests.full_model import full_trainer, save_models
from tests.snapshot import Snapshot
from tests.tiny import llama, lora, losses, rows, save_scaled_adapter, sft_trainer, trained


def test_user_mistakes_raise_before_any_work(tmp_path, library):
    with pytest.raises(TypeError, match="Did you mean `top_k`"):
        MashupCallback(str(library / "*"), topk=3)
    with pytest.raises(ValueError, match="does not exist"):
        MashupCallback(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="task_arithmetic"):
        MashupCallback(str(library / "*"), merge_method="tiess")
    with pytest.raises(ValueError, match="weights"):
        MashupCallback(str(library / "*"), weights=[1, 2])
    with pytest.raises(ValueError, match="`?t`?"):
        MashupCallback(str(library / "*"), merge_method="nearswap", top_k=2)
    with pytest.raises(ValueError, match="slerp"):
        MashupCallback(str(library / "*"), merge_method="slerp", top_k=3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(init_lora_weights="pissa"), "alters the base weights"),
        (lora(init_lora_weights="olora"), "alters the base weights"),
        (lora(init_lora_weights=False), "not fresh"),
        (lora(alora_invocation_tokens=[3]), "more than scaling"),
    ],
)
def test_unfit_trainees_are_refused(tmp_path, library, config, message):
    trainer = sft_trainer(tmp_path / "out", callbacks=[MashupCallback(str(library / "*"))], peft_config=config)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_an_optimizer_without_what_is_trained_is_refused(tmp_path, library):
    model = llama()
    optimizer = torch.optim.AdamW(list(model.parameters()), lr=1e-3)
    trainer = sft_trainer(tmp_path / "out", model=model, callbacks=[MashupCallback(str(library / "*"))])
    trainer.optimizer = optimizer
    with pytest.raises(ValueError, match="holds none of the parameters that are trained"):
        trainer.train()


def test_overwrite_accepts_a_trained_adapter(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"), overwrite=True)
    config = lora(init_lora_weights=False)
    trained(tmp_path / "out", callback, peft_config=config)
    assert callback.report.decision != "scratch"


def test_a_layerwise_optimizer_stands_for_those_of_the_parameters(tmp_path, library):
    callback = MashupCallback(str(library / "trained-*"), guard=False)
    trainer = sft_trainer(tmp_path / "out", callbacks=[callback], max_steps=1)
    # As GaLore's and APOLLO's.
    trainer.optimizer = LayerWiseDummyOptimizer(optimizer_dict={})
    trainer.train()
    assert callback.report.decision == "merged"


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": "auto"},
        {"merge_method": "auto"},
        {"merge_method": "ties", "merge_parameters": {"density": 0.5}, "merge_space": "core"},
        {"merge_space": "factors"},
        {"merge_method": "slerp", "top_k": 2},
        {"weights": "softmax", "search": "exhaustive"},
        {"weights": [3, 2, 1]},
        {"metric": "token_accuracy", "batch_size": 3},
    ],
    ids=str,
)
def test_settings(tmp_path, library, settings):
    callback = MashupCallback(str(library / "trained-*"), on_error="raise", guard=False, **settings)
    trainer = trained(tmp_path / "out", callback, max_steps=1)
    report = callback.report
    assert report.decision in ("merged", "single")
    used = [row.weight for row in report.candidates if row.weight]
    assert 1 <= len(used) <= 3
    assert report.merge.kept_energy > 0
    assert losses(trainer)[0] < 4.6


def test_callable_metric(tmp_path, library):
    seen = []

    def metric(model, batch):
        seen.append(model.training)
        return 2 * model(**batch).loss.item() * 10, 10

    callback = MashupCallback(str(library / "trained-*"), metric=metric)
    trained(tmp_path / "out", callback, max_steps=1)
    assert seen and not any(seen)
    assert callback.report.base_loss == pytest.approx(2 * 4.58, rel=0.02)
    assert callback.report.config["metric"].endswith("metric")


def test_guard_dataset(tmp_path, library):
    trainer = sft_trainer(tmp_path / "prepared", train_rows=rows(count=8, seed=9))
    callback = MashupCallback(str(library / "trained-*"), guard_dataset=trainer.train_dataset)
    trained(tmp_path / "out", callback, max_steps=1)
    assert callback.report.candidates[0].rows == 32
    raw = MashupCallback(str(library / "trained-*"), guard_dataset=rows(), on_error="raise")
    with pytest.raises(ValueError, match="guard_dataset"):
        trained(tmp_path / "out2", raw, max_steps=1)


def test_config_object_and_settings(library):
    callback = MashupCallback(str(library / "*"), config=MashupConfig(top_k=2, seed=7), top_k=1)
    assert (callback.config.top_k, callback.config.seed) == (1, 7)


def test_a_merge_of_one_is_judged_in_the_form_that_is_written(tmp_path, library):
    half = {"merge_method": "task_arithmetic", "merge_parameters": {"lambda": 0.5}, "top_k": 1}
    held = {}
    for guard in (True, False):
        after = Snapshot()
        callback = MashupCallback(str(library / "trained-0"), guard=guard, **half)
        trained(tmp_path / str(guard), callback, after, max_steps=1)
        assert callback.report.decision == "single"
        held[guard] = after.values
    # The whole adapter is better than half of it, and is what the guard finds; without a guard it is as asked for.
    names = [name for name in held[True] if "lora_A" in name]
    for name in names:
        whole, less = (held[guard][name.replace("lora_A", "lora_B")] @ held[guard][name] for guard in (True, False))
        torch.testing.assert_close(less, whole / 2, atol=1e-5, rtol=1e-4)


def test_bound_trainer_in_full_training_ranks_by_its_own_loss(tmp_path):
    save_models(tmp_path / "runs", 3)
    ranked = {}
    for bound in (True, False):
        callback = MashupCallback(str(tmp_path / "runs/model-*"), on_error="raise")
        trainer = full_trainer(tmp_path / str(bound), callbacks=[callback], max_steps=1)
        if bound:
            callback.bind(trainer)
        trainer.train()
        ranked[bound] = {row.name: row.loss for row in callback.report.candidates}
        assert callback.report.decision in ("merged", "single")
    # One is a mean over batches, the other over tokens.
    assert list(ranked[True]) == list(ranked[False]) and ranked[True] != ranked[False]
    assert ranked[True] == pytest.approx(ranked[False], rel=0.1)


def test_a_score_and_a_metric_exclude_each_other(library):
    def score(model, batch):
        return 0.0

    for settings in ({"metric": "loss"}, {"metric": score}, {"config": MashupConfig(metric="token_accuracy")}):
        with pytest.raises(TypeError, match="`score` and `metric` were both given"):
            MashupCallback(str(library), score=score, **settings)
    for settings in ({"metric": "token_accuracy"}, {"score": score}):
        with pytest.raises(ValueError, match="has a `metric` or `score` of its own"):
            MashupCallback(str(library), **settings).bind(None)


def test_a_path_is_taken_literally(tmp_path, library, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = ["hub:author=me", "two\nlines", "trailing ", "acme/name@main"]
    for seed, name in enumerate(odd):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_scaled_adapter(tmp_path / name, library / f"trained-{seed % 3}", 1.0 + seed / 10)
    callback = MashupCallback([Path(name) for name in odd], guard=False, on_error="raise")
    trained(tmp_path / "out", callback)
    assert {row.name for row in callback.report.candidates} == set(odd)
    assert all(row.loss is not None for row in callback.report.candidates)
