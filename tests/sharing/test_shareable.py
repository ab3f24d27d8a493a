"""What leaves the machine on a push has short names for local paths, and nothing that tells of the user."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from mashup_callback import MashupConfig, find_candidates
from mashup_callback.model import base_model_name
from mashup_callback.names import labels, short_names
from mashup_callback.report import CandidateRow, MashupReport
from mashup_callback.sharing.push import push_mashup, share, shared_texts
from mashup_callback.sharing.shareable import refuse_paths, shareable
from mashup_callback.without_trainer import save_merge
from tests.sharing.mashups import REPORT, write_mashup
from tests.tiny import llama, save_random_adapter


def named(*names, **fields):
    rows = tuple(CandidateRow(name, "scored", weight=1 / len(names), loss=1.0) for name in names)
    return replace(REPORT, candidates=rows, **fields)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/data/x/one", "/data/y/two"], ["one", "two"]),
        (["/data/x/run", "/data/y/run", "/data/y/other"], ["x/run", "y/run", "other"]),
        (["/home/me/run", "/home/you/run"], ["run", "run (2)"]),
        (["/runs/a/checkpoint-9", "/runs/b/checkpoint-9"], ["a/checkpoint-9", "b/checkpoint-9"]),
        (["/runs/a/checkpoint-9"], ["a/checkpoint-9"]),
        (["../client/runs/a1", "~/a2", "./a3", "a4/"], ["a1", "a2", "a3", "a4"]),
        (["C:\\Users\\me\\a1", "/"], ["a1", "adapter"]),
    ],
)
def test_short_names(names, short):
    assert short_names(named(*names).candidates) == short


def test_names_on_the_hub_stay_and_rejected_ones_do_not_look_local():
    rows = (
        CandidateRow("acme/one", "scored", "0" * 40),
        CandidateRow("acme/gone", "rejected", reason="not found", repo_id="acme/gone"),
        CandidateRow("collection:acme/a-collection-0123", "rejected", reason="down"),
        CandidateRow("runs/one", "rejected"),
    )
    assert labels(rows)[2] == rows[2].name
    shared = shareable(replace(REPORT, candidates=rows))
    assert [row.name for row in shared.candidates] == ["acme/one", "acme/gone", rows[2].name, "./one"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("identical to /data/secret/runs/a", "identical to ./a"),
        ("identical to /data/secret/runs/a b", "identical to ./a b"),
        ("/data/secret/runs/a/adapter_model.safetensors is gone", "./a/adapter_model.safetensors is gone"),
        ("recorded base model /srv/bob/llama differs", "recorded base model llama differs"),
        ("cannot open file:///srv/bob/x.json, '~/y/z' or C:\\Users\\bob\\w", "cannot open x.json, 'z' or w"),
        ("/home/bob and /Users/bob/", "~ and ~"),
        ("https://huggingface.co/acme/one/tree/main, 1/2/3 and and/or", None),
        ("model.layers.0.q_proj of acme/two/sub/folder", None),
    ],
)
def test_paths_in_sentences(text, expected):
    report = named("/data/secret/runs/a", "/data/secret/runs/a b", reason=text)
    assert shareable(report).reason == (expected or text)


part = st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1, max_size=6)
paths = st.lists(part, min_size=1, max_size=4).map("/".join) | st.lists(part, min_size=1).map(
    lambda parts: "/secret/" + "/".join(parts)
)


@given(st.lists(paths, min_size=1, max_size=5, unique=True))
def test_short_names_differ_and_stay(names):
    shared = shareable(named(*names))
    short = [row.name for row in shared.candidates]
    assert len(set(short)) == len(short)
    assert [row.name for row in shareable(shared).candidates] == short


def test_a_base_at_a_relative_path_is_elsewhere_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("models/llama")
    base = LlamaForCausalLM.from_pretrained("models/llama")
    save_random_adapter("runs/a", 0, base=base)
    save_merge(tmp_path / "merged", find_candidates("runs/a"), MashupConfig(top_k=1))
    write_mashup(tmp_path / "trained", replace(REPORT, base_model=base_model_name(base)))
    monkeypatch.chdir("/")
    for name in ("merged", "trained"):
        assert b"models/llama" not in b"".join(shared_texts(tmp_path / name).values())


def test_a_path_in_the_users_own_words_is_not_pushed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    directory = write_mashup(tmp_path / "mashup")
    card = (directory / "README.md").read_text()
    for path in (tmp_path / "home/notes", directory.resolve()):
        (directory / "README.md").write_text(f"{card}\nSee {path}.\n")
        with pytest.raises(ValueError, match=r"README\.md holds the local path .* nothing was pushed"):
            push_mashup(directory, "acme/x")


def test_a_path_in_the_metadata_of_weights_is_refused(tmp_path):
    directory = write_mashup(tmp_path / "mashup", named("/data/secret/a"))
    weights = directory / "adapter_model.safetensors"
    save_file({"x": torch.zeros(2)}, weights, metadata={"from": "/data/secret/a"})
    with pytest.raises(ValueError, match="holds the local path '/data/secret/a'"):
        refuse_paths({weights.name: weights}, MashupReport.load(directory), directory)


def test_a_trainers_upload_of_a_failed_run_has_no_paths(tmp_path):
    directory = write_mashup(tmp_path / "mashup", named(str(tmp_path / "secret/a")))
    named(str(tmp_path / "secret/b"), reason=f"{tmp_path}/secret/b is gone").save(directory / "failed.json")
    share(directory)
    texts = {path.name: path.read_text() for path in directory.iterdir() if path.suffix != ".safetensors"}
    assert {"README.md", "failed.json", "mergekit.yaml", "report.json"} <= set(texts)
    assert not [name for name, text in texts.items() if str(tmp_path) in text]
    assert MashupReport.load(directory / "failed.json").reason == "./b is gone"
    assert not list(directory.glob(".*"))


PUSH = """
import json, logging, sys
from pathlib import Path
from mashup_callback import MashupCallback
from transformers import LlamaForCausalLM
from tests.tiny import sft_trainer

