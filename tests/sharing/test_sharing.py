"""Sharing: the model card, mergekit's configuration, and pushes of the real client to the loopback Hub."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub.errors import OfflineModeIsEnabled
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mashup_callback.candidates import hub_name
from mashup_callback.lora import save_adapter
from mashup_callback.lowrank import LoraFactors
from mashup_callback.report import CandidateRow, MashupReport, MergeInfo
from mashup_callback.sharing.card import base_name, mashup_card, shared_license
from mashup_callback.sharing.push import push_mashup
from mashup_callback.sharing.save import describe, mergekit_recipe, save_failure, save_mashup
from tests.hub.conftest import hub, run_client  # noqa: F401
from tests.hub.views import front_matter
from tests.tiny import save_random_adapter


ADAPTER = {"task_type": "CAUSAL_LM"}
SHA = "0123456789abcdef0123456789abcdef01234567"
MERGE = MergeInfo("linear", "delta", {}, 4, 0.98765, {"q": 0.98765}, 0.0, (), "0.1.5")
SOURCES = (
    CandidateRow("acme/one", "scored", SHA, loss=1.25, weight=0.75, license="mit", datasets=("acme/arc", "other")),
    CandidateRow("acme/two/sub/folder", "scored", SHA, loss=1.5, weight=0.25, license="mit"),
    CandidateRow("acme/three", "eliminated", SHA, loss=2.0, license="gpl"),
)
REPORT = MashupReport(
    decision="merged",
    reason="0.5 below a fresh initialization",
    base_loss=2.0,
    merged_loss=1.4321,
    single_loss=1.5432,
    candidates=SOURCES,
    merge=MERGE,
    base_model="acme/base",
    config={"seed": 7, "base_model": None, "metric": "loss"},
)


def rendered(card):
    """Every Markdown token of a card's body, as an independent parser reads it."""
    body = card.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    return tokens + [child for token in tokens for child in token.children or ()]


def licensed(*licenses):
    return [CandidateRow(f"acme/{index}", "scored", license=name) for index, name in enumerate(licenses)]


# --- the card --------------------------------------------------------------------------------------------------------


def test_card_says_what_was_merged_and_how_good_it_is():
    card = mashup_card(REPORT, ADAPTER)
    about = front_matter(card)
    [index] = about.pop("model-index")
    assert [(item["type"], item["value"]) for item in index["results"][0]["metrics"]] == [("loss", 1.4321)]
    assert about == {
        "base_model": "acme/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "datasets": ["acme/arc"],
        "tags": ["mashup", "merge", "lora"],
    }
    cells = [token.content for token in rendered(card) if token.type == "inline"]
    source = [cells[index : index + 5] for index, cell in enumerate(cells) if f"/tree/{SHA}" in cell]
    assert [[row[0].split("`")[1], *row[1:]] for row in source] == [
        ["acme/one", f"`{SHA}`", "0.7500", "1.2500", "`mit`"],
        ["acme/two/sub/folder", f"`{SHA}`", "0.2500", "1.5000", "`mit`"],
    ]
    links = [token.attrs["href"] for token in rendered(card) if token.type == "link_open"]
    assert [link.split("/", 3)[3] for link in links[-2:]] == [
        f"acme/one/tree/{SHA}",
        f"acme/two/tree/{SHA}/sub/folder",
    ]
    for name, loss in (("fresh initialization", "2.0000"), ("best single adapter", "1.5432"), ("merge", "1.4321")):
        assert cells[cells.index(name) + 1] == loss
    assert "acme/three" not in card
    assert f"mashup merge acme/one@{SHA} acme/two/sub/folder@{SHA} --weights=0.75,0.25 --method=linear" in card
    assert "--seed=7" in card
    assert "Warning" not in card


