"""Everything that the user owns has the same hash before and after, whatever is decided and whatever goes wrong."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mashup_callback import MashupCallback, MashupReport, merge_adapters
from mashup_callback.cli import app
from mashup_callback.full.merge import ModelInput, merge_models
from mashup_callback.storage import StorageError, replacing
from tests.full_model import full_trainer, save_models
from tests.tiny import llama, save_random_adapter, sft_trainer


SHA = "0123456789abcdef0123456789abcdef01234567"
MASHUP = "out/mashup"
# Decision, settings, and candidates as (good or bad, number).
DECISIONS = {
    "scratch": ("scratch", {}, "bad", 2),
    "scratch-one": ("scratch", {}, "bad", 1),
    "single": ("single", {"guard": False}, "good", 1),
    "merged": ("merged", {"guard": False, "top_k": 2}, "good", 2),
    "auto": (None, {"merge_method": "auto", "top_k": "auto"}, "good", 2),
    "dry-run": ("single", {"guard": False, "dry_run": True}, "good", 1),
    "failed": ("scratch", {}, "good", 2),
}
TRAINERS = {"lora": sft_trainer, "full": full_trainer, "extracted": sft_trainer}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two good and two bad candidates of each kind, with what else a run leaves in their directories."""
    root = tmp_path_factory.mktemp("sources")
    for seed in range(2):
        save_random_adapter(root / f"lora/good/{seed}", seed, scale=0.02)
        save_random_adapter(root / f"lora/bad/{seed}", seed, scale=3.0)
    save_models(root / "full/good", 2, steps=5)
    for directory in sorted((root / "full/good").glob("model-*")):
        shutil.copytree(directory, root / "full/bad" / directory.name)
        # Norms with the other sign turn the logits around.
        for path in (root / "full/bad" / directory.name).glob("*.safetensors"):
            tensors = load_file(path)
            values = {name: -9 * value if name == "model.norm.weight" else value for name, value in tensors.items()}
            save_file(values, path, metadata={"format": "pt"})
    for kind in ("good", "bad"):
        for seed in range(2):
            save_merged_adapter(root / f"extracted/{kind}/{seed}", root / f"lora/{kind}/{seed}")
    for path in root.glob("*/*/*"):
        (path / "optimizer.pt").write_bytes(b"moments")
    return root


def save_merged_adapter(directory, adapter):
    """A full checkpoint whose update has the rank of an adapter."""
    model = PeftModel.from_pretrained(llama(), adapter).merge_and_unload()
    model.save_pretrained(directory, max_shard_size="20KB")


@pytest.fixture
def home(tmp_path, sources):
    """A user's directory: candidates, another run in the output directory, and things beside it."""
    shutil.copytree(sources, tmp_path / "runs")
    (tmp_path / "out/checkpoint-7").mkdir(parents=True)
    for name in ("out/notes.txt", "out/checkpoint-7/optimizer.pt", "thesis.txt"):
        (tmp_path / name).write_text(name)
    return tmp_path


def owned(home):
    """The hash of every file, or the target of a link, except in the mashup's own directory; empty directories too."""
    paths = [path for path in sorted(home.rglob("*")) if MASHUP not in path.relative_to(home).as_posix()]
    return {str(path.relative_to(home)): contents(path) for path in paths}


def contents(path):
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def train(kind, home, *specs, **values):
    callback = MashupCallback([*map(str, specs)], sample_size=8, **values)
    TRAINERS[kind](home / "out", callbacks=[callback], max_steps=1).train()
    return callback


def specs_of(home, kind, quality, count):
    return sorted((home / "runs" / kind / quality).iterdir())[:count]


def break_merging(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr("mashup_callback.pipeline.choose", fail)


@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("kind", TRAINERS)
def test_every_decision(home, kind, name, monkeypatch):
    decision, values, quality, count = DECISIONS[name]
    before = owned(home)
    if name == "failed":
        break_merging(monkeypatch)
    report = train(kind, home, *specs_of(home, kind, quality, count), **values).report
    assert decision in (report.decision, None), report.reason
    assert ("the disk is gone" in report.reason) is (name == "failed")
    assert owned(home) == before
    assert MashupReport.load(home / MASHUP).decision == report.decision
    # What the next run replaces is that of this one alone.
    train(kind, home, *specs_of(home, kind, quality, count)[:1], guard=False)
    assert owned(home) == before


def cached(home, source, repo_id):
    """Puts a directory into the Hub's cache, as the client does: links to contents that are named by their hash."""
    root = home / "cache" / f"models--{repo_id.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True)
    (root / "snapshots" / SHA).mkdir(parents=True)
    for path in source.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, root / "blobs" / digest)
        (root / "snapshots" / SHA / path.name).symlink_to(f"../../blobs/{digest}")
    return f"{repo_id}@{SHA}"


