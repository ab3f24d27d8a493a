"""What each command does, with adapters on disk and on the Hub."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

from mashup_callback.candidates import find_candidates
from mashup_callback.config import MashupConfig
from mashup_callback.without_trainer import finished, save_merge
from tests import tiny
from tests.cli.running import error_line, failure, mashup, output, strict_json


def expected_losses(world, kind):
    """NLL per label token of the base and the adapters, from peft and SFTTrainer's own collated batches."""
    trainer = tiny.sft_trainer(world / "out", train_rows=tiny.rows(kind, 12), max_length=1024)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(12)])
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:]
    losses = {}
    for name in ("base", "runs/a0", "runs/a1", "runs/a2"):
        model = tiny.llama()
        model = PeftModel.from_pretrained(model, world / name) if name != "base" else model
        with torch.no_grad():
            logits = model.eval()(**inputs).logits[:, :-1]
        losses[name] = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)).item()
    return losses


@pytest.mark.parametrize(("kind", "dataset"), [("text", "text.jsonl"), ("chat", "chat.parquet")])
def test_rank_scores_as_training_would(world, kind, dataset):
    expected = expected_losses(world, kind)
    ranked = output("rank", "base", "--dataset", dataset, "runs/*", "other", "--search=exhaustive", cwd=world)
    losses = {row["name"]: row["loss"] for row in ranked["candidates"]}
    assert ranked["base_loss"] == pytest.approx(expected.pop("base"), abs=1e-5)
    assert losses.pop("other") is None
    assert losses == pytest.approx(expected, abs=1e-5)
    assert list(losses) == sorted(expected, key=expected.get)
    assert {row["rows"] for row in ranked["candidates"][:3]} == {12}
    assert ranked["candidates"][3]["status"] == "rejected"


def test_rank_for_people_and_with_nothing_to_rank(world):
    done = mashup("rank", "base", "--dataset=pairs", "--sample-size=4", "runs/a1", cwd=world)
    assert done.exit_code == 0, done.stderr
    assert "runs/a1" in done.stdout
    assert "the base model alone: 4." in done.stdout
    with pytest.MonkeyPatch.context() as patch:
        # What does not fit is known before the model is loaded.
        patch.setattr("transformers.LlamaForCausalLM.from_pretrained", None)
        line = failure("rank", "base", "--dataset=text.jsonl", "other", cwd=world)
    assert "None of the 1 adapters could be used (other: trained on another base model" in line


def test_merge_then_show(world, caplog):
    arguments = ("--weights=0.75,0.25", "--rank=8", "--base-model=acme/base")
    merged = output("merge", "runs/a1", "runs/a2", *arguments, "-o", "merged", cwd=world)
    assert (merged["path"], merged["decision"], merged["base_model"]) == ("merged", "merged", "acme/base")
    assert [(row["name"], row["weight"]) for row in merged["candidates"]] == [("runs/a1", 0.75), ("runs/a2", 0.25)]
    written = {path.name for path in (world / "merged").iterdir()}
    assert written == {"README.md", "adapter_config.json", "adapter_model.safetensors", "mergekit.yaml", "report.json"}
    config = json.loads((world / "merged/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"], config["r"]) == ("acme/base", "CAUSAL_LM", 8)

    def weights(adapter):
        return PeftModel.from_pretrained(tiny.llama(), world / adapter).merge_and_unload().state_dict()

    base, merge, one, two = tiny.llama().state_dict(), weights("merged"), weights("runs/a1"), weights("runs/a2")
    for name in base:
        wanted = base[name] + 0.75 * (one[name] - base[name]) + 0.25 * (two[name] - base[name])
        torch.testing.assert_close(merge[name], wanted, rtol=0, atol=1e-5)

    report = json.loads((world / "merged/report.json").read_text())
    assert output("show", "merged/report.json", cwd=world) == report
    shown = mashup("show", "merged", cwd=world)
    assert "mashup: merged" in shown.stdout
    assert "runs/a2" in shown.stdout
    assert "later run" not in caplog.text
    shutil.copyfile(world / "merged/report.json", world / "merged/failed.json")
    assert "mashup: merged" in mashup("show", "merged", cwd=world).stdout
    assert "mashup show merged/failed.json" in caplog.text


