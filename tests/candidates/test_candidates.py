import os
import string
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mashup_callback import MashupConfig
from mashup_callback.candidates import Candidate, Spec, check_specs, find_candidates, local, parse_spec
from mashup_callback.candidates.search import held_candidates
from mashup_callback.errors import AdapterError
from mashup_callback.formats.adapter import load_factors, read_adapter
from mashup_callback.formats.base import BaseModel
from mashup_callback.full.trainee import FullTrainee
from mashup_callback.lora import save_adapter
from mashup_callback.lora.source import LoraUpdate
from mashup_callback.lowrank import LoraFactors
from mashup_callback.scoring import Score, race
from mashup_callback.storage import Workspace
from tests.tiny import llama


def write_adapter(directory: Path, value: float = 1.0, alpha: float = 2.0) -> Path:
    factors = LoraFactors(torch.full((2, 4), value), torch.ones(3, 2), alpha / 2)
    return save_adapter(directory, {"layers.0.q_proj": factors}, base_model="org/base")


def names(found, root: Path) -> list[str]:
    return [os.path.relpath(item.name, root) for item in found if item.reason is None]


def reasons(found, root: Path) -> dict[str, str]:
    return {os.path.relpath(item.name, root): item.reason for item in found if item.reason}


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Two runs: a (final adapter, checkpoints 2 and 10) and b (checkpoints only), besides things that are neither."""
    root = tmp_path / "runs"
    for value, name in enumerate(["a", "a/checkpoint-10", "a/checkpoint-2", "b/checkpoint-1"], start=1):
        (root / name).mkdir(parents=True, exist_ok=True)
        save_into(root / name, value)
    (root / "a" / "runs-log").mkdir()
    (root / "notes.txt").write_text("not a run")
    monkeypatch.chdir(tmp_path)
    return root


def save_into(directory: Path, value: float) -> None:
    """As a Trainer does: beside whatever the directory already holds."""
    for path in write_adapter(directory.parent / f"{directory.name}.draft", float(value)).iterdir():
        path.replace(directory / path.name)
    (directory.parent / f"{directory.name}.draft").rmdir()


# --- the grammar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs", Spec("path", path="runs")),
        ("runs/*", Spec("path", path="runs/*")),
        ("./org/name", Spec("path", path="./org/name")),
        ("~/runs/x", Spec("path", path="~/runs/x")),
        ("/abs/[ab]", Spec("path", path="/abs/[ab]")),
        ("my runs/x", Spec("path", path="my runs/x")),
        ("org/name/../x", Spec("path", path="org/name/../x")),
        ("org/name", Spec("repo", repo_id="org/name")),
        (" org/name@v1.0 ", Spec("repo", repo_id="org/name", revision="v1.0")),
        ("org/name@refs/pr/1", Spec("repo", repo_id="org/name", revision="refs/pr/1")),
        ("org/na.me/sub/folder@abc", Spec("repo", repo_id="org/na.me", subfolder="sub/folder", revision="abc")),
        ("runs/x/checkpoint-300", Spec("repo", repo_id="runs/x", subfolder="checkpoint-300")),
        (
            "hub:author=acme,search=code,tag=x,tag=y,limit=50,sort=downloads",
            Spec("search", author="acme", search="code", tags=("x", "y"), limit=50, sort="downloads"),
        ),
        ("hub:search=a=b", Spec("search", search="a=b")),
        ("collection:org/best-65f0c1", Spec("collection", collection="org/best-65f0c1")),
    ],
)
def test_parse_spec(text, expected):
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a local directory or a glob"),
        ("  ", "collection:org/slug"),
        ("a\0b", "expected a local directory"),
        ("https://huggingface.co/org/name", "give only the part org/name"),
        ("collections:org/x", "no form of candidate"),
        ("org/name@", "names no revision"),
        ("hub:", "searches for nothing"),
        ("hub:athor=acme", "unknown key 'athor'.*Did you mean 'author'"),
        ("hub:author=", "'author' without a value"),
        ("hub:author=a,author=b", "'author' twice"),
        ("hub:limit=0", "limit is '0', expected a positive number"),
        ("hub:limit=-3", "limit is '-3'"),
        ("hub:limit=1.5", "limit is '1.5'"),
        ("hub:limit=٣", "expected a positive number"),
        ("hub:sort=download", "Did you mean 'downloads'"),
        ("collection:org", "expected collection:org/slug"),
    ],
)
def test_parse_spec_explains_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(text)


@given(st.one_of(st.text(), st.text(string.ascii_letters + "/.@:=,*~- 0", max_size=30)))
@example("hub:limit=" + "9" * 5000)
@settings(max_examples=300, deadline=None)
def test_any_text_parses_or_is_a_value_error_and_round_trips(text):
    try:
        spec = parse_spec(text)
    except ValueError as error:
        assert type(error) is ValueError
    else:
        assert parse_spec(str(spec)) == spec


word = st.from_regex(r"[A-Za-z0-9]{1,8}", fullmatch=True)
searches = st.builds(
    Spec,
    kind=st.just("search"),
    author=word,
    search=st.none() | word,
    tags=st.lists(word, max_size=3).map(tuple),
    limit=st.none() | st.integers(1, 10**9 - 1),
    sort=st.sampled_from([None, "downloads", "likes"]),
)
repos = st.builds(
    Spec,
    kind=st.just("repo"),
    repo_id=st.builds("{}/{}".format, word, word),
    subfolder=st.none() | st.lists(word, min_size=1, max_size=3).map("/".join),
    revision=st.none() | word,
)


@given(st.one_of(searches, repos))
def test_every_spec_is_parsed_back_from_its_text(spec):
    assert parse_spec(str(spec)) == spec


# --- expansion -------------------------------------------------------------------------------------------------------


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


def test_duplicates_keep_the_final_adapter(runs):
    save_into(runs / "a" / "checkpoint-10", 1)
    for specs in ["runs/a", ["runs/a/checkpoint-10", "runs/a"]]:
        found = find_candidates(specs)
        assert sorted(names(found, "runs/a")) == [".", "checkpoint-2"]
        assert reasons(found, "runs/a") == {"checkpoint-10": f"identical to {'runs/a'}"}


def test_equal_tensors_with_another_alpha_are_no_duplicates(tmp_path):
    write_adapter(tmp_path / "x", alpha=2.0)
    write_adapter(tmp_path / "y", alpha=4.0)
    assert names(find_candidates(tmp_path), tmp_path) == ["x", "y"]


def test_the_same_directory_twice_is_listed_once(runs):
    (runs.parent / "link").symlink_to(runs / "b")
    assert names(find_candidates(["runs/b", "link", "runs/*"]), "runs")[0] == "b/checkpoint-1"
    assert len(find_candidates(["runs/b", "link"])) == 1


def test_max_candidates_rejects_what_is_beyond(runs):
    found = find_candidates("runs", max_candidates=2)
    assert names(found, "runs") == ["a", "a/checkpoint-2"]
    assert set(reasons(found, "runs").values()) == {"beyond max_candidates=2"}
    assert len(found) == 4


def test_rejected_candidates_do_not_count_towards_the_maximum(runs):
    save_into(runs / "a" / "checkpoint-2", 1)
    assert names(find_candidates("runs", max_candidates=2), "runs") == ["a", "a/checkpoint-10"]


LAYERS = {"layers.0.q_proj": (4, 3)}


def read_whole(monkeypatch) -> list[str]:
    """Collects the directories whose weights are read as a whole, to find duplicates."""
    found, read = [], local.adapter_hash
    monkeypatch.setattr(local, "adapter_hash", lambda adapter: found.append(adapter.path.name) or read(adapter))
    return found


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Twelve good adapters that come after 150 unfit ones: of another base, broken, or with an unfit configuration."""
    for number in range(150):
        directory = tmp_path / "mixed" / f"a-{number:03d}"
        factors = LoraFactors(torch.ones(2, 5), torch.ones(3, 2), 1.0)
        save_adapter(directory, {"layers.0.q_proj": factors}, base_model="org/other")
        if number % 3 == 1:
            os.truncate(directory / "adapter_model.safetensors", 50)
        if number % 3 == 2:
            (directory / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    for number in range(12):
        write_adapter(tmp_path / "mixed" / f"good-{number:02d}", 1.0 + number)
    return tmp_path / "mixed"


def test_unfit_candidates_do_not_count_towards_the_maximum(mixed, monkeypatch):
    whole = read_whole(monkeypatch)
    found = find_candidates(mixed, max_candidates=10, check=BaseModel(LAYERS).check)
    alone = find_candidates(str(mixed / "good-*"), max_candidates=10, check=BaseModel(LAYERS).check)
    assert [item for item in found if not item.reason] == [item for item in alone if not item.reason]
    assert names(found, mixed) == [f"good-{number:02d}" for number in range(10)]
    assert {name: reasons(found, mixed)[name] for name in ("good-10", "good-11")} == dict.fromkeys(
        ("good-10", "good-11"), "beyond max_candidates=10"
    )
    assert len(found) == 162
    # Their ends differ.
    assert whole == []


def test_only_files_with_the_same_end_are_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_END_BYTES", 8)
    whole = read_whole(monkeypatch)
    for name, (value, last) in {"a": (1.0, 1.0), "b": (1.0, 1.0), "c": (2.0, 1.0), "d": (1.0, 2.0)}.items():
        factors = LoraFactors(torch.full((2, 4), value), torch.full((3, 2), last), 1.0)
        save_adapter(tmp_path / "x" / name, {"layers.0.q_proj": factors}, base_model="acme/base")
    found = find_candidates(tmp_path / "x")
    assert sorted(set(whole)) == ["a", "b", "c"]
    assert reasons(found, tmp_path / "x") == {"b": f"identical to {tmp_path / 'x/a'}"}


def test_without_a_check_nothing_is_judged(mixed):
    assert len(names(find_candidates(mixed), mixed)) > 12


def test_own_output_and_mashups_are_skipped(runs):
    write_adapter(runs / "b" / "mashup" / "adapter", 7.0)
    assert names(find_candidates("runs/b/*/*"), "runs") == []
    (runs / "b" / "mashup" / "report.json").write_text("{}")
    for spec in ["runs", "runs/*", "runs/*/*", "runs/*/*/*", "runs/**"]:
        found = find_candidates(spec, exclude=[runs / "a"])
        assert set(names(found, "runs")) <= {"b/checkpoint-1"}
        assert reasons(found, "runs") == {}
    assert "own output" in find_candidates("runs/b/mashup")[0].reason
    assert "own output" in find_candidates("runs/b/mashup/adapter")[0].reason
    assert "own output" in find_candidates("runs/a/checkpoint-2", exclude=["runs/a"])[0].reason


def test_a_project_that_is_called_mashup_is_no_report(tmp_path):
    write_adapter(tmp_path / "mashup" / "runs" / "x")
    assert names(find_candidates(tmp_path / "mashup" / "runs"), tmp_path) == ["mashup/runs/x"]


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


@pytest.mark.parametrize("spec", ["org/never-seen", "hub:author=never-seen", "collection:org/never-seen"])
def test_without_the_hub_its_forms_are_rejected_with_the_reason(spec):
    (found,) = find_candidates(spec, "org/base")
    assert found.name == spec
    assert found.path is None
    assert "offline" in found.reason


def test_other_types_are_type_errors():
    with pytest.raises(TypeError, match="expected text or a path"):
        find_candidates([3])


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
