"""Everything that the user owns has the same hash before and after, whatever is decided and whatever goes wrong."""

import hashlib
import os
import shutil
import signal

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mashup_callback import MashupCallback, MashupReport
from tests.full_model import save_models
from tests.runs import MASHUP, TRAINERS, contents, forked, owned
from tests.tiny import llama, save_random_adapter, sft_trainer


SHA = "0123456789abcdef0123456789abcdef01234567"
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
KINDS = TRAINERS | {"extracted": sft_trainer}


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


def train(kind, home, *specs, **values):
    callback = MashupCallback([*map(str, specs)], sample_size=8, **values)
    KINDS[kind](home / "out", callbacks=[callback], max_steps=1).train()
    return callback


def specs_of(home, kind, quality, count):
    return sorted((home / "runs" / kind / quality).iterdir())[:count]


def break_merging(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr("mashup_callback.pipeline.choose", fail)


@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("kind", KINDS)
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
@pytest.mark.parametrize("kind", TRAINERS)
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
@pytest.mark.parametrize("kind", TRAINERS)
def test_a_run_that_is_killed(home, kind, stage, monkeypatch):
    specs = specs_of(home, kind, "good", 2)
    train(kind, home, *specs, guard=False)
    before = owned(home)

    def killed():
        # Only the check between the two renames is stopped at: the callback has its own name for the first one.
        monkeypatch.setattr(stage, _killing_at_second(stage))
        train(kind, home, *specs[:1], guard=False)

    assert os.WTERMSIG(forked(killed)) == signal.SIGKILL
    after = owned(home)
    assert {path: after.get(path) for path in before} == before
    train(kind, home, *specs, guard=False)
    assert {path: owned(home).get(path) for path in before} == before


def _killing_at_second(stage):
    if not stage.endswith("refuse_foreign"):
        return kill
    return lambda directory, name=None: kill() if name is not None and "mashup" in str(name) else None


def test_a_full_model_saved_over_a_mashup_is_kept(home):
    train("full", home, *specs_of(home, "full", "good", 1), guard=False)
    llama(seed=5).save_pretrained(home / MASHUP)
    before = contents(home / MASHUP)
    with pytest.raises(ValueError, match="without|with the mark"):
        train("full", home, *specs_of(home, "full", "good", 2), guard=False)
    assert contents(home / MASHUP) == before


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_failed_run_keeps_the_earlier_merge(home, kind, monkeypatch):
    specs = specs_of(home, kind, "good", 2)
    train(kind, home, *specs, guard=False)
    before = contents(home / MASHUP)
    with monkeypatch.context() as context:
        break_merging(context)
        failed = train(kind, home, *specs, guard=False, top_k=1).report
    after = contents(home / MASHUP)
    del after["failed.json"]
    assert after == before and failed.decision == "scratch"
    assert MashupReport.load(home / MASHUP / "failed.json") == failed
    # The next run that succeeds replaces both.
    assert train(kind, home, *specs, guard=False, top_k=1).report.decision == "single"
    assert not (home / MASHUP / "failed.json").exists()
