"""The unmodified Hub client against the loopback Hub: what is found, what is asked for, and what goes wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mashup_callback.lora import save_adapter
from mashup_callback.lowrank import LoraFactors
from tests.hub import conftest
from tests.hub.faults import BROKEN_CARD, safetensors_file


hub, run_client = conftest.hub, conftest.run_client
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BROKEN = "truncated, padded or no safetensors"
CARD = "---\nbase_model: {base}\nlibrary_name: peft\nlicense: {license}\ntags: [{tag}]\n---\n# An adapter\n"

PRELUDE = """
import json, logging, os, sys, time
from pathlib import Path
from mashup_callback.formats.adapter import load_factors, read_adapter
from mashup_callback.formats.base import BaseModel
from mashup_callback.candidates import Hub, arriving, find_candidates, hub as hub_module

LAYERS = {"layers.0.q_proj": (4, 3)}
fits = BaseModel(LAYERS, name="acme/base").check

def find(specs, base="acme/base", fetch=False, connection=None, **limits):
    connection = connection or Hub()
    found = find_candidates(specs, base, check=BaseModel(LAYERS, name=base).check, hub=connection, **limits)
    if fetch:
        with arriving(found, connection) as coming:
            found = list(coming)
    rows = {}
    for item in found:
        path = None if item.path is None else str(item.path)
        rows[item.name] = {"revision": item.revision, "reason": item.reason, "path": path, "bytes": item.bytes,
                           "license": item.license, "run": item.run}
    return rows

def value(path):
    return load_factors(read_adapter(path))["layers.0.q_proj"].A[0, 0].item()

def finish(**results):
    print(json.dumps(results))
"""


@pytest.fixture
def adapter(tmp_path):
    """Makes the files of a tiny adapter: every element of A is `value`."""

    def make(value=1.0, *, base="acme/base", license="mit", tag="code", features=4, rank=2, folder="", **config):
        factors = LoraFactors(torch.full((rank, features), float(value)), torch.ones(3, rank), 1.0)
        directory = save_adapter(tmp_path / "draft", {"layers.0.q_proj": factors}, base_model=base)
        settings = json.loads((directory / CONFIG).read_text()) | config
        files = {CONFIG: json.dumps(settings).encode(), WEIGHTS: (directory / WEIGHTS).read_bytes()}
        card = {"README.md": CARD.format(base=base, license=license, tag=tag).encode()}
        return {folder + name: data for name, data in files.items()} | card

    return make


def usable(rows):
    return [name for name, row in rows.items() if row["reason"] is None]


def reasons(rows):
    return {name: row["reason"] for name, row in rows.items() if row["reason"]}


def whole_files(hub):
    """Repositories of which files were downloaded as a whole, not by a range."""
    return {request.repo_id for request in hub.requests if request.is_download and request.range is None}


# --- finding ---------------------------------------------------------------------------------------------------------


def test_every_form_finds_adapters_at_a_commit(hub, run_client, adapter, tmp_path):
    old = hub.seed("acme/one", adapter(1))
    new = hub.seed("acme/one", adapter(2), downloads=5)
    two = hub.seed("acme/two", adapter(3, license="apache-2.0", tag="maths"), downloads=9)
    hub.seed("other/three", adapter(4))
    hub.seed("acme/elsewhere", adapter(5, base="acme/another-base"))
    hub.seed("acme/broken", {**adapter(6), "README.md": BROKEN_CARD})
    hub.seed("acme/runs", adapter(7, folder="final/") | adapter(8, folder="checkpoint-10/") | {"notes.txt": b""})
    hub.seed("acme/mirror-4bit", {"README.md": b"---\nbase_model: acme/base\nbase_model_relation: quantized\n---\n"})
    hub.seed("acme/of-mirror", adapter(9, base="acme/mirror-4bit"))
    hub.seed("acme/secret", adapter(10), private=True)
    hub.seed("acme/gated", adapter(11), gated=True)
    hub.collection("acme/best-0123", ["acme/two", "acme/none", "acme/one"])
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps({"_name_or_path": "acme/base"}))
    carded = tmp_path / "carded"
    carded.mkdir()
    (carded / "README.md").write_text("---\nbase_model: [acme/base]\n---\n")
    cached = tmp_path / "models--acme--base" / "snapshots" / old
    cached.mkdir(parents=True)
    (cached / "README.md").write_text("---\nbase_model: [unclosed\n---\n")
    program = """