@pytest.mark.parametrize("name", ["scratch-one", "single", "merged"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_hubs_cache(home, kind, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
    decision, values, quality, count = DECISIONS[name]
    found = specs_of(home, kind, quality, count)
    specs = [cached(home, path, f"acme/{index}") for index, path in enumerate(found)]
    before = owned(home)
    report = train(kind, home, *specs, **values).report
    assert report.decision == decision, (report.reason, report.candidates)
    assert owned(home) == before


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "stage",
    [
        "mashup_callback.pipeline.score_candidates",
        "mashup_callback.guard._decide",
        "mashup_callback.sharing.save.plot_ranking",
        "mashup_callback.storage.refuse_foreign",
    ],
)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_that_is_killed(home, kind, stage, monkeypatch):
    specs = specs_of(home, kind, "good", 2)
    train(kind, home, *specs, guard=False)
    before = owned(home)
    child = os.fork()
    if child == 0:
        # Only the check between the two renames is stopped at: the callback has its own name for the first one.
        monkeypatch.setattr(stage, _killing_at_second(stage))
        train(kind, home, *specs[:1], guard=False)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    after = owned(home)
    assert {path: after.get(path) for path in before} == before
    train(kind, home, *specs, guard=False)
    assert {path: owned(home).get(path) for path in before} == before


def _killing_at_second(stage):
    if not stage.endswith("refuse_foreign"):
        return kill
    return lambda directory, name=None: kill() if name is not None and "mashup" in str(name) else None


# What makes of a copy of the earlier merge a directory that may not be replaced.


def trained_over_a_merge(target):
    """The user trains the earlier merge on and saves it where it was: peft leaves the report of the merge there."""
    PeftModel.from_pretrained(llama(), target, is_trainable=True).save_pretrained(target, save_embedding_layers=False)


def with_a_thesis(target):
    (target / "thesis.txt").write_text("years of work")


def with_a_directory(target):
    (target / "README.md").unlink()
    (target / "README.md").mkdir()


def anothers_report(target):
    shutil.rmtree(target)
    target.mkdir()
    (target / "report.json").write_text(json.dumps({"decision": "merged", "reason": "mine"}))


def trained_adapter(target):
    shutil.rmtree(target)
    shutil.copytree(target.with_name("c"), target)


def linked(target):
    shutil.rmtree(target)
    target.symlink_to(target.with_name("c"))


FOREIGN = [trained_adapter, linked, trained_over_a_merge, with_a_thesis, with_a_directory, anothers_report]


@pytest.fixture
def shelf(tmp_path, sources):
    """Two adapters, a third that is trained, and an earlier merge."""
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        shutil.copytree(sources / f"lora/good/{seed}", tmp_path / name)
        (tmp_path / name / "optimizer.pt").unlink()
    run_merge(tmp_path / "m", tmp_path / "a", tmp_path / "b")
    return tmp_path


def run_merge(output, *inputs):
    done = CliRunner().invoke(app, ["merge", *map(str, inputs), "-o", str(output)])
    return done.exit_code


@pytest.mark.parametrize("make", FOREIGN)
def test_what_is_not_ours_is_not_replaced(shelf, make):
    target = shutil.copytree(shelf / "m", shelf / "target")
    make(target)
    before = owned(shelf)
    assert run_merge(target, shelf / "a", shelf / "b") == 1
    assert owned(shelf) == before
    with pytest.raises(ValueError, match="would be replaced"):
        merge_adapters([shelf / "a", shelf / "b"], output_dir=target)
    assert owned(shelf) == before
    callback = MashupCallback([str(shelf / "a")], report_dir=str(target))
    with pytest.raises(ValueError, match="would be replaced"):
        sft_trainer(shelf / "out", callbacks=[callback], max_steps=1).train()
    assert owned(shelf) == before | ({"out": "directory"} if (shelf / "out").exists() else {})


@pytest.mark.parametrize("output", ["m", "m/new", "."])
def test_an_output_that_is_an_input_is_refused(shelf, output):
    before = owned(shelf)
    assert run_merge(shelf / output, shelf / "a", shelf / "m") == 1
    with pytest.raises(ValueError, match="is, contains or lies inside the input"):
        merge_adapters([shelf / "a", shelf / "m"], output_dir=shelf / output)
    assert owned(shelf) == before


def test_a_mashup_is_not_written_over_a_candidate(shelf):
    before = owned(shelf)
    callback = MashupCallback([str(shelf / "a"), str(shelf / "m")], report_dir=str(shelf / "m"))
    with pytest.raises(ValueError, match="would be written to the candidate"):
        sft_trainer(shelf / MASHUP, callbacks=[callback], max_steps=1).train()
    assert {path: owned(shelf)[path] for path in before} == before


def test_an_earlier_merge_is_replaced(shelf):
    first = (shelf / "m/adapter_model.safetensors").read_bytes()
    assert run_merge(shelf / "m", shelf / "a") == 1
    assert (shelf / "m/adapter_model.safetensors").read_bytes() == first
    assert run_merge(shelf / "m", shelf / "a", "--overwrite") == 0
    assert (shelf / "m/adapter_model.safetensors").read_bytes() != first
    merge_adapters([shelf / "a", shelf / "b"], output_dir=shelf / "n")
    merge_adapters([shelf / "a"], output_dir=shelf / "n")


def test_a_full_model_saved_over_a_mashup_is_kept(home):
    train("full", home, *specs_of(home, "full", "good", 1), guard=False)
    llama(seed=5).save_pretrained(home / MASHUP)
    before = {path.name: contents(path) for path in (home / MASHUP).iterdir()}
    with pytest.raises(ValueError, match="without|with the mark"):
        train("full", home, *specs_of(home, "full", "good", 2), guard=False)
    assert {path.name: contents(path) for path in (home / MASHUP).iterdir()} == before


def test_merge_models_does_not_write_into_a_directory(shelf):
    before = owned(shelf)
    with pytest.raises(ValueError, match="expected a path that nothing has yet"):
        merge_models([ModelInput(shelf / "none")] * 2, shelf / "c", weights=[0.5, 0.5])
    assert owned(shelf) == before


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_failed_run_keeps_the_earlier_merge(home, kind, monkeypatch):
    specs = specs_of(home, kind, "good", 2)
    train(kind, home, *specs, guard=False)
    before = {path.name: contents(path) for path in (home / MASHUP).iterdir()}
    with monkeypatch.context() as context:
        break_merging(context)
        failed = train(kind, home, *specs, guard=False, top_k=1).report
    after = {path.name: contents(path) for path in (home / MASHUP).iterdir()}
    del after["failed.json"]
    assert after == before and failed.decision == "scratch"
    assert MashupReport.load(home / MASHUP / "failed.json") == failed
    # The next run that succeeds replaces both.
    assert train(kind, home, *specs, guard=False, top_k=1).report.decision == "single"
    assert not (home / MASHUP / "failed.json").exists()


def test_a_second_rename_that_fails_is_rolled_back(shelf, monkeypatch):
    before, rename = owned(shelf), os.rename

    def failing(source, target):
        if Path(target).name == "m" and not str(source).endswith(".old"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    assert run_merge(shelf / "m", shelf / "a") == 1
    assert owned(shelf) == before


def test_what_appears_while_a_merge_is_made_is_kept(shelf):
    with pytest.raises(StorageError, match=r"thesis\.txt"), replacing(shelf / "m") as draft:
        (draft / "report.json").write_text("{}")
        (shelf / "m/thesis.txt").write_text("years of work")
        before = {path: value for path, value in owned(shelf).items() if not path.startswith(".m")}
    assert owned(shelf) == before


NAMES = ["report.json", "README.md", "adapter_config.json", "adapter_model.safetensors", "ranking.png"]


@settings(max_examples=60, deadline=None)
@given(
    ours=st.sets(st.sampled_from(NAMES)),
    others=st.sets(st.sampled_from(["optimizer.pt", ".git", "report.json.bak", "model.safetensors", "plots/a.png"])),
    marked=st.booleans(),
)
@example(ours={"report.json", "adapter_config.json"}, others=set(), marked=True)
def test_only_marked_directories_with_our_files_alone_are_replaced(tmp_path_factory, ours, others, marked):
    target = tmp_path_factory.mktemp("any") / "target"
    target.mkdir()
    for name in [*others, *sorted(ours - {"report.json"}), *(ours & {"report.json"})]:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(b"{}")
    if marked and "report.json" in ours:
        MashupReport("scratch", "why").save(target / "report.json")
    if marked and "adapter_model.safetensors" in ours:
        (target / "adapter_model.safetensors").unlink()
        metadata = {"format": "pt", "producer": "mashup_callback"}
        save_file({"x": torch.zeros(1)}, target / "adapter_model.safetensors", metadata=metadata)
    before = owned(target)
    carries = marked and bool(ours & {"report.json", "adapter_model.safetensors"})
    is_model = "model.safetensors" in others and "adapter_model.safetensors" not in ours
    strange = others - ({"model.safetensors"} if is_model else set())
    # An adapter's configuration is never written without its weights.
    alone = "adapter_config.json" in ours and "adapter_model.safetensors" not in ours
    allowed = not before or (carries and not strange and not alone)
    try:
        with replacing(target) as draft:
            (draft / "new").write_text("new")
        assert allowed and [path.name for path in target.iterdir()] == ["new"]
    except StorageError:
        assert not allowed and owned(target) == before
