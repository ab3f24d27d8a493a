"""Runs that start from the Hub: two processes of one machine, and from the search to the trained model."""

import json
import subprocess
import sys

from tests.candidates.client import BROKEN, CARD, CONFIG, PRELUDE, WEIGHTS
from tests.hub.conftest import REPOSITORY_ROOT
from tests.hub.faults import safetensors_file


def test_one_process_of_a_machine_asks_and_downloads(hub, adapter, tmp_path):
    for number in range(3):
        hub.seed(f"acme/{number}", adapter(number))
    hub.seed("acme/torn", adapter(3))
    hub.faults.add(f"GET /acme/torn/.*{WEIGHTS}", cut_after=None)
    hub.faults.add(f"GET /acme/torn/.*{WEIGHTS}", times=None, status=500)
    script = tmp_path / "rank.py"
    script.write_text(
        PRELUDE
        + """
from accelerate import PartialState
from mashup_callback.distributed import on_main_process, is_first_on_machine, failing_together

state = PartialState(cpu=True)
assert state.num_processes == 2
hub = Hub(asks=is_first_on_machine())
with failing_together():
    found = on_main_process(lambda: find_candidates("hub:author=acme", "acme/base", check=fits, hub=hub))
    with arriving(found, hub) as coming:
        rows = {item.name: [item.reason, item.path and value(item.path)] for item in coming}
Path(sys.argv[1], f"{state.process_index}.json").write_text(json.dumps([rows, hub.requests]))
# Without this the threads of the process group may outlive the interpreter, which then aborts.
state.destroy_process_group()
"""
    )
    environment = hub.environment(tmp_path / "hf_home") | {"PYTHONPATH": str(REPOSITORY_ROOT)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, str(script), str(tmp_path)]
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (first, asked), (second, none) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    expected = {f"acme/{number}": [None, float(number)] for number in range(3)}
    assert {name: row for name, row in first.items() if name != "acme/torn"} == expected
    assert {name: row for name, row in second.items() if name != "acme/torn"} == expected
    assert "HTTP status 500" in first["acme/torn"][0] and second["acme/torn"][0]
    assert none == 0 < asked <= len(hub.requests)
    assert sum("acme/0" in request.path for request in hub.requests) == 9, "once, not once a process"


TRAINING = """
from mashup_callback import MashupCallback
from tests.tiny import lora_parameters, losses, sft_trainer

def train(output_dir, *specs):
    callback = MashupCallback(list(specs), base_model="acme/base", top_k=2, sample_size=32)
    trainer = sft_trainer(output_dir, callbacks=[callback])
    trainer.train()
    norms = {name: tensor.norm().item() for name, tensor in lora_parameters(trainer.model).items()}
    if os.environ.get("PUSH_TO"):
        callback.push_to_hub(os.environ["PUSH_TO"])
    return {"report": json.loads(callback.report.to_json()), "losses": losses(trainer), "norms": norms}

finish(**train(*sys.argv[1:]))
"""


def test_a_search_is_ranked_merged_trained_pushed_and_repeated_offline(hub, ask, library, tmp_path):
    card = CARD.format(base="acme/base", license="mit", tag="code").encode()
    shas = {}
    for directory in sorted(path.parent for path in library.glob(f"*/{WEIGHTS}")):
        files = {name: (directory / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        shas[f"acme/{directory.name}"] = hub.seed(f"acme/{directory.name}", {**files, "README.md": card})
    hub.seed("acme/elsewhere", {**files, "README.md": card.replace(b"acme/base", b"acme/another")})
    hub.seed("acme/liar", {**files, "README.md": card, WEIGHTS: safetensors_file({}, b"x")})
    hub.seed("acme/base", {"README.md": b"# The base"})
    environment = hub.environment(tmp_path / "hf_home", token=hub.user("acme")) | {"OMP_NUM_THREADS": "1"}
    online = ask(TRAINING, tmp_path / "online", "hub:author=acme", env=environment, timeout=180)
    report = online["report"]
    rows = {row["name"]: row for row in report["candidates"]}
    assert report["decision"] in ("merged", "single")
    assert {name: row["revision"] for name, row in rows.items() if row["status"] != "rejected"} == shas
    assert rows["acme/liar"]["status"] == "rejected" and BROKEN in rows["acme/liar"]["reason"]
    assert {row["license"] for row in rows.values() if row["weight"]} == {"mit"}
    assert all(name.startswith("acme/trained") for name, row in rows.items() if row["weight"])
    assert set(rows) == {*shas, "acme/liar"}
    assert 0 < report["hub"]["requests"] <= len(hub.requests) and report["hub"]["seconds"] > 0
    assert report["hub"]["bytes"] == hub.downloaded()

    # The merge is pushed by a run that reads the cache, and found by the next one.
    environment["PUSH_TO"] = "acme/start"
    ask(TRAINING, tmp_path / "pushing", "hub:author=acme", env=environment, timeout=180)
    del environment["PUSH_TO"]
    pushed = (tmp_path / "pushing/mashup" / WEIGHTS).read_bytes()
    assert hub.files("acme/start")[WEIGHTS] == pushed
    hub.reset_log()
    again = ask(TRAINING, tmp_path / "again", "hub:author=acme", env=environment, timeout=180)
    start = next(row for row in again["report"]["candidates"] if row["name"] == "acme/start")
    assert start["status"] == "scored"
    assert start["loss"] <= min(row["loss"] for row in rows.values() if row["loss"]) + 1e-6
    cached = [path for path in (tmp_path / "hf_home").rglob(WEIGHTS) if "acme--start" in str(path)]
    assert [path.read_bytes() for path in cached] == [pushed]
    downloaded = {request.repo_id for request in hub.requests if request.is_download and WEIGHTS in request.path}
    assert downloaded <= {"acme/start", "acme/liar"}

    searched = ask("finish(found=find('hub:author=acme'))", env=environment)["found"]
    hub.reset_log()
    environment["HF_HUB_OFFLINE"] = "1"
    # A search needs the Hub, what it found does not.
    names = [name for name in searched if name != "acme/liar"]
    offline = ask(TRAINING, tmp_path / "offline", *names, env=environment, timeout=180)
    assert hub.requests == [] and offline["report"]["hub"]["requests"] == 0
    assert (offline["losses"], offline["norms"]) == (again["losses"], again["norms"])
    assert {row["name"]: row["loss"] for row in offline["report"]["candidates"]} == {
        row["name"]: row["loss"] for row in again["report"]["candidates"] if row["name"] != "acme/liar"
    }