@pytest.mark.parametrize(
    ("licenses", "expected", "warned"),
    [
        (("mit", "mit"), "mit", False),
        (("MIT ", "mit"), "mit", False),
        (("mit", "apache-2.0"), "other", True),
        (("mit", None), "other", True),
        (("other", "other"), "other", True),
        (("mit\nlicense: apache-2.0",), "other", True),
        (("<b>", "<b>"), "other", True),
        ((None, None), None, False),
        ((), None, False),
    ],
)
def test_license_only_if_the_sources_agree(licenses, expected, warned):
    name, warning = shared_license(licensed(*licenses))
    assert (name, warning is not None) == (expected, warned)
    if warned:
        assert all((f"`{name}`" in warning) for name in licenses if name and name.isprintable())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("acme/base", "acme/base"),
        ("gpt2", "gpt2"),
        (None, None),
        ("", None),
        ("/data/models/base", None),
        ("./base", None),
        ("../acme/base", None),
        ("acme/base/sub", None),
        ("acme/base\ntags: [x]", None),
        (f"/home/me/.cache/huggingface/hub/models--acme--base/snapshots/{SHA}", "acme/base"),
        ("C:\\cache\\models--acme--base\\snapshots\\x", "acme/base"),
    ],
)
def test_hub_name(text, name):
    assert hub_name(text) == name


def test_local_base_is_left_out_unless_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = replace(REPORT, base_model=str(tmp_path))
    card = mashup_card(local, ADAPTER)
    assert "base_model" not in front_matter(card)
    assert str(tmp_path) not in card
    assert "The setting `base_model`" in card
    (tmp_path / "acme" / "base").mkdir(parents=True)
    assert base_name(REPORT) is None
    assert base_name(replace(REPORT, config={"base_model": "acme/base"})) == "acme/base"


def test_card_of_a_merge_that_lost():
    lost = replace(REPORT, decision="scratch", reason="nothing is better")
    assert "not better than a fresh initialization" in mashup_card(lost, ADAPTER)


MARKUP = ("`", "``", "```\n", "|", "\\|", "\\", "\n", "\n---\n", "# h", ": [", "\u202e", "a", " ", "<!-", "<b>")
LINKS = ("[a](b:c)", "![x](http://e.x/y)", "<script>alert(1)</script>", "<!-- comment -->")
hostile = st.text(max_size=40) | st.lists(st.sampled_from(MARKUP + LINKS), max_size=8).map("".join)


@settings(max_examples=100, deadline=None)
@given(names=st.lists(hostile, min_size=1, max_size=3), text=hostile, decision=st.sampled_from(["merged", "scratch"]))
def test_nothing_a_stranger_wrote_is_markup(names, text, decision):
    """HTML, links, images and table cells are only our own, whatever names, licences and parameters hold."""
    rows = tuple(CandidateRow(name, "scored", text, weight=0.5, license=text or None) for name in names)
    merge = replace(MERGE, method=text, space=text, mergekit_version=text, parameters={text: 0.5})
    fields = {"reason": text, "base_model": text, "environment": {text: text}}
    report = replace(REPORT, candidates=rows, merge=merge, decision=decision, **fields)
    card = mashup_card(report, {"task_type": text})
    tokens = rendered(card)
    assert not [token for token in tokens if token.type.startswith("html")]
    assert not [token for token in tokens if token.type == "image"]
    links = [token.attrs["href"] for token in tokens if token.type == "link_open"]
    assert all(link == "https://arxiv.org/abs/2603.10156" or "/tree/" in link for link in links)
    assert sum(token.type == "td_open" for token in tokens) == 5 * len(rows) + 2 * 3
    assert next(token.content for token in tokens if token.type == "inline" and token.level == 1) == "Mashup"
    assert sum(token.type == "heading_open" for token in tokens) == 6
    ours = {"base_model", "base_model_relation", "library_name", "license", "model-index", "pipeline_tag", "tags"}
    assert set(front_matter(card)) <= ours