old, copy, carded, cached = sys.argv[1:]
finish(
    repo=find("acme/one"), pinned=find(f"acme/one@{old}"), short=find(f"acme/one@{old[:8]}"),
    branch=find("acme/one@main"), folder=find("acme/runs/checkpoint-10"), folders=find("acme/runs"),
    everything=find("hub:sort=downloads"), mine=find("hub:author=acme,search=o,tag=code"),
    limited=find("hub:sort=downloads,limit=1"), collection=find("collection:acme/best-0123"),
    mirror=find("hub:search=one", base="acme/mirror-4bit"), of_mirror=find("hub:search=of", base="acme/mirror-4bit"),
    copies=[find("hub:search=one", base=path) for path in (copy, carded, cached)],
    unnamed=find("hub:author=acme", base=None),
    licenses=find("hub:sort=downloads", allow_licenses=["Apache-2.0"]),
    authors=find(["other/three", "acme/one"], allow_authors=["other"]),
    few=find("hub:sort=downloads", max_candidates=1),
    small=find(["acme/one", "acme/two"], max_download_gb=600e-9),
    wrong=find(["acme/none", "acme/one@none", "acme/one/none", "acme/secret", "acme/gated", "collection:acme/none"]),
)
"""
    found = run_client(PRELUDE + program, old, copy, carded, cached)
    assert found["repo"]["acme/one"]["revision"] == found["branch"]["acme/one"]["revision"] == new
    assert found["pinned"]["acme/one"]["revision"] == found["short"]["acme/one"]["revision"] == old
    assert found["repo"]["acme/one"]["bytes"] == len(adapter()[WEIGHTS])
    assert found["repo"]["acme/one"]["license"] == "mit"
    assert usable(found["folder"]) == ["acme/runs/checkpoint-10"]
    assert usable(found["folders"]) == ["acme/runs/checkpoint-10", "acme/runs/final"]
    assert found["folder"]["acme/runs/checkpoint-10"]["run"] == "acme/runs"
    # The broken card has no tags by which a search could find it; it does not disturb the others.
    assert usable(found["everything"]) == ["acme/two", "acme/one", "other/three"]
    assert found["everything"]["acme/two"]["revision"] == two
    assert set(reasons(found["everything"])) == {"acme/gated"}
    assert usable(found["mine"]) == ["acme/one"]
    assert usable(found["limited"]) == ["acme/two"]
    assert usable(found["collection"]) == ["acme/two", "acme/one"]
    assert "there is no acme/none" in found["collection"]["acme/none"]["reason"]
    assert [usable(rows) for rows in (found["mirror"], *found["copies"])] == [["acme/one"]] * 4
    assert usable(found["of_mirror"]) == ["acme/of-mirror"]
    assert "set `base_model`" in found["unnamed"]["hub:author=acme"]["reason"]
    assert usable(found["licenses"]) == ["acme/two"]
    assert found["licenses"]["acme/one"]["reason"] == "its license mit is not in allow_licenses"
    assert usable(found["authors"]) == ["other/three"]
    assert "acme is not in allow_authors" in found["authors"]["acme/one"]["reason"]
    assert usable(found["few"]) == ["acme/two"]
    assert set(reasons(found["few"]).values()) >= {"beyond max_candidates=1"}
    assert usable(found["small"]) == ["acme/one"]
    assert "would exceed max_download_gb" in found["small"]["acme/two"]["reason"]
    wrong = reasons(found["wrong"])
    assert len(wrong) == 6
    assert "there is no acme/none" in wrong["acme/none"]
    assert "no such revision" in wrong["acme/one"]
    assert "holds no adapter" in wrong["acme/one/none"]
    assert "private" in wrong["acme/secret"] and "hf auth login" in wrong["acme/secret"]
    assert f"ask for access at {hub.url}/acme/gated" in wrong["acme/gated"]
    assert "HTTP status 404" in wrong["collection:acme/none"]
    assert whole_files(hub) == set()

    hub.grant("acme/gated", "guest")
    source = PRELUDE + "finish(found=find(['acme/gated', 'acme/secret'], fetch=True))"
    guest = run_client(source, env=hub.environment(tmp_path / "guest", hub.user("guest")))["found"]
    member = run_client(source, env=hub.environment(tmp_path / "member", hub.user("member", ["acme"])))["found"]
    assert usable(guest) == ["acme/gated"]
    assert usable(member) == ["acme/gated", "acme/secret"]


def test_only_the_compatible_of_a_thousand_are_downloaded(hub, run_client, adapter):
    kinds = [
        adapter(features=5),
        adapter(peft_type="IA3"),
        adapter(layer_replication=[[0, 1]]),
        {"README.md": adapter()["README.md"], CONFIG: adapter()[CONFIG], "adapter_model.bin": b"pickle"},
    ]
    fitting = {f"org-{number % 7}/adapter-{number:04d}" for number in range(13, 1000, 50)}
    for number in range(1000):
        name = f"org-{number % 7}/adapter-{number:04d}"
        hub.seed(name, adapter(number) if name in fitting else kinds[number % 4])
    hub.seed("acme/elsewhere", adapter(base="acme/another-base"))
    program = """
