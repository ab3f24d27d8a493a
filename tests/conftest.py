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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts modules of few tests first, which are the slow ones, so that no process waits for the other at the end."""
    sizes = Counter(group(item.nodeid) for item in items)
    items.sort(key=lambda item: (group(item.nodeid) != "distributed", sizes[group(item.nodeid)]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keeps each group in one process, which pytest-xdist 3.8's `loadgroup` does not do under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = group
    return scheduling


def group(nodeid: str) -> str:
    """Returns the test's module, or `distributed`: runs in processes of their own never run beside each other."""
    module = nodeid.partition("::")[0]
    return "distributed" if "distributed/" in module else module


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


@pytest.fixture(scope="session")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters and three full checkpoints that no guard is asked about, as `lora/run-*` and `full/run-*`."""
    from tests.killing import save_library

    directory = tmp_path_factory.mktemp("candidates")
    save_library(directory)
    return directory
