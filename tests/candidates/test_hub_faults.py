"""A Hub and repositories that go wrong, and downloads that are not all made at once."""

import json

from tests.candidates.client import BROKEN, CONFIG, WEIGHTS, reasons, usable, whole_files
from tests.hub.faults import safetensors_file


def test_every_fault_rejects_its_candidate_alone(hub, ask, adapter, tmp_path):
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
    result = ask(program, *names, timeout=120)
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


def test_a_dead_hub_costs_seconds_and_leaves_what_is_here(hub, ask, fetch, adapter, tmp_path, monkeypatch):
    hub.seed("acme/one", adapter(1))
    local = tmp_path / "runs" / "mine"
    local.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (local / name).write_bytes(adapter(5)[name])
    program = """
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
    specs = ["runs/*", "acme/one", "hub:author=acme", "collection:acme/best-0", *(f"acme/{n}" for n in range(20))]
    monkeypatch.chdir(tmp_path)
    assert usable(fetch("acme/one"))
    with hub.down():
        result = ask(program, *specs)
    # What was found and cached before still is; everything else is rejected with the reason.
    assert usable(result["found"]) == ["runs/mine", "acme/one"]
    assert usable(result["silent"]) == ["runs/mine"]
    assert set(reasons(result["found"])) == {*specs[2:]}
    assert all("it is down" in reason for reason in reasons(result["found"]).values())
    assert result["seconds"][0] < 5 and result["seconds"][1] < 20


def test_a_busy_hub_is_not_waited_for_without_end(hub, ask, adapter):
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
    result = ask(program)
    assert all("asks to wait 3600 s" in reason for reason in reasons(result["found"]).values())
    assert len(reasons(result["found"])) == 2
    assert result["seconds"] < 10
    assert result["same"], "the user's HTTP client is left as it was"


def test_downloads_stay_a_few_ahead(hub, ask, adapter):
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
    assert ask(program)["ahead"] == [3, 3, 3, 3]
    assert len(whole_files(hub)) == 7