connection = Hub()
found = find("hub:limit=2000", connection=connection, fetch=True, max_candidates=2000)
values = {name: value(row["path"]) for name, row in found.items() if row["path"]}
finish(found=found, values=values, traffic=connection.traffic())
"""
    result = run_client(PRELUDE + program)
    assert len(result["found"]) == 1000
    assert set(usable(result["found"])) == fitting
    assert result["values"] == {name: float(name[-4:]) for name in fitting}
    assert whole_files(hub) == fitting
    assert not any(request.path.endswith(".bin") for request in hub.requests)
    headers = [request for request in hub.requests if request.range and request.path.endswith(WEIGHTS)]
    assert len(headers) == 20 + 250, "the header of a repository whose configuration is unfit is not asked for"
    assert all(len(list(group)) == 1 for group in by_repository(headers).values())
    # Calls of huggingface_hub: ten pages are one listing, HEAD and GET of each of 20 times 2 files one download.
    assert result["traffic"]["requests"] == len(hub.requests) - 9 - 40
    assert result["traffic"]["bytes"] == hub.downloaded()


def by_repository(requests):
    groups = {}
    for request in requests:
        groups.setdefault(request.repo_id, []).append(request)
    return groups


# --- the cache -------------------------------------------------------------------------------------------------------


def test_what_is_cached_costs_no_request_when_pinned_and_one_when_not(hub, run_client, adapter, tmp_path):
    sha = hub.seed("acme/one", adapter(1))
    hub.seed("acme/two", adapter(2))
    runs = hub.seed("acme/runs", adapter(3, folder="final/"))
    program = PRELUDE + "finish(found=find(sys.argv[1:], fetch=True))"
    first = run_client(program, f"acme/one@{sha}", "hub:author=acme", "acme/runs")["found"]
    assert usable(first) == ["acme/one", "acme/two", "acme/runs/final"]

    hub.reset_log()
    pinned = run_client(program, f"acme/one@{sha}", f"acme/runs/final@{runs}")["found"]
    # The license is on the Hub only.
    assert pinned == {name: first[name] | {"license": None} for name in ("acme/one", "acme/runs/final")}
    assert hub.requests == []
    assert run_client(program, "acme/one")["found"]["acme/one"]["path"] == first["acme/one"]["path"]
    assert [request.path.partition("?")[0] for request in hub.requests] == ["/api/models/acme/one/revision/main"]

    hub.seed("acme/three", adapter(3))
    hub.reset_log()
    offline = hub.environment(tmp_path / "hf_home") | {"HF_HUB_OFFLINE": "1"}
    specs = [f"acme/one@{sha}", "acme/two", "acme/one", "acme/runs", "acme/three", "hub:author=acme"]
    found = run_client(program, *specs, env=offline)["found"]
    assert usable(found) == ["acme/one", "acme/two", "acme/runs/final"]
    assert found["acme/two"] == first["acme/two"] | {"license": None}
    assert "offline" in found["acme/three"]["reason"] and "hf download acme/three" in found["acme/three"]["reason"]
    assert "only repositories that are named" in found["hub:author=acme"]["reason"]
    assert hub.requests == []


def test_allow_lists_hold_offline_and_for_commits_in_the_cache(hub, run_client, adapter, tmp_path):
    shas = {"acme/a": hub.seed("acme/a", adapter(1)), "evil/a": hub.seed("evil/a", adapter(2, license="gpl-3.0"))}
    pinned = [f"{name}@{sha}" for name, sha in shas.items()]
    for specs in (shas, pinned):
        run_client(PRELUDE + "finish(found=find(sys.argv[1:], fetch=True))", *specs)
    program = """
