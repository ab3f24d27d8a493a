"""What is better than a fresh initialization, by how much it must be, and candidates that are lost on the way."""

import math
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mashup_callback import MashupCallback, MashupConfig, score_candidates
from mashup_callback import pipeline as run
from mashup_callback.guard import Init, _decide, _is_undecided, _reason
from mashup_callback.scoring import RowLosses, paired_gain
from mashup_callback.selection import Selection
from tests.full_model import full_trainer, save_models
from tests.tiny import llama, lora, rows, save_random_adapter, save_scaled_adapter, sft_trainer


WEIGHTS = "adapter_model.safetensors"
TOKENS = [3.0, 5.0, 4.0, 8.0]


def row_losses(loss, tokens=TOKENS):
    loss, tokens = (torch.tensor(values, dtype=torch.float64) for values in (loss, tokens))
    return RowLosses(loss, torch.zeros_like(loss), tokens)


def start(loss, count=1):
    return Init(Selection((None,) * count, (1.0,) * count), None, None, row_losses(loss))


BASE = [6.0, 9.0, 8.5, 17.0]


def test_the_error_of_a_gain_is_that_of_the_paired_differences():
    gain, error = paired_gain(row_losses([5.0, 9.5, 8.0, 16.0]), row_losses(BASE))
    differences = np.array([1.0, -0.5, 0.5, 1.0])
    assert gain == pytest.approx(differences.sum() / 20)
    assert error == pytest.approx(np.std(differences, ddof=1) * math.sqrt(4) / 20)


def test_a_batch_that_counts_as_a_whole_is_one_difference():
    """The loss of a batch of two rows is in the place of the first; a batch that was halved is whole for the pair."""
    base = row_losses([15.0, 0.0, 25.5, 0.0], [8.0, 0.0, 12.0, 0.0])
    halved = row_losses([14.0, 0.0, 8.0, 16.0], [8.0, 0.0, 4.0, 8.0])
    gain, error = paired_gain(halved, base)
    assert gain == pytest.approx(2.5 / 20) and error == pytest.approx(np.std([1.0, 1.5], ddof=1) * math.sqrt(2) / 20)
    assert math.isnan(paired_gain(row_losses([1.0], [2.0]), row_losses([3.0], [2.0]))[1])


# Sums of differences 0.2, 2 and 8 with standard errors of about 1.2, 1.4 and 2.
NOISE, SOME, CLEAR = [6.8, 8.2, 8.3, 17.0], [5.0, 9.5, 8.0, 16.0], [4.0, 8.0, 7.5, 13.0]


@pytest.mark.parametrize(
    ("merge", "single", "margin", "expected"),
    [
        (NOISE, NOISE, 2.0, "scratch"),
        (NOISE, NOISE, 0.0, "merged"),
        (SOME, SOME, 2.0, "scratch"),
        (SOME, SOME, 1.0, "merged"),
        (SOME, CLEAR, 2.0, "single"),
        (CLEAR, SOME, 2.0, "merged"),
        (BASE, BASE, 0.0, "scratch"),
        ([math.nan] * 4, CLEAR, 2.0, "single"),
        ([math.nan] * 4, [math.inf] * 4, 0.0, "scratch"),
    ],
)
def test_what_is_not_better_by_the_margin_is_not_better(merge, single, margin, expected):
    starts, config = (start(merge, 2), start(single)), MashupConfig(guard_margin=margin)
    decision = _decide(row_losses(BASE), *starts, config)
    assert decision == expected
    reason = _reason(decision, row_losses(BASE), *starts, config)
    assert "standard error" in reason and (expected != "scratch" or "nothing is better" in reason)


def mirrored(losses):
    return [2 * base - loss for base, loss in zip(BASE, losses, strict=True)]


@pytest.mark.parametrize(
    ("merge", "margin", "expected"),
    [
        (NOISE, 2.0, True),
        (mirrored(NOISE), 2.0, True),
        (NOISE, 0.0, False),
        (SOME, 2.0, True),
        (SOME, 1.0, False),
        (CLEAR, 2.0, False),
        (mirrored(CLEAR), 2.0, False),
        (BASE, 2.0, False),
        ([math.nan] * 4, 2.0, False),
    ],
)
def test_what_is_neither_better_nor_worse_by_the_margin_is_undecided(merge, margin, expected):
    starts = start(merge, 2), start(mirrored(CLEAR))
    assert _is_undecided(row_losses(BASE), *starts, MashupConfig(guard_margin=margin)) is expected
    assert not _is_undecided(row_losses(BASE), *starts, MashupConfig(guard_margin=margin, guard=False))


