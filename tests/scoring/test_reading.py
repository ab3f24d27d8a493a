"""What scoring reads: each file once, in a thread, the next candidate while one is scored."""

import contextlib
import gc
import queue
import shutil
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from mashup_callback import score_candidates
from mashup_callback.candidates import Candidate, find_candidates, local
from mashup_callback.formats import BaseModel
from mashup_callback.formats import adapter as adapters
from mashup_callback.lora import source as sources
from mashup_callback.lora.source import AdapterSource
from mashup_callback.scoring import SampleRows, race
from mashup_callback.trainee import admit_to
from tests.tiny import llama, rows, save_random_adapter, sft_trainer


BATCH = {"input_ids": torch.arange(7, 31).view(2, 12), "labels": torch.arange(7, 31).view(2, 12)}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    return [save_random_adapter(directory / str(seed), seed, scale=0.1 * seed) for seed in range(8)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    loader = sft_trainer(tmp_path_factory.mktemp("out"), train_rows=rows("text", 64)).get_train_dataloader()
    return [loader.dataset[i] for i in range(64)], loader.collate_fn


@pytest.fixture
def read(monkeypatch):
    """Directories of the weights files whose tensors were read, in order."""
    found, original = [], adapters.open_regular
    monkeypatch.setattr(adapters, "open_regular", lambda path: found.append(path.parent) or original(path))
    return found


@pytest.mark.parametrize("cache", ["", "cache"])
def test_a_race_reads_each_file_once(tmp_path, paths, data, read, monkeypatch, cache):
    monkeypatch.setenv("MASHUP_CACHE", cache and str(tmp_path / cache))
    monkeypatch.setattr(race, "survivors", lambda values, runs, keep, metric: list(values)[: len(values) // 2])
    scores = score_candidates(llama(), paths, SampleRows(*data, 8), search="racing")
    assert [score.rows for score in scores] == [64, 64, 32, 32, 16, 16, 16, 16]
    assert sorted(read) == sorted(paths)
    scores[0].source.load()
    assert len(read) == 8


def test_a_bounded_search_reads_no_more_files_than_it_may_use(tmp_path, data, read, monkeypatch):
    for seed in range(64):
        save_random_adapter(tmp_path / "runs" / f"{seed:02d}", seed, scale=0.1)
    whole, read_all = [], local.adapter_hash
    monkeypatch.setattr(local, "adapter_hash", lambda adapter: whole.append(adapter) or read_all(adapter))
    model = llama()
    found = find_candidates(tmp_path / "runs", max_candidates=8, check=BaseModel.of(model).check)
    scores = score_candidates(model, found, SampleRows(*data, 8), search="racing", keep=2)
    assert sum(score.rows > 0 for score in scores) == 8 and len(scores) == 64
    assert sorted(path.name for path in read) == [f"{seed:02d}" for seed in range(8)] and not whole


def test_what_was_scored_can_be_used_when_its_file_is_gone(tmp_path, paths, read):
    path = shutil.copytree(paths[1], tmp_path / "copy")
    [score] = score_candidates(llama(), [path], [BATCH])
    expected = adapters.load_factors(adapters.read_adapter(path))
    shutil.rmtree(path)
    found = score.source.load().factors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].A, expected[name].A) for name in found)


def test_memory_is_bounded_and_given_back(paths, read, monkeypatch):
    gc.collect()
    before = sources._KEPT.bytes
    scores = score_candidates(llama(), paths, [BATCH])
    size = sum(update.A.nbytes + update.B.nbytes for update in scores[0].source.load().factors.values())
    assert sources._KEPT.bytes == before + 8 * size and len(read) == 8
    scores[0].source.release()
    assert sources._KEPT.bytes == before + 7 * size
    del scores
    gc.collect()
    assert sources._KEPT.bytes == before
    monkeypatch.setattr(sources, "KEPT_BYTES", before + 3 * size)
    scores = score_candidates(llama(), paths, [BATCH])
    assert sources._KEPT.bytes == before + 3 * size
    read.clear()
    for score in scores:
        score.source.load()
    assert len(read) == 5