lists = {"authors": {"allow_authors": ["acme"]}, "licenses": {"allow_licenses": ["mit"]}}
finish(**{name: find(sys.argv[1:], fetch=True, **given) for name, given in lists.items()})
"""
    offline = hub.environment(tmp_path / "hf_home") | {"HF_HUB_OFFLINE": "1"}
    for specs in (shas, pinned):
        for environment in (None, offline):
            found = run_client(PRELUDE + program, *specs, env=environment)
            assert usable(found["authors"]) == ["acme/a"]
            assert reasons(found["authors"]) == {"evil/a": "its author evil is not in allow_authors"}
            assert "not in allow_licenses" in found["licenses"]["evil/a"]["reason"]
            assert environment or usable(found["licenses"]) == ["acme/a"]


def test_damaged_files_in_the_cache_are_not_read_and_replaced_by_a_download(hub, run_client, adapter, tmp_path):
    sha = hub.seed("acme/one", adapter(1))
    program = PRELUDE + "found = find(sys.argv[1:], fetch=True); finish(found=found)"
    path = Path(run_client(program, f"acme/one@{sha}")["found"]["acme/one"]["path"]) / WEIGHTS
    data = path.read_bytes()
    blob = path.resolve()
    blob.chmod(0o644)
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    blob.write_bytes(damaged)

    offline = hub.environment(tmp_path / "hf_home") | {"HF_HUB_OFFLINE": "1"}
    assert "not in the cache" in run_client(program, f"acme/one@{sha}", env=offline)["found"]["acme/one"]["reason"]
    assert path.read_bytes() == damaged
    assert usable(run_client(program, f"acme/one@{sha}")["found"]) == ["acme/one"]
    assert path.read_bytes() == data


def test_a_killed_download_leaves_nothing_that_is_read_later(hub, run_client, adapter, tmp_path):
    sha = hub.seed("acme/one", adapter(1, rank=3000))
    size = len(hub.files("acme/one")[WEIGHTS])
    # The first range is the header's; the file itself then comes too slowly to be whole in time.
    hub.faults.add(f"GET .*{WEIGHTS}", cut_after=None)
    hub.faults.add(f"GET .*{WEIGHTS}", bytes_per_second=size / 20)
    environment = hub.environment(tmp_path / "hf_home") | {"PYTHONPATH": str(conftest.REPOSITORY_ROOT)}
    program = (
        f"{PRELUDE}found = find('acme/one', fetch=True)\nfinish(found=found, value=value(found['acme/one']['path']))"
    )
    client = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
    cache = tmp_path / "hf_home" / "hub"
    deadline = time.monotonic() + 60
    while not list(cache.rglob("*.incomplete")):
        assert client.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    client.send_signal(signal.SIGKILL)
    assert client.wait() == -signal.SIGKILL
    assert list(cache.rglob("*.incomplete")) and not list(cache.rglob(WEIGHTS))
    hub.faults.clear()
    result = run_client(program)
    assert usable(result["found"]) == ["acme/one"] and result["value"] == 1.0
    assert (Path(result["found"]["acme/one"]["path"]) / WEIGHTS).read_bytes() == hub.files("acme/one", sha)[WEIGHTS]


# --- faults ----------------------------------------------------------------------------------------------------------


def test_every_fault_rejects_its_candidate_alone(hub, run_client, adapter, tmp_path):
    files = adapter(1)
    large = {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    repositories = {
        "huge-header": {**files, WEIGHTS: safetensors_file({}, declared_size=1 << 40)},
        "long-tensor": {**files, WEIGHTS: safetensors_file(large, b"x")},
        "not-a-header": {**files, WEIGHTS: safetensors_file([1, 2])},
        "truncated": {**files, WEIGHTS: files[WEIGHTS][:-1]},
        "empty": {**files, WEIGHTS: b""},
        "huge-config": {**files, CONFIG: b" " * (2**20 + 1) + files[CONFIG]},
        "deep-config": {**files, CONFIG: b"[" * 100_000},
        "follows": adapter(1, peft_type="XLORA", adapters={"0": "evil/payload"}),
        "pickle": {CONFIG: files[CONFIG], "adapter_model.bin": b"cos\nsystem\n(S'touch pwned'\ntR."},
        "code": {**files, "modeling.py": b"raise SystemExit", CONFIG: adapter(1, auto_mapping={"x": "y"})[CONFIG]},
    }
    faults = {
        "refused": {"match": "GET /f/refused/", "times": None, "status": 403, "code": "GatedRepo"},
        "unauthorized": {"match": "GET /f/unauthorized/", "times": None, "status": 401},
        "vanished": {"match": "GET /f/vanished/", "times": None, "status": 404, "code": "EntryNotFound"},
        "teapot": {"match": "GET /f/teapot/", "times": None, "status": 503},
        "cut": {"match": "GET /f/cut/", "times": None, "cut": True},
        "half": {"match": f"GET /f/half/.*{WEIGHTS}", "times": None, "cut_after": 20},
        "slow": {"match": f"GET /f/slow/.*{WEIGHTS}", "times": None, "bytes_per_second": 20.0},
        "liar": {"match": f"GET /f/liar/.*{WEIGHTS}", "times": None, "headers": {"Content-Range": "bytes 0-9/9"}},
        "nonsense": {"match": "POST /api/models/f/nonsense/paths-info", "times": None, "body": b"[[1], {}, null]"},
        "no-json": {"match": "GET /api/models/f/no-json", "times": None, "body": b"<html>"},
        "no-sha": {"match": "GET /api/models/f/no-sha", "times": None, "body": b'{"id": "x", "sha": "../../x"}'},
        "wrong-tag": {"match": "HEAD /f/wrong-tag/", "times": None, "headers": {"ETag": '"' + "0" * 64 + '"',
                      "X-Linked-Etag": '"' + "0" * 64 + '"'}},
    }  # fmt: skip
    outside = [{"rfilename": f"../../x/{name}"} for name in (CONFIG, WEIGHTS)]
    escape = json.dumps({"id": "f/escape", "sha": "0" * 40, "tags": [], "siblings": outside}).encode()
    faults["escape"] = {"match": "GET /api/models/f/escape", "times": None, "body": escape}
    for name, content in {**repositories, **dict.fromkeys(faults, files)}.items():
        hub.seed(f"f/{name}", content)
    for fault in faults.values():
        hub.faults.add(**fault)
    # What the Trainer's own wrong bytes would be: right in size, and only the file itself, not its header.
    hub.seed("f/wrong", files)
    hub.faults.add(f"GET /f/wrong/.*{WEIGHTS}", cut_after=None)
    hub.faults.add(f"GET /f/wrong/.*{WEIGHTS}", times=None, wrong_bytes=8)
    hub.seed("f/once", files)
    hub.faults.add("GET /f/once/.*json", status=429, headers={"Retry-After": "1"})
    hub.faults.add(f"GET /f/once/.*{WEIGHTS}", status=502)
    hub.faults.add(f"GET /f/once/.*{WEIGHTS}", cut=True)
    hub.seed("f/good", files)
    names = [f"f/{name}" for name in [*repositories, *faults, "wrong", "once", "good"]]
    program = """
