"""Scores kept between runs: when they are found again, when not, and that a broken or shared cache does no harm."""

import json
import multiprocessing
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

from mashup_callback import score_candidates
from mashup_callback.cli import app
from mashup_callback.formats.adapter import adapter_hash, read_adapter
from mashup_callback.scoring import CacheInfo, RowLosses, SampleRows, ScoreCache
from mashup_callback.scoring.cache import base_fingerprint, score_key
from tests.tiny import llama, lora, rows, save_random_adapter, save_scaled_adapter, sft_trainer


LOSSES = RowLosses(*(torch.tensor([0.1, 1 / 3, 2.5], dtype=torch.float64) * scale for scale in (1, 2, 3)))


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("MASHUP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path):
    loader = sft_trainer(tmp_path / "out", train_rows=rows("text", 64)).get_train_dataloader()
    return [loader.dataset[i] for i in range(64)], loader.collate_fn


def counted(model=None):
    model, sizes = model or llama(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return model, sizes


def paths(tmp_path, count):
    return [save_random_adapter(tmp_path / f"a{seed}", seed, scale=0.3 * seed) for seed in range(count)]


def test_second_run_scores_only_new_candidates(tmp_path, directory, data):
    known, [new] = paths(tmp_path, 12), [save_random_adapter(tmp_path / "new", 77, scale=0.1)]
    model, forwards = counted()
    first = score_candidates(model, known, SampleRows(*data, 8), search="racing", keep=2)
    assert forwards
    forwards.clear()
    again = score_candidates(model, known, SampleRows(*data, 8), search="racing", keep=2)
    assert forwards == []
    assert [(s.candidate.name, s.loss, s.status, s.rows) for s in again] == [
        (s.candidate.name, s.loss, s.status, s.rows) for s in first
    ]
    both = score_candidates(model, [*known, new], SampleRows(*data, 8), search="racing", keep=2)
    [added] = [score for score in both if score.candidate.name == str(new)]
    # Nothing but the new one, and who goes on with it where it changed that.
    assert added.rows <= sum(forwards) < 2 * 64


def test_same_adapter_elsewhere_is_known(tmp_path, directory, data, library):
    model, forwards = counted()
    [first] = score_candidates(model, [library / "trained-0"], SampleRows(*data, 8))
    copy = shutil.copytree(library / "trained-0", tmp_path / "copy")
    forwards.clear()
    [second] = score_candidates(model, [copy], SampleRows(*data, 8))
    assert forwards == [] and second.loss == first.loss
    other = save_scaled_adapter(tmp_path / "other", library / "trained-0", 1.01)
    [third] = score_candidates(model, [other], SampleRows(*data, 8))
    assert forwards and third.loss != first.loss


@pytest.mark.parametrize("change", ["rows", "alpha", "base", "metric"])
def test_what_a_score_depends_on(tmp_path, directory, data, change):
    path = save_random_adapter(tmp_path / "a", 0, scale=1.0)
    model, forwards = counted()
    score_candidates(model, [path], SampleRows(*data, 8))
    forwards.clear()
    examples, metric = data[0], "loss"
    if change == "rows":
        examples = [*examples[:-1], examples[0]]
    elif change == "alpha":
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    elif change == "base":
        torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)
    else:
        metric = "token_accuracy"
    score_candidates(model, [path], SampleRows(examples, data[1], 8), metric)
    assert sum(forwards) == 64


def test_callable_metrics_are_measured_again(tmp_path, directory, data):
    path, calls = save_random_adapter(tmp_path / "a", 0), []
    for _ in range(2):
        score_candidates(llama(), [path], SampleRows(*data, 8), lambda model, batch: (calls.append(1) or 1.0, 1))
    assert len(calls) == 16 and not directory.exists()


def test_base_fingerprint_knows_the_base_and_not_the_trainee():
    plain = base_fingerprint(llama())
    assert plain == base_fingerprint(llama())
    trained = [get_peft_model(llama(), lora(r=rank)) for rank in (4, 8)]
    assert base_fingerprint(trained[0]) == base_fingerprint(trained[1]) == plain
    different = [llama(seed=1), llama().bfloat16(), llama(rope_theta=5000.0)]
    assert len({plain, *map(base_fingerprint, different)}) == 4


def test_base_fingerprint_sees_a_single_number_anywhere():
    model, seen = llama(), set()
    tensors = {name: value for name, value in [*model.named_parameters(), *model.named_buffers()] if value.numel()}
    assert len(tensors) > 20
    for value in tensors.values():
        flat = value.detach().view(-1)
        for place in {1 % len(flat), len(flat) // 2, len(flat) - 1}:
            before = flat[place].item()
            flat[place] = before + 1
            seen.add(base_fingerprint(model))
            flat[place] = before
    assert base_fingerprint(model) not in seen and len(seen) >= 3 * len(tensors) - 6


def test_a_trained_token_is_a_new_base(tmp_path, directory, data):
    model, forwards = counted()
    path = save_random_adapter(tmp_path / "a", 0)
    [before] = score_candidates(model, [path], SampleRows(*data, 8))
    forwards.clear()
    with torch.no_grad():
        model.get_input_embeddings().weight[50] += 5.0
    [after] = score_candidates(model, [path], SampleRows(*data, 8))
    assert sum(forwards) == 64 and after.loss != before.loss


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_another_version_of_a_library_is_another_base(monkeypatch, package):
    before = base_fingerprint(llama())
    monkeypatch.setattr(f"{package}.__version__", "99.0")
    assert base_fingerprint(llama()) != before


@pytest.mark.parametrize("kind", ["absmax", "nested", "int8", "int8 after a forward pass"])
def test_scales_of_quantized_weights_count(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if kind.startswith("int8"):
        layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(64, 64, compress_statistics=kind == "nested", quant_type="nf4")
    model = torch.nn.Sequential(layer.to("cpu"))
    before = base_fingerprint(model)
    if kind == "int8 after a forward pass":
        model(torch.ones(1, 64))
        assert layer.weight.SCB is None and base_fingerprint(model) == before
    scales = {
        "absmax": lambda: layer.weight.quant_state.absmax,
        "nested": lambda: layer.weight.quant_state.state2.absmax,
        "int8": lambda: layer.weight.SCB,
        "int8 after a forward pass": lambda: layer.state.SCB,
    }
    scales[kind]()[-1] *= 2
    assert base_fingerprint(model) != before


def test_key_does_not_depend_on_the_name(tmp_path):
    adapter = adapter_hash(read_adapter(save_random_adapter(tmp_path / "a", 0)))
    keys = {
        score_key(adapter, *parts) for parts in [("b", "s", "m"), ("x", "s", "m"), ("b", "x", "m"), ("b", "s", "x")]
    }
    assert len(keys) == 4
    assert score_key(adapter_hash(read_adapter(save_random_adapter(tmp_path / "b", 0))), "b", "s", "m") in keys


def test_round_trip_is_exact(tmp_path):
    cache = ScoreCache(tmp_path)
    cache.put("ab" * 32, LOSSES)
    found = cache.get("ab" * 32, 3)
    assert all(torch.equal(getattr(found, name), getattr(LOSSES, name)) for name in ("loss", "correct", "tokens"))
    assert cache.get("ab" * 32, 4) is None and cache.get("cd" * 32, 3) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"loss": [1, 2, 3]}', '{"loss": 1, "correct": 1, "tokens": 1}', "\x00"]
)
def test_broken_files_count_as_missing(tmp_path, text):
    cache = ScoreCache(tmp_path)
    cache.put("ab" * 32, LOSSES)
    [path] = (tmp_path / "scores").glob("*/*")
    path.write_text(text)
    assert cache.get("ab" * 32, 3) is None
    cache.put("ab" * 32, LOSSES)
    assert cache.get("ab" * 32, 3) is not None


def test_directory_that_cannot_be_written_is_no_reason_to_stop(tmp_path, monkeypatch, data):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MASHUP_CACHE", str(tmp_path / "file" / "cache"))
    [score] = score_candidates(llama(), [save_random_adapter(tmp_path / "a", 0)], SampleRows(*data, 8))
    assert score.status == "scored"


def test_default_directory(monkeypatch):
    monkeypatch.delenv("MASHUP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert ScoreCache().directory == Path("/somewhere/mashup_callback")
    monkeypatch.setenv("MASHUP_CACHE", "")
    assert ScoreCache().directory is None and ScoreCache().info().scores == 0


def write(directory, place):
    cache = ScoreCache(directory)
    for _ in range(50):
        cache.put("ab" * 32, RowLosses(*(torch.full((200,), float(place), dtype=torch.float64) for _ in range(3))))


def test_runs_that_write_at_once_leave_one_whole_score(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(tmp_path, place)) for place in range(3)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        if (found := ScoreCache(tmp_path).get("ab" * 32, 200)) is not None:
            seen += 1
            assert found.loss.unique().numel() == 1
        else:
            assert not seen
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert ScoreCache(tmp_path).info().scores == 1


def test_clear(tmp_path):
    cache = ScoreCache(tmp_path)
    for key in ("ab", "cd"):
        cache.put(key * 32, LOSSES)
    assert cache.info().scores == 2 and cache.info().bytes > 0
    # In a directory that is not the cache's alone.
    other = tmp_path / "scores/en/notes.json"
    other.parent.mkdir()
    other.write_text("mine")
    assert cache.clear() == 2 and cache.info() == CacheInfo(str(tmp_path), 0, 0) and other.is_file()


def test_command_line(directory):
    for key in ("ab", "cd"):
        ScoreCache().put(key * 32, LOSSES)
    shown = CliRunner().invoke(app, ["cache", "--json"])
    assert json.loads(shown.stdout) == {**asdict(ScoreCache().info()), "removed": 0}
    assert CliRunner().invoke(app, ["cache"]).stdout.startswith("2 scores, ")
    assert "Removed 2 scores" in CliRunner().invoke(app, ["cache", "--clear"]).stdout
    assert ScoreCache().info().scores == 0
