"""A directory is replaced only if every file in it is ours, and whole or not at all."""

import errno
import json
import os
import shutil
import signal
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import save_file
from typer.testing import CliRunner

from mashup_callback import MashupCallback, MashupReport, merge_adapters, storage
from mashup_callback.cli import app
from mashup_callback.full.merge import ModelInput, merge_models
from mashup_callback.storage import StorageError, replacing
from tests.runs import MASHUP, begin, contents, forked, hidden, owned, train
from tests.tiny import llama, sft_trainer


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
def shelf(tmp_path, candidates):
    """Two adapters, a third that is trained, and an earlier merge."""
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        shutil.copytree(candidates / f"lora/run-{seed}", tmp_path / name)
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


def test_merge_models_does_not_write_into_a_directory(shelf):
    before = owned(shelf)
    with pytest.raises(ValueError, match="expected a path that nothing has yet"):
        merge_models([ModelInput(shelf / "none")] * 2, shelf / "c", weights=[0.5, 0.5])
    assert owned(shelf) == before


def test_a_second_rename_that_fails_is_rolled_back(shelf, monkeypatch):
    before, rename = owned(shelf), os.rename

    def failing(source, target):
        if Path(target).name == "m" and not str(source).endswith(".old"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    assert run_merge(shelf / "m", shelf / "a") == 1
    assert owned(shelf) == before


def test_a_file_system_that_flushes_no_directories(tmp_path, monkeypatch):
    flush, fails = os.fsync, stat.S_ISDIR

    def fsync(descriptor):
        if fails(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for reason in ("first", "second"):
        with replacing(tmp_path / "out") as draft:
            MashupReport("scratch", reason).save(draft / "report.json")
        assert MashupReport.load(tmp_path / "out").reason == reason and not hidden(tmp_path)
    # A file that is not on the disk is no merge.
    fails = stat.S_ISREG
    with pytest.raises(OSError, match="Invalid"), replacing(tmp_path / "new") as draft:
        (draft / "report.json").touch()
    assert not (tmp_path / "new").exists()


def test_what_appears_while_a_merge_is_made_is_kept(shelf):
    with pytest.raises(StorageError, match=r"thesis\.txt"), replacing(shelf / "m") as draft:
        (draft / "report.json").write_text("{}")
        (shelf / "m/thesis.txt").write_text("years of work")
        before = {path: value for path, value in owned(shelf).items() if not path.startswith(".m")}
    assert owned(shelf) == before


def killed_between_the_renames(target, monkeypatch):
    def write():
        monkeypatch.setattr(storage, "refuse_foreign", lambda path, name=None: name and os.kill(os.getpid(), 9))
        with replacing(target) as draft:
            (draft / "new").write_text("new")

    assert os.WTERMSIG(forked(write)) == signal.SIGKILL and not target.exists()


def test_a_mashup_moved_aside_by_a_killed_run_is_put_back(tmp_path, candidates, monkeypatch):
    merge_adapters(sorted((candidates / "lora").iterdir()), output_dir=tmp_path / MASHUP)
    before = contents(tmp_path / MASHUP)
    killed_between_the_renames(tmp_path / MASHUP, monkeypatch)
    # A run that fails must not take the place of what it cannot see.
    report, _ = train("lora", tmp_path / "out", tmp_path / "none-*")
    after = contents(tmp_path / MASHUP)
    assert report.decision == "scratch" and after.pop("failed.json") and after == before
    killed_between_the_renames(tmp_path / MASHUP, monkeypatch)
    train("lora", tmp_path / "out", candidates / "lora/*")
    assert not [name for name in hidden(tmp_path) if name.endswith(".old")]


def test_what_is_not_ours_is_not_put_back(tmp_path):
    (tmp_path / ".mashup.0123456789ab.old").mkdir()
    (tmp_path / ".mashup.0123456789ab.old/thesis.txt").write_text("years of work")
    storage.prepare(tmp_path / "mashup")
    assert [path.name for path in tmp_path.iterdir()] == [".mashup.0123456789ab.old"]


def test_runs_that_replace_one_directory_at_once(tmp_path):
    def write(number):
        for _ in range(100):
            with replacing(tmp_path / "mashup") as draft:
                MashupReport("scratch", f"by {number}").save(draft / "report.json")

    children = [begin(partial(write, number)) for number in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert MashupReport.load(tmp_path / "mashup").decision == "scratch"
    assert [path.name for path in tmp_path.iterdir()] == ["mashup"]


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
