"""Which of the candidates that were found remain: duplicates, the maximum, other revisions."""

import os

import pytest
from safetensors import safe_open

from mashup_callback import MashupConfig
from mashup_callback.candidates import Candidate, find_candidates, local
from mashup_callback.formats.adapter import load_factors, read_adapter
from mashup_callback.formats.base import BaseModel
from mashup_callback.full.trainee import FullTrainee
from mashup_callback.lora.source import LoraUpdate
from mashup_callback.scoring import Score, race
from mashup_callback.storage import Workspace
from tests.candidates.conftest import names, reasons, save_into, write_adapter
from tests.tiny import llama


LAYERS = {"layers.0.q_proj": (4, 3)}


def read_whole(monkeypatch):
    """Collects the directories whose weights are read as a whole, to find duplicates."""
    found, read = [], local.adapter_hash
    monkeypatch.setattr(local, "adapter_hash", lambda adapter: found.append(adapter.path.name) or read(adapter))
    return found


@pytest.fixture
def mixed(tmp_path):
    """Twelve good adapters that come after 150 unfit ones: of another base, broken, or with an unfit configuration."""
    for number in range(150):
        directory = tmp_path / "mixed" / f"a-{number:03d}"
        write_adapter(directory, features=5, base_model="org/other")
        if number % 3 == 1:
            os.truncate(directory / "adapter_model.safetensors", 50)
        if number % 3 == 2:
            (directory / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    for number in range(12):
        write_adapter(tmp_path / "mixed" / f"good-{number:02d}", 1.0 + number)
    return tmp_path / "mixed"


def test_duplicates_keep_the_final_adapter(runs):
    save_into(runs / "a" / "checkpoint-10", 1)
    for specs in ["runs/a", ["runs/a/checkpoint-10", "runs/a"]]:
        found = find_candidates(specs)
        assert sorted(names(found, "runs/a")) == [".", "checkpoint-2"]
        assert reasons(found, "runs/a") == {"checkpoint-10": "identical to runs/a"}


def test_equal_tensors_with_another_alpha_are_no_duplicates(tmp_path):
    write_adapter(tmp_path / "x", alpha=2.0)
    write_adapter(tmp_path / "y", alpha=4.0)
    assert names(find_candidates(tmp_path), tmp_path) == ["x", "y"]


def test_max_candidates_rejects_what_is_beyond(runs):
    found = find_candidates("runs", max_candidates=2)
    assert names(found, "runs") == ["a", "a/checkpoint-2"]
    assert set(reasons(found, "runs").values()) == {"beyond max_candidates=2"}
    assert len(found) == 4


def test_rejected_candidates_do_not_count_towards_the_maximum(runs):
    save_into(runs / "a" / "checkpoint-2", 1)
    assert names(find_candidates("runs", max_candidates=2), "runs") == ["a", "a/checkpoint-10"]


def test_unfit_candidates_do_not_count_towards_the_maximum(mixed, monkeypatch):
    whole = read_whole(monkeypatch)
    found = find_candidates(mixed, max_candidates=10, check=BaseModel(LAYERS).check)
    alone = find_candidates(str(mixed / "good-*"), max_candidates=10, check=BaseModel(LAYERS).check)
    assert [item for item in found if not item.reason] == [item for item in alone if not item.reason]
    assert names(found, mixed) == [f"good-{number:02d}" for number in range(10)]
    assert {reasons(found, mixed)[f"good-{number}"] for number in (10, 11)} == {"beyond max_candidates=10"}
    assert len(found) == 162
    # Their ends differ.
    assert whole == []


def test_only_files_with_the_same_end_are_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_END_BYTES", 8)
    whole = read_whole(monkeypatch)
    for name, (value, last) in {"a": (1.0, 1.0), "b": (1.0, 1.0), "c": (2.0, 1.0), "d": (1.0, 2.0)}.items():
        write_adapter(tmp_path / "x" / name, value, last=last)
    found = find_candidates(tmp_path / "x")
    assert sorted(set(whole)) == ["a", "b", "c"]
    assert reasons(found, tmp_path / "x") == {"b": f"identical to {tmp_path / 'x/a'}"}


def test_without_a_check_nothing_is_judged(mixed):
    assert len(names(find_candidates(mixed), mixed)) > 12


@pytest.mark.parametrize("spec", ["org/never-seen", "hub:author=never-seen", "collection:org/never-seen"])
def test_without_the_hub_its_forms_are_rejected_with_the_reason(spec):
    (found,) = find_candidates(spec, "org/base")
    assert found.name == spec
    assert found.path is None
    assert "offline" in found.reason


def test_other_types_are_type_errors():
    with pytest.raises(TypeError, match="expected text or a path"):
        find_candidates([3])


def test_the_same_adapter_is_the_same_file(tmp_path):
    files = [write_adapter(tmp_path / str(i)) / "adapter_model.safetensors" for i in range(12)]
    assert len({path.read_bytes() for path in files}) == 1
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt", "producer": "mashup_callback"}


def test_two_revisions_of_a_repository_are_two_candidates_to_all_processes(monkeypatch):
    found = [Candidate("org/name", repo_id="org/name", revision=digit * 40, run=digit) for digit in "ab"]
    scores = [Score(candidate) for candidate in found]
    everywhere = lambda value: [value, {**value, ("org/name", "a" * 40): ("a", "it is broken there")}]  # noqa: E731
    monkeypatch.setattr(race, "gather", everywhere)
    agreed = race._on_all_processes(scores)
    assert [(score.candidate.revision[0], score.candidate.run, score.status) for score in agreed] == [
        ("a", "a", "rejected"),
        ("b", "b", "scored"),
    ]


def test_two_revisions_of_an_adapter_are_two_inputs_of_a_full_merge(tmp_path):
    trainee = FullTrainee(llama(), frozenset(), MashupConfig(), Workspace(tmp_path / "mashup"), lambda found: found)
    sources = [read_adapter(write_adapter(tmp_path / digit, float(int(digit, 16)))) for digit in "ab"]
    saved = [
        trainee.adapter_directory(source, lambda source=source: LoraUpdate(load_factors(source)))
        for source in (*sources, sources[0])
    ]
    values = [load_factors(read_adapter(path))["layers.0.q_proj"].A[0, 0].item() for path in saved]
    assert values == [10.0, 11.0, 10.0]
    assert saved[0] == saved[2] != saved[1]
