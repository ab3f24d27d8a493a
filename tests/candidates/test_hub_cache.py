"""What is in the Hub's cache: what it costs, what is allowed of it, and what is damaged in it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.candidates.client import PRELUDE, WEIGHTS, reasons, usable
from tests.hub.conftest import REPOSITORY_ROOT


def test_what_is_cached_costs_no_request_when_pinned_and_one_when_not(hub, fetch, offline, adapter):
    sha = hub.seed("acme/one", adapter(1))
    hub.seed("acme/two", adapter(2))
    runs = hub.seed("acme/runs", adapter(3, folder="final/"))
    first = fetch(f"acme/one@{sha}", "hub:author=acme", "acme/runs")
    assert usable(first) == ["acme/one", "acme/two", "acme/runs/final"]

    hub.reset_log()
    pinned = fetch(f"acme/one@{sha}", f"acme/runs/final@{runs}")
    # The license is on the Hub only.
    assert pinned == {name: first[name] | {"license": None} for name in ("acme/one", "acme/runs/final")}
    assert hub.requests == []
    assert fetch("acme/one")["acme/one"]["path"] == first["acme/one"]["path"]
    assert [request.path.partition("?")[0] for request in hub.requests] == ["/api/models/acme/one/revision/main"]

    hub.seed("acme/three", adapter(3))
    hub.reset_log()
    specs = [f"acme/one@{sha}", "acme/two", "acme/one", "acme/runs", "acme/three", "hub:author=acme"]
    found = fetch(*specs, env=offline)
    assert usable(found) == ["acme/one", "acme/two", "acme/runs/final"]
    assert found["acme/two"] == first["acme/two"] | {"license": None}
    assert "offline" in found["acme/three"]["reason"] and "hf download acme/three" in found["acme/three"]["reason"]
    assert "only repositories that are named" in found["hub:author=acme"]["reason"]
    assert hub.requests == []


def test_allow_lists_hold_offline_and_for_commits_in_the_cache(hub, ask, fetch, offline, adapter):
    shas = {"acme/a": hub.seed("acme/a", adapter(1)), "evil/a": hub.seed("evil/a", adapter(2, license="gpl-3.0"))}
    pinned = [f"{name}@{sha}" for name, sha in shas.items()]
    for specs in (shas, pinned):
        fetch(*specs)
    program = """
lists = {"authors": {"allow_authors": ["acme"]}, "licenses": {"allow_licenses": ["mit"]}}
finish(**{name: find(sys.argv[1:], fetch=True, **given) for name, given in lists.items()})
"""
    for specs in (shas, pinned):
        for environment in (None, offline):
            found = ask(program, *specs, env=environment)
            assert usable(found["authors"]) == ["acme/a"]
            assert reasons(found["authors"]) == {"evil/a": "its author evil is not in allow_authors"}
            assert "not in allow_licenses" in found["licenses"]["evil/a"]["reason"]
            assert environment or usable(found["licenses"]) == ["acme/a"]


def test_damaged_files_in_the_cache_are_not_read_and_replaced_by_a_download(hub, fetch, offline, adapter):
    sha = hub.seed("acme/one", adapter(1))
    path = Path(fetch(f"acme/one@{sha}")["acme/one"]["path"]) / WEIGHTS
    data = path.read_bytes()
    blob = path.resolve()
    blob.chmod(0o644)
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    blob.write_bytes(damaged)
    assert "not in the cache" in fetch(f"acme/one@{sha}", env=offline)["acme/one"]["reason"]
    assert path.read_bytes() == damaged
    assert usable(fetch(f"acme/one@{sha}")) == ["acme/one"]
    assert path.read_bytes() == data


def test_a_killed_download_leaves_nothing_that_is_read_later(hub, run_client, adapter, tmp_path):
    sha = hub.seed("acme/one", adapter(1, rank=3000))
    size = len(hub.files("acme/one")[WEIGHTS])
    # The first range is the header's; the file itself then comes too slowly to be whole in time.
    hub.faults.add(f"GET .*{WEIGHTS}", cut_after=None)
    hub.faults.add(f"GET .*{WEIGHTS}", bytes_per_second=size / 20)
    environment = hub.environment(tmp_path / "hf_home") | {"PYTHONPATH": str(REPOSITORY_ROOT)}
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
