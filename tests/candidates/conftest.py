"""Adapters in local directories, and the loopback Hub."""

import json
import os

import pytest
import torch

from mashup_callback.lora import save_adapter
from mashup_callback.lowrank import LoraFactors
from tests.candidates.client import CARD, CONFIG, PRELUDE, WEIGHTS
from tests.hub import conftest as loopback


hub, run_client = loopback.hub, loopback.run_client


def write_adapter(directory, value=1.0, *, last=1.0, alpha=2.0, features=4, base_model="org/base"):
    """Every element of A is `value`, of B `last`."""
    factors = LoraFactors(torch.full((2, features), value), torch.full((3, 2), last), alpha / 2)
    return save_adapter(directory, {"layers.0.q_proj": factors}, base_model=base_model)


def save_into(directory, value):
    """As a Trainer does: beside whatever the directory already holds."""
    for path in write_adapter(directory.parent / f"{directory.name}.draft", float(value)).iterdir():
        path.replace(directory / path.name)
    (directory.parent / f"{directory.name}.draft").rmdir()


def names(found, root):
    return [os.path.relpath(item.name, root) for item in found if item.reason is None]


def reasons(found, root):
    return {os.path.relpath(item.name, root): item.reason for item in found if item.reason}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs: a (final adapter, checkpoints 2 and 10) and b (checkpoints only), besides things that are neither."""
    root = tmp_path / "runs"
    for value, name in enumerate(["a", "a/checkpoint-10", "a/checkpoint-2", "b/checkpoint-1"], start=1):
        (root / name).mkdir(parents=True, exist_ok=True)
        save_into(root / name, value)
    (root / "a" / "runs-log").mkdir()
    (root / "notes.txt").write_text("not a run")
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def ask(run_client):
    """Runs a program that begins with what all of them need."""
    return lambda program, *args, **settings: run_client(PRELUDE + program, *args, **settings)


@pytest.fixture
def fetch(ask):
    """Finds candidates and downloads them, in a process of its own."""
    return lambda *specs, env=None: ask("finish(found=find(sys.argv[1:], fetch=True))", *specs, env=env)["found"]


@pytest.fixture
def offline(hub, tmp_path):
    """The environment of a client that has the cache alone."""
    return hub.environment(tmp_path / "hf_home") | {"HF_HUB_OFFLINE": "1"}


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