def test_what_is_eliminated_is_forgotten(paths, data, monkeypatch):
    monkeypatch.setattr(race, "survivors", lambda values, runs, keep, metric: list(values)[:2])
    scores = score_candidates(llama(), paths, SampleRows(*data, 8), search="racing")
    assert [score.source._factors is None for score in scores] == [score.status == "eliminated" for score in scores]


def test_candidates_are_admitted_in_the_main_thread_and_read_in_another(tmp_path, paths, monkeypatch):
    model, threads = llama(), {"admit": set(), "load": set()}
    as_is, load = admit_to(model), AdapterSource.load

    def admit(candidate):
        threads["admit"].add(threading.current_thread())
        return as_is(candidate)

    def loaded(source, device="cpu"):
        threads["load"].add(threading.current_thread().name)
        return load(source, device)

    monkeypatch.setattr(AdapterSource, "load", loaded)
    llama(seed=1).save_pretrained(tmp_path / "model")
    scores = score_candidates(model, [*paths, tmp_path / "model"], [BATCH], admit=admit)
    assert [score.status for score in scores] == ["scored"] * 9
    assert threads["admit"] == {threading.main_thread()}
    assert all(name.startswith("mashup-read") for name in threads["load"])


def test_two_candidates_are_in_memory_and_never_three(paths, monkeypatch):
    """The next one is read while one is scored, and what was scored is let go of."""
    alive, most, read = weakref.WeakSet(), [], queue.Queue()
    load, evaluate = AdapterSource.load, race.evaluate

    def loaded(source, device="cpu"):
        update = load(source, device)
        alive.add(update)
        read.put(1)
        return update

    def evaluated(*args, **options):
        # Its own, and the next one: waits until that is read.
        while evaluated.read < min(len(most) + 2, len(paths)):
            read.get(timeout=20)
            evaluated.read += 1
        gc.collect()
        most.append(len(alive))
        return evaluate(*args, **options)

    evaluated.read = 0
    monkeypatch.setattr(AdapterSource, "load", loaded)
    monkeypatch.setattr(race, "evaluate", evaluated)
    score_candidates(llama(), paths, [BATCH])
    assert most == [2] * 7 + [1]


def test_candidates_of_the_hub_are_scored_as_they_arrive(paths, monkeypatch):
    """What is here does not wait for the download of the next one."""
    events = []

    @contextlib.contextmanager
    def arriving(candidates, hub):
        here = (replace(candidate, path=path) for candidate, path in zip(candidates, paths, strict=True))
        yield (events.append(f"arrived {candidate.path.name}") or candidate for candidate in here)

    evaluate = race.evaluate
    monkeypatch.setattr(race, "arriving", arriving)
    monkeypatch.setattr(
        race, "evaluate", lambda *args, **options: events.append("scored") or evaluate(*args, **options)
    )
    remote = [Candidate(name=f"acme/{path.name}", repo_id=f"acme/{path.name}", revision="0" * 40) for path in paths]
    score_candidates(llama(), remote, [BATCH])
    assert events == [event for path in paths for event in (f"arrived {path.name}", "scored")]


@pytest.mark.parametrize(("cache", "kind", "hashed"), [("", "adapter", 0), ("c", "adapter", 1), ("c", "model", 0)])
def test_the_base_is_hashed_only_where_a_score_is_cached(tmp_path, paths, monkeypatch, cache, kind, hashed):
    monkeypatch.setenv("MASHUP_CACHE", cache and str(tmp_path / cache))
    calls, original = [], race.base_fingerprint
    monkeypatch.setattr(race, "base_fingerprint", lambda model: calls.append(1) or original(model))
    llama(seed=1).save_pretrained(tmp_path / "model")
    scores = score_candidates(llama(), paths if kind == "adapter" else [tmp_path / "model"], [BATCH])
    assert {score.status for score in scores} == {"scored"} and len(calls) == hashed