hub_module.DEADLINE_SECONDS = 3.0
hub_module.MAX_FAILURES = 100
started = time.monotonic()
found = find(sys.argv[1:], fetch=True)
finish(found=found, seconds=time.monotonic() - started)
"""
    result = run_client(PRELUDE + program, *names, timeout=120)
    found, why = result["found"], reasons(result["found"])
    expected = {
        "huge-header": "announces a header of", "long-tensor": BROKEN, "not-a-header": BROKEN,
        "truncated": BROKEN, "empty": "HTTP status 416", "huge-config": "expected a small file",
        "deep-config": "nested too deeply", "follows": "`peft_type` is XLORA", "pickle": "never opened",
        "refused": "gated", "unauthorized": "the token may be wrong", "vanished": "no such file",
        "teapot": "HTTP status 503", "cut": "connection to the Hub failed", "half": "connection to the Hub failed",
        "slow": "too slow", "liar": "truncated", "nonsense": "not JSON of the expected form", "no-json": "not JSON",
        "no-sha": "does not say which commit", "escape": "holds no adapter",
        "wrong-tag": "two hashes", "wrong": "came twice with other content",
    }  # fmt: skip
    assert set(usable(found)) == {"f/code", "f/once", "f/good"}
    assert set(why) == {f"f/{name}" for name in expected}
    for name, text in expected.items():
        assert text in why[f"f/{name}"], name
    assert result["seconds"] < 40
    assert {request.repo_id for request in hub.requests if request.repo_id} == set(names)
    assert not any(request.path.endswith((".bin", ".py")) for request in hub.requests)
    cached = list((tmp_path / "hf_home" / "hub").rglob("*.safetensors"))
    assert {path.read_bytes() for path in cached} == {files[WEIGHTS]}
    assert {f"{path.parts[-4]}" for path in cached} == {"models--f--code", "models--f--once", "models--f--good"}
    assert not any("wrong" in path.parts[-3] for path in (tmp_path / "hf_home" / "hub").rglob("blobs/" + "0" * 64))


def test_a_dead_hub_costs_seconds_and_leaves_what_is_here(hub, run_client, adapter, tmp_path):
    hub.seed("acme/one", adapter(1))
    local = tmp_path / "runs" / "mine"
    local.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (local / name).write_bytes(adapter(5)[name])
    program = (
        PRELUDE
        + """
