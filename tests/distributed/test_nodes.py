"""Two machines that share nothing but the network, as two torchruns on one, against the same run in one process."""

from collections import Counter

import pytest

from tests.distributed.launching import launch_nodes
from tests.hub import conftest


hub = conftest.hub
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def repositories(hub, library):
    names = [f"acme/{path.parent.name}" for path in sorted(library.glob(f"*/{WEIGHTS}"))]
    for name in names:
        files = {path.name: path.read_bytes() for path in (library / name.split("/")[1]).iterdir()}
        hub.seed(name, files)
    return names


def test_two_nodes_with_a_file_system_each(hub, places, repositories, alone, tmp_path):
    settings = {**places("adapters"), "candidates": repositories}
    nodes = launch_nodes(tmp_path, settings, hub.environment(tmp_path / "home"))
    for run in nodes:
        for rank in run.ranks:
            assert rank["losses"] == pytest.approx(alone.losses, abs=1e-5)
            assert rank["held"] == nodes[0].ranks[0]["held"]
            assert rank["report"] == nodes[0].ranks[0]["report"]
    report, expected = nodes[0].ranks[0]["report"], alone.ranks[0]["report"]
    assert report["decision"] == expected["decision"] != "scratch"
    chosen = [row["name"].split("/")[-1] for row in report["candidates"] if row["weight"]]
    assert chosen == [row["name"].split("/")[-1] for row in expected["candidates"] if row["weight"]]
    whole = [item for item in hub.requests if item.is_download and item.range is None and item.path.endswith(WEIGHTS)]
    downloads = Counter(item.repo_id for item in whole)
    # Once a node, though two processes on it need them.
    assert downloads == dict.fromkeys(repositories, 2)
    for node in range(2):
        cached = list((tmp_path / f"node{node}/hf/hub").glob(f"models--*/snapshots/*/{WEIGHTS}"))
        assert len(cached) == len(repositories)
