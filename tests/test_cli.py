"""The `mashup` command, in this process but for what only a process of its own shows."""

import configparser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import DatasetDict
from typer.testing import CliRunner

from mashup_callback import __version__
from mashup_callback.candidates import find_candidates
from mashup_callback.cli import app
from mashup_callback.config import MashupConfig
from mashup_callback.without_trainer import finished, save_merge
from tests.hub.conftest import hub  # noqa: F401


ROOT = Path(__file__).parents[1]
COMMANDS = ("find", "rank", "merge", "push", "show")


def mashup(*arguments, cwd):
    """Runs the command offline and returns what it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)], prog_name="mashup")


def process(*command, **environment):
    """Runs Python in a process of its own and returns what it left."""
    environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)


def output(*arguments, **settings):
    """The JSON that a successful command prints: all of stdout, and nothing that JSON does not know."""
    done = mashup(*arguments, "--json", **settings)
    assert done.exit_code == 0, done.stderr
    return strict_json(done.stdout)


def strict_json(text):
    return json.loads(text, parse_constant=lambda constant: pytest.fail(constant))


def failure(*arguments, **settings):
    """The one line in which a command fails."""
    done = mashup(*arguments, **settings)
    assert isinstance(done.exception, SystemExit), done.exception
    return error_line(done.exit_code, done.stderr)


def error_line(code, stderr):
    assert (code, "Traceback" in stderr) == (1, False), stderr
    line = stderr.splitlines()[-1]
    assert line.startswith("mashup: error: ")
    return line


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model, three adapters of it, one of another model, and the same rows in several forms."""
    from tests import tiny

    directory = tmp_path_factory.mktemp("world")
    tiny.llama().save_pretrained(directory / "base")
    tiny.tokenizer().save_pretrained(directory / "base")
    for seed in range(3):
        tiny.save_random_adapter(directory / f"runs/a{seed}", seed, scale=0.05 * seed)
    tiny.save_random_adapter(directory / "other", 0, base=tiny.llama(hidden_size=64))
    tiny.rows("text", 12).to_json(directory / "text.jsonl")
    tiny.rows("chat", 12).to_parquet(directory / "chat.parquet")
    tiny.rows("prompt_completion", 12).save_to_disk(directory / "pairs")
    (directory / "empty.jsonl").touch()
    (directory / "odd.jsonl").write_text('{"question": "w1"}\n')
    DatasetDict(train=tiny.rows("text", 2)).save_to_disk(directory / "splits")
    return directory


def expected_losses(world, kind):
    """NLL per label token of the base and the adapters, from peft and SFTTrainer's own collated batches."""
    import torch
    from peft import PeftModel
    from torch.nn import functional as F

    from tests import tiny

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


def test_help_shows_an_example_of_every_command(tmp_path):
    for command in COMMANDS:
        done = mashup(command, "--help", cwd=tmp_path)
        assert (done.exit_code, done.stderr) == (0, "")
        assert f"Example: mashup {command} " in done.stdout
        assert "--json" in done.stdout
    done = mashup("--help", cwd=tmp_path)
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


def test_help_does_not_wait_for_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['mashup', '--help']\n"
        "try: runpy.run_module('mashup_callback.cli', run_name='__main__')\n"
        "finally: print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = process("-c", code)
    assert done.returncode == 0 and "Usage: mashup" in done.stdout
    assert "typer" in done.stderr.split()
    assert not {"torch", "transformers", "peft", "trl", "datasets", "mergekit"} & {*done.stderr.split()}


def test_stdout_of_a_process_is_the_result_alone(world):
    arguments = ("rank", world / "base", "--dataset", world / "text.jsonl", world / "runs/a1", "--sample-size=4")
    done = process("-m", "mashup_callback.cli", *map(str, arguments), "--json")
    assert done.returncode == 0, done.stderr
    there, here = strict_json(done.stdout), output(*arguments, cwd=world)
    [row], [expected] = there.pop("candidates"), here.pop("candidates")
    assert there == here
    assert row == expected | {"seconds": row["seconds"]}


def test_version_help_and_short_lines(tmp_path):
    assert mashup("--version", cwd=tmp_path).stdout == f"mashup-callback {__version__}\n"
    short = mashup("-h", cwd=tmp_path).stdout
    assert short == mashup("--help", cwd=tmp_path).stdout and "--install-completion" in short
    lines = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["-h"]).stdout.partition("Commands:")[2].strip().splitlines()
    assert len(lines) == len(COMMANDS) + 1 and all(line.endswith(".") and "..." not in line for line in lines)