import socket
from huggingface_hub import constants
started = time.monotonic()
connection = Hub()
found = find(sys.argv[1:], fetch=True, connection=connection)
seconds = [time.monotonic() - started]
deaf = socket.create_server(("127.0.0.1", 0))
constants.ENDPOINT = f"http://127.0.0.1:{deaf.getsockname()[1]}"
hub_module.DEADLINE_SECONDS = 0.5
started = time.monotonic()
silent = find([*sys.argv[1:], *(f"x/{number}" for number in range(30))], fetch=True)
seconds.append(time.monotonic() - started)
finish(found=found, silent=silent, seconds=seconds, down=connection.down)
"""
    )
    specs = ["runs/*", "acme/one", "hub:author=acme", "collection:acme/best-0", *(f"acme/{n}" for n in range(20))]
    command = f"import os; os.chdir({str(tmp_path)!r})\n"
    assert usable(run_client(command + PRELUDE + "finish(found=find('acme/one', fetch=True))")["found"])
    with hub.down():
        result = run_client(command + program, *specs)
    # What was found and cached before still is; everything else is rejected with the reason.
    assert usable(result["found"]) == ["runs/mine", "acme/one"]
    assert usable(result["silent"]) == ["runs/mine"]
    assert set(reasons(result["found"])) == {*specs[2:]}
    assert all("it is down" in reason for reason in reasons(result["found"]).values())
    assert result["seconds"][0] < 5 and result["seconds"][1] < 20


def test_a_busy_hub_is_not_waited_for_without_end(hub, run_client, adapter):
    hub.seed("acme/one", adapter(1))
    hub.seed("acme/two", adapter(2))
    hub.faults.add(f"HEAD .*{WEIGHTS}", times=None, status=429, headers={"Retry-After": "3600"})
    program = """