def test_one_held_out_row_gives_no_error_and_any_gain_counts():
    one = Init(Selection((None, None), (1.0, 1.0)), None, None, row_losses([2.9], [2.0]))
    assert _decide(row_losses([3.0], [2.0]), one, one, MashupConfig()) == "merged"


def test_without_the_guard_the_merge_is_used():
    assert _decide(row_losses(BASE), start(BASE, 2), start(CLEAR), MashupConfig(guard=False)) == "merged"


def test_the_report_gives_the_error_and_noise_is_scratch(tmp_path, library):
    settings = {"train_rows": rows(count=64), "max_steps": 1}
    clear = MashupCallback(str(library / "trained-*"))
    sft_trainer(tmp_path / "clear", callbacks=[clear], **settings).train()
    report = clear.report
    assert report.gain == pytest.approx(report.base_loss - min(report.merged_loss, report.single_loss))
    assert 0 < 2 * report.gain_se < report.gain and f"standard error {report.gain_se:.4f}" in report.reason
    # A change of a thousandth moves the loss, by about as much in either direction.
    save_scaled_adapter(tmp_path / "noise", save_random_adapter(tmp_path / "random", 5), 1e-3)
    for margin, expected in ((1e6, "scratch"), (0.0, ("single", "scratch"))):
        noise = MashupCallback(str(tmp_path / "noise"), guard_margin=margin)
        sft_trainer(tmp_path / f"noise-{margin}", callbacks=[noise], **settings).train()
        assert noise.report.decision in expected and noise.report.gain_se > 0


# --- candidates that are lost between scoring and merging


@pytest.fixture
def losing(monkeypatch):
    """
    Lets a function do something to the best candidate's directory after scoring; gives the names it was done to.

    No room is left to keep what was read of a candidate in memory.
    """
    monkeypatch.setattr("mashup_callback.lora.source.KEPT_BYTES", 0)

    def arrange(harm):
        names = []

        def choose(model, trainee, selection, *args):
            names.append(selection.scores[0].candidate.name)
            harm(selection.scores[0].candidate.path)
            return original(model, trainee, selection, *args)

        original = run.choose
        monkeypatch.setattr(run, "choose", choose)
        return names

    return arrange


def changed(directory):
    path = directory / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize("harm", [shutil.rmtree, changed])
@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_k": "auto"}, {"top_k": 2, "weights": [2, 1]}], ids=str)
def test_the_next_best_takes_the_place_of_a_lost_adapter(tmp_path, library, losing, harm, settings):
    shutil.copytree(library, tmp_path / "runs")
    lost = losing(harm)
    callback = MashupCallback(str(tmp_path / "runs/trained-*"), on_error="raise", guard=False, **settings)
    sft_trainer(tmp_path / "out", callbacks=[callback]).train()
    report = callback.report
    merged = {row.name for row in report.candidates if row.weight is not None}
    left = sorted(
        (row for row in report.candidates if row.status == "scored" and row.name not in lost), key=lambda row: row.loss
    )
    assert len(lost) == 1 and merged <= {row.name for row in left} and left[0].name in merged
    assert len(merged) == 2 or settings["top_k"] == "auto"
    assert f"{lost[0]} was left out: " in report.reason


def test_what_is_kept_in_memory_is_merged_though_its_files_are_gone(tmp_path, library, losing, monkeypatch):
    merged = {}
    for kind, kept in (("kept", 2**32), ("whole", 0)):
        shutil.copytree(library, tmp_path / kind)
        if kept:
            losing(shutil.rmtree)
        monkeypatch.setattr("mashup_callback.lora.source.KEPT_BYTES", kept)
        callback = MashupCallback(str(tmp_path / kind / "trained-*"), on_error="raise", guard=False, top_k=2)
        sft_trainer(tmp_path / f"out-{kind}", callbacks=[callback]).train()
        monkeypatch.undo()
        merged[kind] = load_file(tmp_path / f"out-{kind}/mashup/adapter_model.safetensors")
        assert "left out" not in callback.report.reason
    assert all(torch.equal(value, merged["whole"][name]) for name, value in merged["kept"].items())


