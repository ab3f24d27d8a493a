"""What local directories hold: runs, checkpoints, globs, and what is no candidate."""

import os
from pathlib import Path

import pytest

from mashup_callback.candidates import Candidate, check_specs, find_candidates
from mashup_callback.candidates.search import held_candidates
from mashup_callback.errors import AdapterError
from tests.candidates.conftest import names, reasons, write_adapter


@pytest.mark.parametrize("spec", ["runs", "runs/*", "./runs", "runs/a runs/b", "runs/**/checkpoint-* runs/a"])
def test_runs_expand_in_natural_order_and_share_an_identity(runs, spec):
    found = find_candidates(spec.split())
    expected = ["a", "a/checkpoint-2", "a/checkpoint-10", "b/checkpoint-1"]
    if "**" in spec:
        expected = [*expected[1:], "a"]
    assert names(found, "runs") == expected
    assert {item.run for item in found} == {str(runs / "a"), str(runs / "b")}
    assert all(item.bytes == (item.path / "adapter_model.safetensors").stat().st_size for item in found)
    assert reasons(found, "runs") == {}


def test_a_glob_leaves_out_what_is_hidden_unless_it_is_named(runs):
    for name in ("new/.mashup-x/extracted/model", ".trash/b"):
        write_adapter(runs / name, 7.0)
    for spec in ("runs/*/*", "runs/*/*/*/*", "runs/**"):
        assert not any("/." in name for name in names(find_candidates(spec), "."))
    assert names(find_candidates("runs/*/.mashup-x/*"), "runs") == ["new/.mashup-x/extracted/model"]


def test_digits_that_are_no_number_are_sorted_too(tmp_path):
    for value, name in enumerate(["x10²", "x9²", "²"], start=1):
        write_adapter(tmp_path / name, value)
    assert names(find_candidates(tmp_path), tmp_path) == ["x9²", "x10²", "²"]


def test_a_path_object_is_local_and_what_exists_is_local(runs):
    assert names(find_candidates(Path("runs/a/checkpoint-2")), "runs") == ["a/checkpoint-2"]
    assert names(find_candidates("runs/a/checkpoint-2"), "runs") == ["a/checkpoint-2"]


def test_a_final_adapter_in_its_own_directory_belongs_to_the_run(runs):
    write_adapter(runs / "b" / "final", 9.0)
    found = find_candidates("runs/b")
    assert names(found, "runs/b") == ["final", "checkpoint-1"]
    assert {item.run for item in found} == {str(runs / "b")}
    # Checkpoints beside a run that has its own do not make it theirs.
    write_adapter(runs / "checkpoint-5", 7.0)
    assert {item.run for item in find_candidates("runs/a")} == {str(runs / "a")}


def test_the_same_directory_twice_is_listed_once(runs):
    (runs.parent / "link").symlink_to(runs / "b")
    assert names(find_candidates(["runs/b", "link", "runs/*"]), "runs")[0] == "b/checkpoint-1"
    assert len(find_candidates(["runs/b", "link"])) == 1


def test_own_output_and_mashups_are_skipped(runs):
    write_adapter(runs / "b" / "mashup" / "adapter", 7.0)
    assert names(find_candidates("runs/b/*/*"), "runs") == ["b/mashup/adapter"]
    (runs / "b" / "mashup" / "report.json").write_text("{}")
    for spec in ["runs", "runs/*", "runs/*/*", "runs/*/*/*", "runs/**"]:
        found = find_candidates(spec, exclude=[runs / "a"])
        assert set(names(found, "runs")) <= {"b/checkpoint-1"}
        assert reasons(found, "runs") == {}
    assert "own output" in find_candidates("runs/b/mashup")[0].reason
    assert "own output" in find_candidates("runs/b/mashup/adapter")[0].reason
    assert "own output" in find_candidates("runs/a/checkpoint-2", exclude=["runs/a"])[0].reason


