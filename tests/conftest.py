"""What the tests share: no network, few threads, and a library of adapters of the tiny model."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Every test scores for itself, and nothing is left in the user's cache.
os.environ["MASHUP_CACHE"] = ""

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    # The models are so small that a second thread costs more than it saves.
    torch.set_num_threads(1)


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
