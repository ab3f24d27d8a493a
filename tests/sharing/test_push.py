"""Pushes of the real client to the loopback Hub."""

import json
from dataclasses import replace

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from mashup_callback.report import MashupReport
from mashup_callback.sharing.push import push_mashup
from tests.hub.views import front_matter
from tests.sharing.mashups import FILES, REPORT, write_mashup
from tests.tiny import save_random_adapter


def test_what_cannot_be_pushed(tmp_path):
    with pytest.raises(ValueError, match=r"holds no report\.json, expected the directory of a mashup"):
        push_mashup(tmp_path, "acme/x")
    replace(REPORT, decision="scratch", reason="no candidate was found", merge=None).save(tmp_path / "report.json")
    with pytest.raises(ValueError, match=r"the decision was 'scratch' \(no candidate was found\)"):
        push_mashup(tmp_path, "acme/x")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="cannot be pushed"):
        push_mashup(tmp_path, "acme/x")
    with pytest.raises(ValueError, match="expected its name on the Hub"):
        push_mashup(tmp_path, "acme/x", base_model="/data/base")
    with pytest.raises(ValueError, match="expected an identifier of the Hub such as 'apache-2.0'"):
        push_mashup(write_mashup(tmp_path / "named"), "acme/x", license="my own")


PUSH = """
import json, sys
from pathlib import Path
import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from mashup_callback import push_mashup
from tests.tiny import llama

named, local = sys.argv[1:]
pushed = push_mashup(named, "acme/mashup", private=True)
again = push_mashup(named, "acme/mashup", license="apache-2.0")
opened = push_mashup(local, "other/theirs", create_pr=True)
overridden = push_mashup(local, "acme/overridden", base_model="acme/base")
failures = []
try:
    push_mashup(named, "nobody/x")
except Exception as error:
    failures.append(type(error).__name__)
ours, theirs = (
    {name: value for name, value in PeftModel.from_pretrained(llama(), path).state_dict().items() if "lora_" in name}
    for path in (named, "acme/mashup")
)
print(json.dumps({
    "urls": [pushed, again, opened, overridden], "failures": failures,
    "private": HfApi().model_info("acme/mashup").private,
    "found": [model.id for model in HfApi().list_models(filter=["base_model:adapter:acme/base", "peft"])],
    "recorded": PeftConfig.from_pretrained("acme/mashup").base_model_name_or_path,
    "same": list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours),
}))
"""


def test_push(hub, run_client, tmp_path):
    hub.seed("other/theirs", {"README.md": b"# theirs\n"})
    named = write_mashup(tmp_path / "named")
    local = write_mashup(tmp_path / "local", replace(REPORT, base_model="/data/base"), "/data/base")
    (named / "notes.txt").write_text("not part of it")
    (named / "README.md").write_text((named / "README.md").read_text() + "\nMy own words.\n")
    hub.faults.add("POST /api/repos/create", status=503)
    hub.faults.add("POST /api/models/acme/mashup/commit", status=429, headers={"Retry-After": "1"}, times=2)
    hub.faults.add("POST /api/models/acme/overridden/commit", status=500)
    environment = hub.environment(tmp_path / "hf", hub.user("alice", ["acme"]))
    result = run_client(PUSH, named, local, env=environment, timeout=180)

    files = hub.files("acme/mashup")
    assert set(files) == FILES
    for name in ("adapter_model.safetensors", "mergekit.yaml", "report.json"):
        assert files[name] == (named / name).read_bytes()
    card = files["README.md"].decode()
    assert 'PeftModel.from_pretrained(model, "acme/mashup"' in card and "\n# acme/mashup\n" in card
    assert front_matter(card)["license"] == "apache-2.0"
    assert front_matter(card)["model-index"][0]["name"] == "acme/mashup"
    assert card.endswith("My own words.\n")
    assert MashupReport.from_json(files["report.json"].decode()) == REPORT
    assert result["private"] is True and result["same"] is True
    assert (result["recorded"], result["found"]) == ("acme/base", ["acme/mashup", "acme/overridden"])
    pushed, again, opened, overridden = result["urls"]
    assert again == pushed == f"{hub.url}/acme/mashup"
    assert opened == f"{hub.url}/other/theirs/discussions/1"
    assert overridden == f"{hub.url}/acme/overridden"
    assert result["failures"] == ["HfHubHTTPError"]

    assert hub.files("other/theirs") == {"README.md": b"# theirs\n"}
    foreign = hub.files("other/theirs", "refs/pr/1")
    assert "base_model" not in front_matter(foreign["README.md"].decode())
    assert json.loads(foreign["adapter_config.json"])["base_model_name_or_path"] is None
    own = hub.files("acme/overridden")
    assert front_matter(own["README.md"].decode())["base_model"] == "acme/base"
    assert "Warning" not in own["README.md"].decode()
    assert json.loads(own["adapter_config.json"])["base_model_name_or_path"] == "acme/base"
    commits = [request.status for request in hub.requests if "/acme/mashup/commit" in request.path]
    assert commits == [429, 429, 200, 200]