@pytest.mark.parametrize("spec", ["mashup", "*", "mashup/runs", "*/*"])
def test_a_project_or_a_run_that_is_called_mashup_is_no_report(tmp_path, spec):
    write_adapter(tmp_path / "mashup" / "runs" / "mashup")
    write_adapter(tmp_path / "mashup" / "runs" / "mashup" / "mashup", 2.0)
    (tmp_path / "mashup/runs/mashup/mashup/failed.json").touch()
    assert names(find_candidates(tmp_path / spec), tmp_path) == ["mashup/runs/mashup"]


def test_an_excluded_name_is_not_a_prefix(runs):
    assert "a" in names(find_candidates("runs", exclude=["run", "runs/b"]), "runs")


def test_unusable_directories_get_a_reason(runs):
    (runs / "c").mkdir()
    (runs / "c" / "adapter_config.json").write_text("{}")
    (runs / "c" / "adapter_model.bin").write_bytes(b"pickle")
    (runs / "d").mkdir()
    (runs / "d" / "adapter_config.json").write_text("{}")
    (runs / "e").mkdir()
    (runs / "e" / "config.json").write_text("{}")
    (runs / "e" / "model-00001-of-00002.safetensors").write_bytes(b"")
    found = find_candidates("runs")
    assert "never opened" in reasons(found, "runs")["c"]
    assert "missing" in reasons(found, "runs")["d"]
    assert [(item.kind, item.reason) for item in found if item.name.endswith("/e")] == [("model", None)]


def test_symbolic_link_loops_end(runs):
    (runs / "a" / "loop").symlink_to(runs)
    (runs / "self").symlink_to(runs / "self")
    for spec in ["runs", "runs/*", "runs/**"]:
        assert set(names(find_candidates(spec), "runs")) >= {"a", "a/checkpoint-2", "a/checkpoint-10"}
    assert "cannot be read" in find_candidates("runs/self")[0].reason


def test_unreadable_directories_are_rejected(runs, monkeypatch):
    def scandir(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return os_scandir(path)

    os_scandir = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    found = find_candidates("runs")
    assert "Permission denied" in reasons(found, "runs")["b"]
    assert names(found, "runs") == ["a", "a/checkpoint-2", "a/checkpoint-10"]


def test_a_glob_without_matches_is_a_first_run(runs, caplog):
    with caplog.at_level("WARNING"):
        assert find_candidates("nothing/*") == []
    assert "nothing/*" in caplog.text


def test_a_glob_of_this_runs_own_output_says_so(runs, caplog):
    with caplog.at_level("WARNING"):
        assert find_candidates(f"{runs}/*", exclude=[runs]) == []
    assert "this run's own output_dir" in caplog.text


def test_an_empty_directory_is_reported(tmp_path):
    (found,) = find_candidates(tmp_path)
    assert "holds no adapter" in found.reason


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./missing", "does not exist"),
        ("missing", "does not exist"),
        ("/missing/dir", "does not exist"),
        ("runs/a/adapter_config.json", "is a file, expected the directory"),
    ],
)
def test_mistakes_in_a_spec_are_value_errors(runs, spec, message):
    with pytest.raises(ValueError, match=message):
        find_candidates(spec)


def test_a_glob_may_start_above_or_at_home(runs, monkeypatch):
    monkeypatch.chdir(runs / "a")
    assert [item.name for item in find_candidates("../b/*")] == ["../b/checkpoint-1"]
    monkeypatch.setenv("HOME", str(runs.parent))
    assert names(find_candidates("~/runs/b*"), runs) == ["b/checkpoint-1"]


def test_split_weights_are_rejected_with_that_reason(runs):
    weights = runs / "a/adapter_model.safetensors"
    part = weights.rename(weights.with_name("adapter_model-00001-of-00002.safetensors"))
    (runs / "a/adapter_model.safetensors.index.json").write_text("{}")
    assert "its weights are split over several files" in reasons(find_candidates("runs/a"), runs)["a"]
    with pytest.raises(AdapterError, match="its weights are split over several files"):
        held_candidates(Candidate("org/name", repo_id="org/name"), "a" * 40, ["adapter_config.json", part.name])


def test_a_file_is_refused_before_anything_is_looked_for(runs):
    with pytest.raises(ValueError, match="is a file, expected the directory"):
        check_specs("runs/a/adapter_config.json")