def test_merge_replaces_nothing_but_a_merge(world, tmp_path):
    config = MashupConfig(top_k=1)
    found = find_candidates(str(world / "runs/a1"))
    target = tmp_path / "merged"
    for _ in range(2):
        assert save_merge(target, found, config).decision == "single"
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt and would be replaced"):
        save_merge(target, found, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    assert (target / "notes.txt").read_text() == "mine"


def test_merge_leaves_out_checkpoints_of_finished_runs(world, tmp_path):
    for name, source in (("one", "a0"), ("one/checkpoint-9", "a1"), ("two/checkpoint-9", "a2")):
        shutil.copytree(world / "runs" / source, tmp_path / name)
    names = [Path(item.name).relative_to(tmp_path) for item in finished(find_candidates(str(tmp_path / "*")))]
    assert [*map(str, names)] == ["one", "two/checkpoint-9"]


def test_full_models_are_found_and_ranked_but_not_merged(world, tmp_path):
    tiny.llama(seed=1).save_pretrained(tmp_path / "full")
    shutil.copytree(world / "runs", tmp_path / "runs")
    [row] = output("find", world / "base", "full", cwd=tmp_path)["candidates"]
    assert (row["kind"], row["reason"]) == ("model", None)
    rows = output("rank", world / "base", "full", "runs/a1", "--dataset", world / "text.jsonl", cwd=tmp_path)
    assert {row["status"] for row in rows["candidates"]} == {"scored"}
    assert "a full model" in failure("merge", "full", "--output", "merged", cwd=tmp_path)


def test_find_merge_and_push_on_the_hub(world, hub, run_client, tmp_path, monkeypatch):
    """Adapters of the Hub are found without their weights, merged, pushed and found again."""
    for seed in (1, 2):
        files = {path.name: path.read_bytes() for path in (world / f"runs/a{seed}").iterdir()}
        hub.seed(f"acme/a{seed}", files | {"README.md": b"---\nbase_model: acme/base\nlibrary_name: peft\n---\n"})
    specs, target = ("runs/a1", "acme/a2"), str(tmp_path / "merged")
    commands = [
        ("find", "base", "runs/a1", "other", "hub:author=acme", "--base-model=acme/base", "--json"),
        ("merge", *specs, "-o", target, "--base-model=acme/base", "--json"),
        ("push", target, "acme/start", "--json"),
        ("find", "base", "hub:author=acme", "--base-model=acme/base", "--json"),
        ("push", target, "nobody/x"),
    ]
    # huggingface_hub reads its settings when it is imported.
    code = (
        "import json, sys; from typer.testing import CliRunner; from mashup_callback.cli import app\n"
        "done = [CliRunner().invoke(app, each) for each in json.loads(sys.argv[1])]\n"
        "print(json.dumps([(each.exit_code, each.stdout, each.stderr) for each in done]))"
    )
    environment = hub.environment(tmp_path / "hf", hub.user("alice", ["acme"]))
    monkeypatch.chdir(world)
    *successes, refused = run_client(code, json.dumps(commands), env=environment, timeout=120)
    assert [code for code, _, _ in successes] == [0] * 4, successes
    found, merged, pushed, again = (strict_json(stdout) for _, stdout, _ in successes)
    rows = {row["name"]: row for row in found["candidates"]}
    assert list(rows) == ["runs/a1", "other", "acme/a1", "acme/a2"]
    assert rows["runs/a1"]["bytes"] == (world / "runs/a1/adapter_model.safetensors").stat().st_size
    assert [(row["rank"], row["path"]) for row in rows.values()] == [(4, "runs/a1"), (None, "other"), *[(4, None)] * 2]
    assert "trained on another base model" in rows["other"]["reason"]
    assert [(row["reason"], row["path"], len(row["revision"])) for row in rows.values() if row["repo_id"]] == [
        (None, None, 40)
    ] * 2
    assert found["hub"]["requests"] > 0
    weights = [item for item in hub.requests if "adapter_model.safetensors" in item.path and item.method == "GET"]
    # The search reads headers only, before anything else.
    assert [request.range for request in weights[:2]] == ["bytes=0-131071"] * 2
    whole = [request.path for request in weights if request.range is None]
    assert whole and all("acme/a2" in path for path in whole)

    revisions = [(row["name"], row["revision"]) for row in merged["candidates"]]
    assert revisions == [(name, rows[name]["revision"]) for name in specs]
    assert pushed["url"] == f"{hub.url}/acme/start"
    weights = (tmp_path / "merged/adapter_model.safetensors").read_bytes()
    assert hub.files("acme/start")["adapter_model.safetensors"] == weights
    assert {row["name"]: row["reason"] for row in again["candidates"]}["acme/start"] is None
    assert "HTTP status 403" in error_line(*refused[::2])