def test_the_next_best_takes_the_place_of_a_lost_checkpoint(tmp_path, losing):
    save_models(tmp_path / "runs", 3)
    lost = losing(shutil.rmtree)
    callback = MashupCallback(str(tmp_path / "runs/model-*"), on_error="raise", guard=False, top_k=2)
    full_trainer(tmp_path / "out", callbacks=[callback]).train()
    merged = {row.name for row in callback.report.candidates if row.weight is not None}
    assert callback.report.decision == "merged" and len(merged) == 2 and not merged & set(lost)
    assert "was left out" in callback.report.reason


def test_when_all_are_lost_the_error_is_the_first_one(tmp_path, library, losing):
    shutil.copytree(library / "trained-0", tmp_path / "runs/one")
    losing(shutil.rmtree)
    callback = MashupCallback(str(tmp_path / "runs/one"))
    sft_trainer(tmp_path / "out", callbacks=[callback]).train()
    assert callback.report.decision == "scratch" and "cannot be read" in callback.report.reason


# --- what is too large, and what is kept


def test_a_huge_update_is_rejected_with_its_size(tmp_path, library):
    for seed in range(2):
        save_scaled_adapter(tmp_path / f"huge-{seed}", library / f"trained-{seed}", 3e3)
    tokens = torch.randint(7, 87, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    paths = [tmp_path / "huge-0", library / "trained-0", tmp_path / "huge-1", library / "random-0"]
    for chosen in (paths[:1], paths):
        scores = {score.candidate.name: score for score in score_candidates(llama(), chosen, [batch])}
        huge = scores[str(tmp_path / "huge-0")]
        tensors = load_file(tmp_path / "huge-0/adapter_model.safetensors")
        layer = "model.layers.0.mlp.down_proj"
        A, B = (tensors[f"base_model.model.{layer}.lora_{factor}.weight"].double() for factor in "AB")
        ratio = (2 * B @ A).norm() / llama().get_submodule(layer).weight.norm()
        assert huge.status == "rejected" and f"{layer} is {ratio:.1f} times as large" in huge.reason
    assert [scores[str(path)].status for path in paths[1:3]] == ["scored", "rejected"]


def test_kept_energy_is_that_of_the_trainees_layers(tmp_path):
    for seed in range(2):
        save_random_adapter(tmp_path / f"runs/{seed}", seed)
    callback = MashupCallback(str(tmp_path / "runs/*"), guard=False, on_error="raise")
    sft_trainer(tmp_path / "out", callbacks=[callback], peft_config=lora(r=2, target_modules=["q_proj"])).train()
    files = [load_file(tmp_path / f"runs/{seed}/adapter_model.safetensors") for seed in range(2)]
    energies = []
    for name in (name for name in files[0] if "q_proj.lora_A" in name):
        exact = sum(2 * one[name.replace("lora_A", "lora_B")].double() @ one[name].double() for one in files) / 2
        energies.append(torch.linalg.svdvals(exact).square())
    kept = sum(values[:2].sum() for values in energies) / sum(values.sum() for values in energies)
    merge = callback.report.merge
    assert merge.kept_energy == pytest.approx(kept.item(), rel=1e-4) and merge.rank == 2
    assert len(merge.kept_energy_by_module) == len(energies) == 2 and merge.lost_energy > 0


def test_unfit_adapters_leave_the_choice_to_the_others(tmp_path, library):
    runs = tmp_path / "runs"
    for number in range(150):
        directory = shutil.copytree(library / f"trained-{number % 3}", runs / f"a-{number:03d}")
        if number % 3 == 0:
            os.truncate(directory / WEIGHTS, 5000)
        elif number % 3 == 1:
            (directory / "adapter_config.json").write_text('{"peft_type": "IA3"}')
        else:
            weights = load_file(directory / "adapter_model.safetensors")
            save_file({name: value.repeat(1, 2) for name, value in weights.items()}, directory / WEIGHTS)
    for number in range(12):
        save_scaled_adapter(runs / f"z-{number:02d}", library / f"trained-{number % 3}", 1 - number / 20)
    found = {}
    for name, spec in (("all", "*"), ("good", "z-*")):
        callback = MashupCallback(str(runs / spec), on_error="raise")
        sft_trainer(tmp_path / name, callbacks=[callback], max_steps=1).train()
        rows_of = [row for row in callback.report.candidates if row.status != "rejected"]
        merge = (tmp_path / name / "mashup" / WEIGHTS).read_bytes()
        found[name] = (
            [(row.name, row.loss, row.rows, row.weight) for row in rows_of],
            callback.report.decision,
            merge,
        )
        assert len(rows_of) == 12
    assert found["all"] == found["good"] and found["all"][1] != "scratch"