home, heard = Path.home(), []
class Listener(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())
logging.getLogger("mashup_callback.sharing.push").addHandler(Listener())
logging.getLogger("mashup_callback.sharing.push").setLevel("INFO")

project = home / "client-acme/project"
callback = MashupCallback([str(project / "runs/*"), str(project / "old/0")], top_k=2, sample_size=8, guard=False,
    report_dir=str(project / "out/mashup"))
hub = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
model = LlamaForCausalLM.from_pretrained(project / "base")
trainer = sft_trainer(project / "out", model=model, callbacks=[callback], hub_model_id="acme/trained", **hub)
trainer.train()
trainer.push_to_hub()
pushed = callback.push_to_hub("acme/start", private=True)
print(json.dumps({"names": [row.name for row in callback.report.candidates], "heard": heard}))
"""


def test_a_pushed_repository_tells_nothing_of_the_machine(hub, run_client, tmp_path):
    home = tmp_path / "alice-smith"
    project = home / "client-acme/project"
    for index, name in enumerate(("runs/0", "runs/1", "old/0", "runs/unfit")):
        base = llama(hidden_size=64 if name == "runs/unfit" else 32, name_or_path=str(home / "elsewhere/model"))
        save_random_adapter(project / name, index, scale=0.05, base=base)
    llama().save_pretrained(project / "base")
    environment = hub.environment(tmp_path / "hf", hub.user("bot", ["acme"])) | {"HOME": str(home)}
    result = run_client(PUSH, env=environment, timeout=180)

    assert all(name.startswith(str(project)) for name in result["names"])
    trained = hub.files("acme/trained")
    merge = {name: content for name, content in trained.items() if name.startswith(("mashup/", "README"))}
    assert {"mashup/report.json", "mashup/mergekit.yaml", "mashup/README.md", "README.md"} <= set(merge)
    for files in (hub.files("acme/start"), merge):
        for name, content in files.items():
            for secret in (str(tmp_path), str(home), "alice-smith", "client-acme", "elsewhere"):
                assert secret.encode() not in content, (name, secret)
    report = MashupReport.from_json(hub.files("acme/start")["report.json"].decode())
    assert {row.name for row in report.candidates} == {"./runs/0", "./1", "./old/0", "./unfit"}
    assert any("recorded base model model differs" in text for row in report.candidates for text in row.warnings)
    assert report.config["report_dir"] == "mashup"
    assert "path: ./" in hub.files("acme/start")["mergekit.yaml"].decode()
    [heard] = result["heard"]
    assert heard.startswith("Pushing 6 files to acme/start, which is private: README.md (")
    assert f"report.json ({len(hub.files('acme/start')['report.json']):,} bytes)" in heard
