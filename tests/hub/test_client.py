"""The unmodified huggingface_hub client is the judge of the server."""

import hashlib
import http.client
from urllib.parse import urlsplit

import pytest

from .faults import BROKEN_CARD
from .plain import ADAPTER, CARD, get


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


@pytest.fixture
def ask(run_client):
    return lambda program, *args, **settings: run_client(PRELUDE + program, *args, **settings)


def test_list_of_a_thousand_repositories(hub, ask):
    shas = []
    for number in range(1000):
        author = "acme" if number % 2 else "other"
        card = CARD if number % 5 else CARD.replace(b"acme/base", b"acme/elsewhere")
        files = {**ADAPTER, "README.md": card}
        shas.append(hub.seed(f"{author}/adapter-{number:04d}", files, downloads=number * 7 % 1000))
    hub.seed("acme/secret", ADAPTER, private=True)
    hub.seed("acme/broken", {**ADAPTER, "README.md": BROKEN_CARD})
    found = ask(
        """
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


def test_reading_at_revisions(hub, ask):
    old = hub.seed("acme/adapter", {**ADAPTER, "sub/folder/notes.txt": b"old"})
    new = hub.seed("acme/adapter", {"adapter_config.json": b"{}"})
    results = ask(
        """
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


ACCESS = """
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


@pytest.mark.parametrize("name", [None, "outsider", "guest", "member"])
def test_access_and_error_classes(hub, ask, tmp_path, name):
    hub.seed("acme/open", ADAPTER)
    hub.seed("acme/private", ADAPTER, private=True)
    hub.seed("acme/gated", ADAPTER, gated=True)
    hub.grant("acme/gated", "guest")
    tokens = {user: hub.user(user) for user in ("outsider", "guest")}
    tokens |= {None: None, "member": hub.user("member", ["acme"])}
    results = ask(ACCESS, env=hub.environment(tmp_path, tokens[name]))

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


def test_only_members_push_and_what_they_announce(hub, ask, tmp_path):
    hub.seed("acme/theirs", {"README.md": CARD})
    results = ask(
        """
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
