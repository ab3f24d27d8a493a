"""What the tests share: no network, one thread, their spread over processes, and adapters of the tiny model."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models are so small that a second thread costs more than it saves.
os.environ["OMP_NUM_THREADS"] = "1"
# Every test scores for itself, and nothing is left in the user's cache.
os.environ["MASHUP_CACHE"] = ""

from collections import Counter
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps a module's tests in one process, and all runs in processes of their own in one; the longest come first."""
    groups = {item: "distributed" if "distributed" in item.path.parts else item.module.__name__ for item in items}
    sizes = Counter(groups.values())
    items.sort(key=lambda item: (groups[item] != "distributed", -sizes[groups[item]]))
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trained and two random adapters of the tiny model, each a directory."""
    from tests.tiny import save_random_adapter, save_trained_adapter

    directory = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        save_trained_adapter(directory / f"trained-{seed}", seed)
    for seed in range(2):
        save_random_adapter(directory / f"random-{seed}", seed, scale=3.0)
    return directory