from huggingface_hub.utils import get_session
started = time.monotonic()
hooks = {name: list(value) for name, value in get_session().event_hooks.items()}
found = find(["acme/one", "acme/two"], fetch=True)
finish(found=found, seconds=time.monotonic() - started, same=hooks == get_session().event_hooks)
"""
    result = run_client(PRELUDE + program)
    assert all("asks to wait 3600 s" in reason for reason in reasons(result["found"]).values())
    assert len(reasons(result["found"])) == 2
    assert result["seconds"] < 10
    assert result["same"], "the user's HTTP client is left as it was"


def test_downloads_stay_a_few_ahead(hub, run_client, adapter):
    for number in range(10):
        hub.seed(f"acme/{number}", adapter(number))
    program = """
connection = Hub()
found = find_candidates([f"acme/{n}" for n in range(10)], "acme/base", check=fits, hub=connection)
ahead = []
with arriving(found, connection) as coming:
    for number, item in zip(range(4), coming):
        time.sleep(0.7)
        ahead.append(len(list(Path(os.environ["HF_HOME"]).rglob("*.safetensors"))) - number - 1)
        assert value(item.path) == number
finish(ahead=ahead)
"""
    assert run_client(PRELUDE + program)["ahead"] == [3, 3, 3, 3]
    assert len(whole_files(hub)) == 7


# --- several processes -----------------------------------------------------------------------------------------------


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
    environment = hub.environment(tmp_path / "hf_home") | {"PYTHONPATH": str(conftest.REPOSITORY_ROOT)}
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


# --- from the search to the trained model ----------------------------------------------------------------------------

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


def test_a_search_is_ranked_merged_trained_pushed_and_repeated_offline(hub, run_client, library, tmp_path):
    card = CARD.format(base="acme/base", license="mit", tag="code").encode()
    shas = {}
    for directory in sorted(path.parent for path in library.glob(f"*/{WEIGHTS}")):
        files = {name: (directory / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        shas[f"acme/{directory.name}"] = hub.seed(f"acme/{directory.name}", {**files, "README.md": card})
    hub.seed("acme/elsewhere", {**files, "README.md": card.replace(b"acme/base", b"acme/another")})
    hub.seed("acme/liar", {**files, "README.md": card, WEIGHTS: safetensors_file({}, b"x")})
    hub.seed("acme/base", {"README.md": b"# The base"})
    environment = hub.environment(tmp_path / "hf_home", token=hub.user("acme")) | {"OMP_NUM_THREADS": "1"}
    online = run_client(PRELUDE + TRAINING, tmp_path / "online", "hub:author=acme", env=environment, timeout=180)
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
    run_client(PRELUDE + TRAINING, tmp_path / "pushing", "hub:author=acme", env=environment, timeout=180)
    del environment["PUSH_TO"]
    pushed = (tmp_path / "pushing/mashup" / WEIGHTS).read_bytes()
    assert hub.files("acme/start")[WEIGHTS] == pushed
    hub.reset_log()
    again = run_client(PRELUDE + TRAINING, tmp_path / "again", "hub:author=acme", env=environment, timeout=180)
    start = next(row for row in again["report"]["candidates"] if row["name"] == "acme/start")
    assert start["status"] == "scored"
    assert start["loss"] <= min(row["loss"] for row in rows.values() if row["loss"]) + 1e-6
    cached = [path for path in (tmp_path / "hf_home").rglob(WEIGHTS) if "acme--start" in str(path)]
    assert [path.read_bytes() for path in cached] == [pushed]
    downloaded = {request.repo_id for request in hub.requests if request.is_download and WEIGHTS in request.path}
    assert downloaded <= {"acme/start", "acme/liar"}

    searched = run_client(PRELUDE + "finish(found=find('hub:author=acme'))", env=environment)["found"]
    hub.reset_log()
    environment["HF_HUB_OFFLINE"] = "1"
    # A search needs the Hub, what it found does not.
    names = [name for name in searched if name != "acme/liar"]
    offline = run_client(PRELUDE + TRAINING, tmp_path / "offline", *names, env=environment, timeout=180)
    assert hub.requests == [] and offline["report"]["hub"]["requests"] == 0
    assert (offline["losses"], offline["norms"]) == (again["losses"], again["norms"])
    assert {row["name"]: row["loss"] for row in offline["report"]["candidates"]} == {
        row["name"]: row["loss"] for row in again["report"]["candidates"] if row["name"] != "acme/liar"
    }
