"""Full models on the loopback Hub: found, judged before any shard is downloaded, merged, pushed and read again."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from mashup_callback import MashupCallback
from tests.candidates.client import PRELUDE, usable
from tests.full.damage import BAD as CHECKPOINTS
from tests.full_model import full_trainer, same, save_models
from tests.hostile.damage import INDEX, changed
from tests.hub.views import front_matter
from tests.tiny import llama, save_random_adapter


CARD = b"---\nbase_model: acme/base\nlicense: mit\n---\n# A fine-tune\n"

MODELS = """
from functools import partial
from mashup_callback import MashupCallback
from mashup_callback.full import merge as full_merge
from tests.full_model import full_trainer
from tests.tiny import llama, losses, sft_trainer

def train(make, output, *specs, **settings):
    callback = MashupCallback(list(specs), base_model="acme/base", **{"guard": False, **settings})
    trainer = make(output, callbacks=[callback], max_steps=1)
    trainer.train()
    return callback, {"report": json.loads(callback.report.to_json()), "losses": losses(trainer)}

find = partial(find, check=BaseModel.of(llama()).check, relations=("adapter", "finetune"))
"""


@pytest.fixture
def ask(run_client):
    return lambda program, *args, **settings: run_client(PRELUDE + MODELS + program, *args, **settings)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two trained checkpoints, each in several shards."""
    return save_models(tmp_path_factory.mktemp("models"), 2)


def contents(directory, card=CARD, folder=""):
    files = {folder + path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}
    return {**files, "README.md": card}


def shards(hub, repo_id=None, whole=True):
    """Paths of the shards that were downloaded as a whole, or of which a part was read."""
    found = [request for request in hub.requests if request.is_download and ".safetensors" in request.path]
    found = [request for request in found if not request.path.endswith(".json")]
    return [
        request.path
        for request in found
        if repo_id in (None, request.repo_id) and (request.range is None) is whole and request.method == "GET"
    ]


# What the header of a file tells, and its size.
BAD = {name: case for name, case in CHECKPOINTS.items() if name != "not_finite"}
BAD["huge_index"] = (changed(INDEX, lambda data: b" " * 50_000_001 + data), "expected a small file")


def test_what_does_not_fit_is_rejected_before_any_shard_is_downloaded(hub, fetch, models, tmp_path):
    good = contents(models / "model-0")
    hub.seed("acme/good", good)
    for name, (damage, _) in BAD.items():
        damage(shutil.copytree(models / "model-0", tmp_path / name))
        hub.seed(f"bad/{name}", contents(tmp_path / name))
    found = fetch("acme/good", *(f"bad/{name}" for name in BAD))
    assert usable(found) == ["acme/good"] and found["acme/good"]["kind"] == "model"
    for name, (_, reason) in BAD.items():
        assert re.search(reason, found[f"bad/{name}"]["reason"]), name
    names = {name for name in good if name.endswith(".safetensors")}
    assert sorted(path.rpartition("/")[2] for path in shards(hub)) == sorted(names)
    assert {path.split("/")[1] for path in shards(hub)} == {"acme"}
    assert not any(request.path.endswith(".bin") for request in hub.requests)
    assert found["acme/good"]["bytes"] == sum(len(good[name]) for name in names)
    for name in names:
        assert (Path(found["acme/good"]["path"]) / name).read_bytes() == good[name]


def test_max_download_gb_counts_the_shards(hub, ask, models):
    size = sum(len(data) for name, data in contents(models / "model-0").items() if name.endswith(".safetensors"))
    for index in range(2):
        hub.seed(f"acme/{index}", contents(models / f"model-{index}"))
    program = "finish(found=find(['acme/0', 'acme/1'], fetch=True, max_download_gb=float(sys.argv[1])))"
    found = ask(program, 1.5 * size / 1e9)["found"]
    assert usable(found) == ["acme/0"]
    assert "would exceed max_download_gb" in found["acme/1"]["reason"]
    assert shards(hub, "acme/0") and not shards(hub, "acme/1")


def test_folders_and_what_the_cache_holds(hub, fetch, offline, models):
    files = contents(models / "model-0", folder="checkpoint-5/") | contents(models / "model-1", folder="checkpoint-9/")
    sha = hub.seed("acme/runs", files)
    both = fetch("acme/runs")
    assert usable(both) == ["acme/runs/checkpoint-5", "acme/runs/checkpoint-9"]
    hub.reset_log()
    assert fetch(f"acme/runs/checkpoint-5@{sha}")["acme/runs/checkpoint-5"]["path"]
    assert hub.requests == []
    assert usable(fetch("acme/runs", env=offline)) == usable(both)


def test_a_model_that_was_downloaded_before_is_used_offline(hub, run_client, ask, offline, models):
    hub.seed("acme/one", contents(models / "model-0"))
    loading = "from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
    loading += "A.from_pretrained('acme/one'), T.from_pretrained('acme/one')\nprint('null')"
    run_client(loading)
    found = ask("finish(found=find('acme/one'))", env=offline)["found"]
    assert usable(found) == ["acme/one"] and found["acme/one"]["kind"] == "model"