def test_names_of_long_paths_are_told_apart_at_80_columns(world, tmp_path):
    for run in ("first", "second"):
        shutil.copytree(world / "runs/a1", tmp_path / "a-directory-of-the-team/with-a-long-name" / run / "final")
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["find", str(world / "base"), str(tmp_path / "*/*/*")])
    assert done.exit_code == 0 and {"…/first/final", "…/second/final"} <= {*done.stdout.split()}


def test_merge_says_what_it_did_and_replaces_only_when_told(world, tmp_path):
    arguments = ("merge", "runs/a1", "runs/a2", "--weights=3,1", "--rank=1", "-o", tmp_path / "merged")
    text = mashup(*arguments, cwd=world).stdout
    kept = json.loads((tmp_path / "merged/report.json").read_text())["merge"]["kept_energy"]
    assert f"Merged 2 adapters by linear; rank 1 keeps {kept:.1%} of the merge:" in text
    assert " 75%  runs/a1 (rank 4)\n" in text and " 25%  runs/a2 (rank 4)\n" in text
    assert "--overwrite" in failure(*arguments, cwd=world)
    assert mashup(*arguments, "--overwrite", cwd=world).exit_code == 0


def test_entry_point_leads_to_the_command():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.entry_points"]["console_scripts"].strip().splitlines()
    assert lines == [f"{name} = mashup_callback.cli:app" for name in ("mashup", "hf-mashup")]


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


def test_merge_then_show(world):
    import torch
    from peft import PeftModel

    from tests import tiny

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
    from tests import tiny

    tiny.llama(seed=1).save_pretrained(tmp_path / "full")
    shutil.copytree(world / "runs", tmp_path / "runs")
    [row] = output("find", world / "base", "full", cwd=tmp_path)["candidates"]
    assert (row["kind"], row["reason"]) == ("model", None)
    rows = output("rank", world / "base", "full", "runs/a1", "--dataset", world / "text.jsonl", cwd=tmp_path)
    assert {row["status"] for row in rows["candidates"]} == {"scored"}
    assert "a full model" in failure("merge", "full", "--output", "merged", cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "nothing.json"), "nothing.json"),
        (("show", "text.jsonl"), "not a mashup report"),
        (("push", "runs", "acme/x"), "holds no report.json"),
        (("find", "base", "hub:colour=red"), "unknown key 'colour'"),
        (("rank", "base", "--dataset=text.jsonl", "./nothing"), "does not exist"),
        (("merge", "runs/a1", "runs/a2", "-o", "x", "--weights=1"), "Found 1 weights for 2 adapters"),
        (("merge", "runs/a1", "other", "-o", "x"), "other does not fit runs/a1: its model.layers.0."),
        (("merge", "runs/a1", "runs/a2", "-o", "x", "--method=ties", '--parameters={"density": 2}'), "is 2, expected"),
        (("rank", "nowhere", "--dataset=empty.jsonl", "runs/*"), "has no rows in its split 'train'"),
        (("rank", "nowhere", "--dataset=odd.jsonl", "runs/*"), "has the columns question; expected text, messages"),
        (
            ("rank", "nowhere", "--dataset=splits", "--split=dev", "runs/*"),
            "has no split 'dev', expected one of",
        ),
        (("show", "runs"), "expected a report, the directory of a mashup"),
        # All of these before the model is loaded, and with the words of the command.
        (("rank", "nowhere", "--dataset=missing.jsonl", "runs/*"), "There is no data file 'missing.jsonl'"),
        (("rank", "./nowhere", "--dataset=text.jsonl", "runs/*"), "There is no model directory './nowhere'"),
        (("rank", "base", "--dataset=text.jsonl", "none/*"), "No adapter was found in none/*."),
        (("find", "base", "none/*"), "No adapter was found in none/*."),
        (("find", "base", "other"), "None of the 1 adapters could be used (other: trained on another base model"),
        (("merge", "runs/a1", "-o", "runs"), "runs is not empty. Choose another directory, or pass --overwrite"),
    ],
)
def test_a_failure_is_one_line_and_a_status(world, arguments, words):
    assert words in failure(*arguments, cwd=world)
    assert not (world / "x").exists()


def test_wrong_usage_is_told_apart(tmp_path):
    done = mashup("find", cwd=tmp_path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Missing argument 'MODEL'" in done.stderr


def test_find_merge_and_push_on_the_hub(world, hub, tmp_path):  # noqa: F811
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
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=world,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *successes, refused = json.loads(done.stdout.splitlines()[-1])
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