TRAIN = """
import json, sys
from pathlib import Path
from transformers import Trainer, TrainingArguments
from mashup_callback import MashupCallback
from peft import get_peft_model
from tests.tiny import llama, lora, rows, sft_trainer, tokenizer

runs, output = Path(sys.argv[1]), Path(sys.argv[2])
settings = {"top_k": 2, "sample_size": 8, "guard": False, "base_model": "acme/base"}
hub = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}

callback = MashupCallback([f"{runs}/*"], **settings)
untrained = None
try:
    callback.push_to_hub("acme/none")
except ValueError as error:
    untrained = str(error)
trainer = sft_trainer(output / "sft", callbacks=[callback], hub_model_id="acme/sft", **hub)
trainer.train()
trainer.push_to_hub()
trainer.push_to_hub(dataset_name="words")
merge = callback.push_to_hub("acme/start")

tokens = tokenizer()
data = [dict(tokens(row["text"], truncation=True, max_length=16)) for row in rows()]
data = [{**row, "labels": row["input_ids"]} for row in data]
from transformers import DataCollatorForSeq2Seq
plain = Trainer(
    get_peft_model(llama(), lora()),
    TrainingArguments(str(output / "plain"), hub_model_id="acme/plain", use_cpu=True, report_to="none", **hub),
    train_dataset=data, processing_class=tokens, data_collator=DataCollatorForSeq2Seq(tokens),
    callbacks=[MashupCallback([f"{runs}/*"], **settings)],
)
plain.train()
plain.push_to_hub()
print(json.dumps({
    "untrained": untrained, "merge": merge, "decision": callback.report.decision,
    "left": "create_model_card" in vars(trainer),
}))
"""


def test_push_through_the_trainer(hub, run_client, tmp_path):
    for seed in range(2):
        save_random_adapter(tmp_path / f"runs/{seed}", seed, scale=0.05)
    environment = hub.environment(tmp_path / "hf", hub.user("alice", ["acme"]))
    result = run_client(TRAIN, tmp_path / "runs", tmp_path / "out", env=environment, timeout=180)
    assert "made when training begins" in result["untrained"]
    assert (result["decision"], result["left"]) == ("merged", False)

    for repo_id, words in (("acme/sft", "has been trained using"), ("acme/plain", "This model is a fine-tuned")):
        files = hub.files(repo_id)
        card = files["README.md"].decode()
        assert words in card
        assert "mashup" in front_matter(card)["tags"]
        assert {"mashup/report.json", "mashup/mergekit.yaml", "mashup/README.md"} <= set(files)
        assert "Start of training: a merge of past adapters." in files["mashup/README.md"].decode()
    assert b"words" in hub.files("acme/sft")["README.md"]

    start = hub.files("acme/start")
    saved = tmp_path / "out/sft/mashup"
    assert start["adapter_model.safetensors"] == (saved / "adapter_model.safetensors").read_bytes()
    assert json.loads(start["adapter_config.json"])["base_model_name_or_path"] == "acme/base"
    assert front_matter(start["README.md"].decode())["base_model"] == "acme/base"
    assert result["merge"] == f"{hub.url}/acme/start"


def test_only_the_main_process_pushes(tmp_path, monkeypatch):
    """Another process of a launched group asks the Hub for nothing: here it would fail, as it is offline."""
    directory = write_mashup(tmp_path / "mashup")
    with pytest.raises(OfflineModeIsEnabled):
        push_mashup(directory, "acme/mashup")
    monkeypatch.setattr("mashup_callback.sharing.push.is_main_process", lambda: False)
    assert push_mashup(directory, "acme/mashup") == "acme/mashup"