def test_card_of_a_single_adapter_and_of_local_ones():
    """What others cannot do is not told them, and one adapter is no merge."""
    single = replace(REPORT, decision="single", candidates=(replace(SOURCES[0], weight=3.0), *SOURCES[2:]))
    card = mashup_card(single, ADAPTER)
    assert "the best of the past adapters compared" in card and "merged from" not in card and "Method" not in card
    assert front_matter(card)["model-index"][0]["results"][0]["metrics"][0]["value"] == 1.5432
    assert "| 1.0000 | 1.2500 |" in card and "--weights=3.0" in card
    local = replace(REPORT, candidates=(SOURCES[0], CandidateRow("./b", "scored", weight=1.0)))
    card = mashup_card(local, ADAPTER)
    assert "`./b` is not on the Hub" in card and "mashup merge" not in card


def test_card_shows_the_picture_the_versions_and_what_to_cite(tmp_path):
    save_mashup(tmp_path / "out", replace(REPORT, environment={"python": "3.11", "trl": None}), write_adapter)
    card = (tmp_path / "out/README.md").read_text()
    images = [token.attrs["src"] for token in rendered(card) if token.type == "image"]
    assert images == ["ranking.png"] and (tmp_path / "out/ranking.png").is_file()
    assert "Made with `python 3.11`." in card and "eprint = {2603.10156}" in card


def test_card_of_a_full_model():
    report = replace(REPORT, merge=replace(MERGE, space="weights", rank=0))
    card = mashup_card(report, None)
    assert (front_matter(card)["library_name"], front_matter(card)["tags"]) == ("transformers", ["mashup", "merge"])
    assert front_matter(card)["base_model_relation"] == "finetune"
    assert "A full model of `acme/base`, merged from past models" in card
    assert "peft" not in card and "rank" not in card
    assert "mergekit-yaml mergekit.yaml merged --random-seed=7" in card


@pytest.mark.parametrize(("task_type", "name"), [("SEQ_CLS", "SequenceClassification"), (None, "CausalLM")])
def test_card_uses_the_class_of_the_task(task_type, name):
    assert f"AutoModelFor{name}.from_pretrained('acme/base')" in mashup_card(REPORT, {"task_type": task_type})


# --- the directory ---------------------------------------------------------------------------------------------------


def write_adapter(directory):
    factors = LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    save_adapter(directory, {"q": factors}, base_model="acme/base", task_type="CAUSAL_LM")


def test_directory_holds_what_was_written_its_card_and_the_report(tmp_path):
    local = replace(REPORT, candidates=(CandidateRow(str(tmp_path / "one"), "scored", loss=1.0, weight=1.0),))
    for report in (REPORT, local):
        save_mashup(tmp_path / "out", report, write_adapter)
        files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "mergekit.yaml", "report.json"}
        assert {path.name for path in (tmp_path / "out").iterdir()} == files | {"ranking.png"}
        assert MashupReport.load(tmp_path / "out") == report
    # The card is for others from the start, the other two are for this machine.
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()
    assert str(tmp_path / "one") in (tmp_path / "out/mergekit.yaml").read_text()


def test_nothing_written_has_no_card(tmp_path):
    for write in (None, lambda draft: None):
        save_mashup(tmp_path / "out", replace(REPORT, candidates=()), write)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


