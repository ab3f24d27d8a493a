"""The unmodified Hub client against the loopback Hub: what is found, and what is asked for."""

import json

from tests.candidates.client import CONFIG, WEIGHTS, reasons, usable, whole_files
from tests.hub.faults import BROKEN_CARD


def test_every_form_finds_adapters_at_a_commit(hub, ask, fetch, adapter, tmp_path):
    old = hub.seed("acme/one", adapter(1))
    new = hub.seed("acme/one", adapter(2), downloads=5)
    card = adapter(3, license="apache-2.0", tag="maths]\ndatasets: [acme/code")
    two = hub.seed("acme/two", card, downloads=9)
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
    found = ask(program, old, copy, carded, cached)
    assert found["repo"]["acme/one"]["revision"] == found["branch"]["acme/one"]["revision"] == new
    assert found["pinned"]["acme/one"]["revision"] == found["short"]["acme/one"]["revision"] == old
    assert found["repo"]["acme/one"]["bytes"] == len(adapter()[WEIGHTS])
    assert found["repo"]["acme/one"]["license"] == "mit"
    for listed in (found["everything"], found["collection"]):
        assert listed["acme/two"]["datasets"] == ["acme/code"] and listed["acme/one"]["datasets"] == []
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
    for user, organizations, more in (("guest", [], []), ("member", ["acme"], ["acme/secret"])):
        environment = hub.environment(tmp_path / user, hub.user(user, organizations))
        assert usable(fetch("acme/gated", "acme/secret", env=environment)) == ["acme/gated", *more]


def test_only_the_compatible_of_a_thousand_are_downloaded(hub, ask, adapter):
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
    result = ask(program)
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