# --- from the search to the trained model, and back to the Hub -------------------------------------------------------

TRAINING = """
callback, result = train(full_trainer, *sys.argv[1:], on_error="raise", top_k=2)
finish(**result)
"""


def test_a_search_offers_fine_tunes_to_full_training(hub, ask, models, tmp_path):
    shas = [hub.seed(f"acme/{index}", contents(models / f"model-{index}")) for index in range(2)]
    save_random_adapter(tmp_path / "adapter", 0, scale=3.0)
    hub.seed("acme/adapter", contents(tmp_path / "adapter", CARD.replace(b"license", b"library_name: peft\nlicense")))
    hub.seed("acme/elsewhere", contents(models / "model-0", CARD.replace(b"acme/base", b"acme/other")))
    environment = hub.environment(tmp_path / "hf_home")
    online = ask(TRAINING, tmp_path / "online", "hub:author=acme", env=environment, timeout=180)
    rows = {row["name"]: row for row in online["report"]["candidates"]}
    assert set(rows) == {"acme/0", "acme/1", "acme/adapter"}
    assert [rows[f"acme/{index}"]["weight"] for index in range(2)] == [0.5, 0.5]
    assert [rows[f"acme/{index}"]["revision"] for index in range(2)] == shas
    paths = shards(hub)
    assert len(paths) == len(set(paths)), "every file once"

    local = MashupCallback(str(models / "model-*"), guard=False, on_error="raise")
    full_trainer(tmp_path / "local", callbacks=[local], max_steps=1).train()
    merges = [(tmp_path / name / "mashup/model.safetensors").read_bytes() for name in ("online", "local")]
    assert merges[0] == merges[1]
    recipe = (tmp_path / "online/mashup/mergekit.yaml").read_text()
    assert all(f"acme/{index}@{sha}" in recipe for index, sha in enumerate(shas))
    assert str(tmp_path) not in recipe

    hub.reset_log()
    environment["HF_HUB_OFFLINE"] = "1"
    # A search needs the Hub, what it found does not.
    names = ["acme/0", "acme/1", "acme/adapter"]
    offline = ask(TRAINING, tmp_path / "offline", *names, env=environment, timeout=180)
    assert hub.requests == []
    assert offline["losses"] == online["losses"]


LORA = """
named, _ = train(sft_trainer, sys.argv[1] + "/named", "acme/one", "acme/wide", min_kept_energy=0.0)
searched, _ = train(sft_trainer, sys.argv[1] + "/searched", "hub:author=acme")
finish(named=json.loads(named.report.to_json()), searched=json.loads(searched.report.to_json()))
"""


def test_a_lora_trainee_takes_a_model_that_is_named_and_searches_for_adapters(hub, ask, models, tmp_path):
    hub.seed("acme/one", contents(models / "model-0"))
    llama(hidden_size=48, num_attention_heads=4).save_pretrained(tmp_path / "wide")
    hub.seed("acme/wide", contents(tmp_path / "wide"))
    result = ask(LORA, tmp_path, timeout=180)
    one, wide = sorted(result["named"]["candidates"], key=lambda row: row["name"])
    assert one["weight"] == 1.0 and "of its full update" in one["warnings"][0]
    assert wide["status"] == "rejected" and "another architecture" in wide["reason"]
    assert not shards(hub, "acme/wide")
    assert result["searched"]["decision"] == "scratch" and not result["searched"]["candidates"]


PUSHING = """
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
full_merge.MAX_SHARD_BYTES = 20_000
callback, _ = train(full_trainer, sys.argv[1], sys.argv[2], on_error="raise", top_k=2)
url = callback.push_to_hub("acme/start")
from mashup_callback.cli import app
app(["push", sys.argv[1] + "/mashup", "acme/again", "--private"], standalone_mode=False)
AutoModelForCausalLM.from_pretrained("acme/start").save_pretrained(sys.argv[1] + "/read")
finish(url=url, found=find("hub:author=acme"))
"""


def test_push_of_a_full_merge(hub, ask, models, tmp_path):
    environment = hub.environment(tmp_path / "hf_home", token=hub.user("acme"))
    result = ask(PUSHING, tmp_path / "out", models / "model-*", env=environment, timeout=180)
    assert result["url"].startswith(f"{hub.url}/acme/start")
    files, merge = hub.files("acme/start"), tmp_path / "out/mashup"
    names = {name for name in files if name.endswith(".safetensors")}
    assert len(names) > 2 and {*json.loads(files[INDEX])["weight_map"].values()} == names
    assert all(files[name] == (merge / name).read_bytes() for name in names)
    assert {"config.json", "report.json", "README.md"} <= set(files) == set(hub.files("acme/again"))
    card = files["README.md"].decode()
    assert front_matter(card)["base_model"] == "acme/base" and front_matter(card)["library_name"] == "transformers"
    assert 'from_pretrained("acme/start")' in card
    read = load_file(tmp_path / "out/read/model.safetensors")
    assert same(read, LlamaForCausalLM.from_pretrained(merge, dtype=torch.float32).state_dict())
    assert "acme/start" in usable(result["found"])