def test_a_failed_write_leaves_the_earlier_mashup(tmp_path):
    save_mashup(tmp_path / "out", REPORT, write_adapter)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(draft):
        (draft / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_mashup(tmp_path / "out", REPORT, fail)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    save_failure(tmp_path / "out", replace(REPORT, decision="scratch", reason="failed"))
    assert MashupReport.load(tmp_path / "out") == REPORT
    assert MashupReport.load(tmp_path / "out/failed.json").reason == "failed"


# --- mergekit's configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters", "base"),
    [
        ("linear", {}, None),
        ("ties", {"density": 0.5}, "acme/base"),
        ("ties", {"density": [0.5, 0.25]}, "acme/base"),
        ("slerp", {"t": 0.25}, f"acme/base+acme/one@{SHA}"),
        ("karcher", {}, None),
    ],
)
def test_mergekit_reads_its_configuration(method, parameters, base):
    from mergekit.config import MergeConfiguration

    rows = (SOURCES[0], replace(SOURCES[0], name="acme/two", weight=0.25))
    report = replace(REPORT, merge=replace(MERGE, method=method, parameters=parameters), candidates=rows)
    config = MergeConfiguration.model_validate(yaml.safe_load(mergekit_recipe(report)))
    assert config.merge_method == method
    assert [str(entry.model) for entry in config.models] == [f"acme/base+acme/{x}@{SHA}" for x in ("one", "two")]
    assert (config.base_model and str(config.base_model)) == base
    values = [entry.parameters or {} for entry in config.models]
    if method in ("linear", "ties"):
        assert [value["weight"] for value in values] == [0.75, 0.25]
    for name, value in parameters.items():
        if isinstance(value, list):
            assert [own[name] for own in values] == value
        else:
            assert config.parameters[name] == value


def test_nothing_merged_has_no_configuration():
    assert mergekit_recipe(replace(REPORT, merge=None)) is None
    assert mergekit_recipe(replace(REPORT, candidates=SOURCES[2:])) is None


def test_mergekit_runs_its_configuration_to_the_same_model(tmp_path):
    """mergekit's own run of mergekit.yaml equals the base with our adapter, where no rank is cut."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from mashup_callback.candidates import find_candidates
    from mashup_callback.config import MashupConfig
    from mashup_callback.without_trainer import save_merge
    from tests.tiny import llama

    llama().save_pretrained(tmp_path / "base")
    for seed in range(2):
        save_random_adapter(tmp_path / f"runs/{seed}", seed)
        path = tmp_path / f"runs/{seed}/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    config = MashupConfig(top_k=2, weights=[0.75, 0.25])
    save_merge(tmp_path / "merged", find_candidates(str(tmp_path / "runs/*")), config, rank=8)
    recipe = yaml.safe_load((tmp_path / "merged/mergekit.yaml").read_text())
    options = MergeOptions(copy_tokenizer=False, quiet=True, lora_merge_cache=str(tmp_path / "cache"))
    run_merge(MergeConfiguration.model_validate(recipe), str(tmp_path / "full"), options)
    full = LlamaForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32).state_dict()
    ours = PeftModel.from_pretrained(llama(), tmp_path / "merged").merge_and_unload().state_dict()
    untouched = llama().state_dict()
    assert set(full) == set(ours)
    for name, tensor in full.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5)
    assert (ours["model.layers.0.mlp.up_proj.weight"] - untouched["model.layers.0.mlp.up_proj.weight"]).norm() > 0.1


# --- pushing ---------------------------------------------------------------------------------------------------------


def write_mashup(directory, report=REPORT, base_model="acme/base"):
    """A mashup's directory as a run leaves it."""
    save_random_adapter(directory, 5)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base_model}))
    describe(directory, report)
    report.save(directory / "report.json")
    return directory


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


def test_push(hub, run_client, tmp_path):  # noqa: F811
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
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "mergekit.yaml",
        "report.json",
    }
    for name in ("adapter_model.safetensors", "mergekit.yaml", "report.json"):
        assert files[name] == (named / name).read_bytes()
    card = files["README.md"].decode()
    assert 'PeftModel.from_pretrained(model, "acme/mashup"' in card and "\n# acme/mashup\n" in card
    assert front_matter(card)["license"] == "apache-2.0"
    assert front_matter(card)["model-index"][0]["name"] == "acme/mashup"
    assert card.endswith("My own words.\n")
    assert MashupReport.from_json(files["report.json"].decode()) == REPORT
    assert result["private"] is True
    assert result["same"] is True
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


def test_push_through_the_trainer(hub, run_client, tmp_path):  # noqa: F811
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
