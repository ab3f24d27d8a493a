"""The unmodified huggingface_hub client is the judge of the server; plain HTTP checks what the client leaves out."""

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from .faults import BROKEN_CARD, Faults, safetensors_file
from .handler import Request
from .routing import ranged


CARD = b"---\nbase_model: acme/base\nlibrary_name: peft\nlicense: mit\ntags: [code]\n---\n# An adapter\n"
CONFIG = b'{"peft_type": "LORA", "r": 2}'
WEIGHTS = save({"lora_A.weight": numpy.arange(12, dtype=numpy.float32).reshape(2, 6)})
ADAPTER = {"README.md": CARD, "adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}

PRELUDE = """
import json, sys, time
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
api = HfApi()

def failure(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, None if response is None else response.status_code]

def finish(**results):
    print(json.dumps(results))
"""


def get(url: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    """Status, body and headers of a plain GET."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


# --- reading ---------------------------------------------------------------------------------------------------------


def test_list_of_a_thousand_repositories(hub, run_client):
    shas = []
    for number in range(1000):
        author = "acme" if number % 2 else "other"
        card = CARD if number % 5 else CARD.replace(b"acme/base", b"acme/elsewhere")
        files = {**ADAPTER, "README.md": card}
        shas.append(hub.seed(f"{author}/adapter-{number:04d}", files, downloads=number * 7 % 1000))
    hub.seed("acme/secret", ADAPTER, private=True)
    hub.seed("acme/broken", {**ADAPTER, "README.md": BROKEN_CARD})
    found = run_client(
        PRELUDE
        + """
ids = lambda **query: [model.id for model in api.list_models(**query)]
adapters = ["base_model:adapter:acme/base", "peft"]
expand = ["sha", "tags", "downloads", "gated", "siblings", "lastModified"]
started = time.perf_counter()
everything = list(api.list_models(expand=expand))
seconds = time.perf_counter() - started
first = everything[0]
finish(
    everything=[model.id for model in everything], seconds=seconds,
    first=[first.sha, first.downloads, first.gated, [file.rfilename for file in first.siblings]],
    adapters=ids(filter=adapters), unmatched=ids(filter=[*adapters, "no-such-tag"]),
    author=ids(filter=adapters, author="acme"), search=ids(search="ADAPTER-001"),
    sorted=[model.downloads for model in api.list_models(sort="downloads", limit=150, expand=["downloads"])],
    cards=[model.card_data.license for model in api.list_models(cardData=True, limit=2)],
)
"""
    )
    public = [f"{'acme' if number % 2 else 'other'}/adapter-{number:04d}" for number in range(1000)]
    assert found["everything"] == [*public, "acme/broken"]
    assert found["seconds"] < 5
    assert found["first"] == [shas[0], 0, False, sorted(ADAPTER)]
    assert found["adapters"] == [name for number, name in enumerate(public) if number % 5]
    assert found["unmatched"] == []
    assert found["author"] == [name for name in found["adapters"] if name.startswith("acme/")]
    assert found["search"] == [name for name in public if "adapter-001" in name]
    assert found["sorted"] == list(range(999, 849, -1))
    assert found["cards"] == ["mit", "mit"]
    assert sum("sort=downloads" in request.path for request in hub.requests) == 2


def test_reading_at_revisions(hub, run_client):
    old = hub.seed("acme/adapter", {**ADAPTER, "sub/folder/notes.txt": b"old"})
    new = hub.seed("acme/adapter", {"adapter_config.json": b"{}"})
    results = run_client(
        PRELUDE
        + """
old, new = sys.argv[1:]
name = "acme/adapter"
info = api.model_info(name, files_metadata=True)
header = api.parse_safetensors_file_metadata(name, "adapter_model.safetensors", revision=old).tensors
snapshot = Path(snapshot_download(name, revision=old))
config = hf_hub_download(name, "adapter_config.json", revision=new)
checked = api.verify_repo_checksums(name, revision=old)
finish(
    shas=[info.sha, api.model_info(name, revision=old).sha, api.model_info(name, revision=old[:8]).sha],
    card=info.card_data.base_model,
    sizes={file.rfilename: file.size for file in info.siblings},
    top=[entry.path for entry in api.list_repo_tree(name)],
    below=[entry.path for entry in api.list_repo_tree(name, "sub", recursive=True)],
    info={entry.path: entry.size for entry in api.get_paths_info(name, ["adapter_config.json", "sub", "none"])
          if hasattr(entry, "size")},
    shape=header["lora_A.weight"].shape, dtype=header["lora_A.weight"].dtype,
    files={str(path.relative_to(snapshot)): path.read_bytes().hex() for path in snapshot.rglob("*") if path.is_file()},
    config=Path(config).read_text(), checked=checked.checked_count, mismatches=len(checked.mismatches),
)
""",
        old,
        new,
    )
    assert results["shas"] == [new, old, old]
    assert results["card"] == "acme/base"
    assert results["sizes"] == {path: len(data) for path, data in hub.files("acme/adapter").items()}
    assert results["top"] == ["README.md", "adapter_config.json", "adapter_model.safetensors", "sub"]
    assert results["below"] == ["sub/folder", "sub/folder/notes.txt"]
    assert results["info"] == {"adapter_config.json": 2}
    assert (results["shape"], results["dtype"]) == ([2, 6], "F32")
    assert results["files"] == {path: data.hex() for path, data in hub.files("acme/adapter", old).items()}
    assert (results["config"], results["mismatches"]) == ("{}", 0)
    assert results["checked"] == len(ADAPTER) + 1


# --- access ----------------------------------------------------------------------------------------------------------

ACCESS = (
    PRELUDE
    + """
weights = "adapter_model.safetensors"
finish(
    missing=failure(api.model_info, "acme/none"),
    private=failure(api.model_info, "acme/private"),
    gated_info=failure(api.model_info, "acme/gated"),
    gated_card=failure(hf_hub_download, "acme/gated", "README.md"),
    gated_file=failure(hf_hub_download, "acme/gated", weights),
    gated_header=failure(api.parse_safetensors_file_metadata, "acme/gated", weights),
    revision=failure(api.model_info, "acme/open", revision="none"),
    entry=failure(hf_hub_download, "acme/open", "none"),
    whoami=failure(api.whoami),
    listed=sorted(model.id for model in api.list_models()),
)
"""
)


@pytest.mark.parametrize("name", [None, "outsider", "guest", "member"])
def test_access_and_error_classes(hub, run_client, tmp_path, name):
    hub.seed("acme/open", ADAPTER)
    hub.seed("acme/private", ADAPTER, private=True)
    hub.seed("acme/gated", ADAPTER, gated=True)
    hub.grant("acme/gated", "guest")
    tokens = {user: hub.user(user) for user in ("outsider", "guest")}
    tokens |= {None: None, "member": hub.user("member", ["acme"])}
    results = run_client(ACCESS, env=hub.environment(tmp_path, tokens[name]))

    status = 401 if name is None else 404
    gated = {None: ["GatedRepoError", 401], "outsider": ["GatedRepoError", 403]}.get(name)
    hidden = None if name == "member" else ["RepositoryNotFoundError", status]
    assert results["missing"] == ["RepositoryNotFoundError", status]
    assert results["private"] == hidden
    assert results["gated_file"] == results["gated_header"] == gated
    assert results["gated_info"] is results["gated_card"] is None
    assert results["revision"] == ["RevisionNotFoundError", 404]
    assert results["entry"] == ["RemoteEntryNotFoundError", 404]
    assert (results["whoami"] is None) == (name is not None)
    assert ("acme/private" in results["listed"]) == (name == "member")


# --- pushing ---------------------------------------------------------------------------------------------------------


def test_only_members_push_and_what_they_announce(hub, run_client, tmp_path):
    hub.seed("acme/theirs", {"README.md": CARD})
    results = run_client(
        PRELUDE
        + """
upload = lambda repo_id: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo_id)
finish(
    created=str(api.create_repo("alice/mashup", private=True)), again=failure(api.create_repo, "alice/mashup"),
    pushed=upload("alice/mashup").oid, foreign=failure(upload, "acme/theirs"), me=api.whoami()["name"],
    namespace=failure(api.create_repo, "acme/mine"), anonymous=failure(api.create_repo, "alice/other", token=False),
)
""",
        env=hub.environment(tmp_path / "hf_home", hub.user("alice")),
    )
    assert (results["created"], results["again"]) == (f"{hub.url}/alice/mashup", ["HfHubHTTPError", 409])
    assert hub.files("alice/mashup") == hub.files("alice/mashup", results["pushed"]) == {"x": b"x"}
    assert (results["me"], results["anonymous"][1]) == ("alice", 401)
    assert results["foreign"] == results["namespace"] == ["HfHubHTTPError", 403]
    assert get(f"{hub.url}/api/models/alice/mashup")[0] == 401
    announced = hashlib.sha256(b"announced").hexdigest()
    for body, status in ((b"something else", 400), (b"announced", 200)):
        connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
        connection.request("PUT", f"/api/lfs/{announced}", body)
        assert connection.getresponse().status == status
        connection.close()


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "status", "body", "header"),
    [
        ({"status": 429, "headers": {"Retry-After": "1"}}, 429, None, ("Retry-After", "1")),
        ({"status": 403, "code": "GatedRepo"}, 403, None, ("X-Error-Code", "GatedRepo")),
        ({"body": b"fake"}, 200, b"fake", ("Content-Length", "4")),
        ({"wrong_bytes": 1}, 200, WEIGHTS[:-1] + bytes([255 - WEIGHTS[-1]]), ("Content-Length", str(len(WEIGHTS)))),
        ({"cut": True}, http.client.RemoteDisconnected, None, None),
        ({"cut_after": 5}, http.client.IncompleteRead, WEIGHTS[:5], None),
    ],
)
def test_what_a_fault_does_once(hub, fault, status, body, header):
    hub.seed("acme/adapter", ADAPTER)
    url = f"{hub.url}/acme/adapter/resolve/main/adapter_model.safetensors"
    hub.faults.add("GET /acme/adapter/resolve", **fault)
    if header is None:
        with pytest.raises(status) as raised:
            get(url)
        assert getattr(raised.value, "partial", None) == body
        assert [(request.status, request.sent) for request in hub.requests] == [(200, 5) if body else (0, 0)]
    else:
        found, content, headers = get(url)
        assert found == status and body in (None, content) and headers[header[0]] == header[1]
    assert get(url)[:2] == (200, WEIGHTS)


def test_fault_selection_and_exhaustion():
    faults = Faults()
    twice = faults.add("GET /a", times=2, status=500)
    always = faults.add("/a", times=None, status=404)
    taken = [faults.take("GET", "/a/b") for _ in range(3)]
    assert taken == [twice, twice, always]
    assert faults.take("POST", "/a") is always
    assert faults.take("GET", "/b").status is None
    faults.clear()
    assert faults.take("GET", "/a").status is None
    with pytest.raises(TypeError, match="statsu"):
        faults.add("GET", statsu=500)


def test_delay_and_slow_body(hub):
    hub.seed("acme/adapter", {"file.bin": bytes(1000)})
    url = f"{hub.url}/acme/adapter/resolve/main/file.bin"
    hub.faults.add("resolve", bytes_per_second=2000)
    hub.faults.add("resolve", delay=0.3)
    for least in (0.4, 0.3, 0.0):
        started = time.perf_counter()
        assert get(url)[1] == bytes(1000)
        assert least <= time.perf_counter() - started < least + 2


def test_down_and_up_again(hub):
    hub.seed("acme/adapter", ADAPTER)
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
    connection.request("GET", "/api/models/acme/adapter")
    assert connection.getresponse().read()
    url = hub.url
    with hub.down():
        with pytest.raises(urllib.error.URLError, match="refused"):
            get(f"{url}/api/models")
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            connection.request("GET", "/api/models")
            connection.getresponse()
    assert get(f"{url}/api/models/acme/adapter")[0] == 200
    connection.close()


# --- the server itself -----------------------------------------------------------------------------------------------


@given(data=st.binary(max_size=20), first=st.none() | st.integers(0, 25), last=st.none() | st.integers(0, 25))
def test_ranges_follow_rfc_9110(data, first, last):
    text = "-".join("" if bound is None else str(bound) for bound in (first, last))
    positions = range(len(data))
    if first is None and last is None:
        expected = None
    elif first is None:
        expected = bytes(data[i] for i in positions if i >= len(data) - last)
    else:
        expected = bytes(data[i] for i in positions if i >= first and (last is None or i <= last))
    reply = ranged(data, f"bytes={text}", {})
    if expected is None:
        assert (reply.status, reply.body) == (200, data)
    elif expected:
        start, stop = map(int, reply.headers["Content-Range"].removeprefix("bytes ").split("/")[0].split("-"))
        assert (reply.status, reply.body, data[start : stop + 1]) == (206, expected, expected)
    else:
        assert (reply.status, reply.body, reply.headers["Content-Range"]) == (416, b"", f"bytes */{len(data)}")


def test_headers_and_log_of_a_download(hub):
    sha = hub.seed("acme/adapter", ADAPTER)
    path = "/acme/adapter/resolve/main/adapter_model.safetensors"
    status, body, headers = get(hub.url + path, Range="bytes=0-7")
    assert (status, body) == (206, WEIGHTS[:8])
    assert headers["X-Repo-Commit"] == sha
    assert headers["X-Linked-Size"] == str(len(WEIGHTS))
    assert headers["ETag"] == headers["X-Linked-Etag"]
    assert hub.requests == [Request("GET", path, 206, 8, range="bytes=0-7")]
    assert hub.requests[0].repo_id == "acme/adapter"
    assert (hub.downloaded(), hub.downloaded("acme/other")) == (8, 0)
    hub.reset_log()
    assert hub.requests == []


def test_malformed_requests_are_refused_not_fatal(hub):
    request = urllib.request.Request(f"{hub.url}/api/validate-yaml", data=b"not json")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert get(f"{hub.url}/api/models")[0] == 200
    assert get(f"{hub.url}/nowhere")[0] == 404
    hub.seed("acme/a", {})
    assert get(f"{hub.url}/api/models/acme/a/revision/%E2%82%AC%0A")[2]["X-Error-Message"] == "Invalid rev id: ?"


def test_log_waits_for_requests_under_way(hub):
    hub.faults.add("GET /api/models", delay=0.3)
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
    connection.request("GET", "/api/models")
    time.sleep(0.1)
    assert [request.status for request in hub.requests] == [200]
    connection.close()


def test_safetensors_file_matches_the_library():
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    numpy.testing.assert_array_equal(load(safetensors_file(header, numpy.float32([1, 2]).tobytes()))["w"], [1, 2])


def test_environment_leaves_nothing_of_the_caller(hub, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "https_proxy"):
        monkeypatch.setenv(name, "of the caller")
    environment = hub.environment(tmp_path)
    assert "of the caller" not in environment.values()
    assert environment["HF_ENDPOINT"] == hub.url
    assert hub.environment(tmp_path, "hf_x")["HF_TOKEN"] == "hf_x"
