"""The worlds: a base model, tasks with train and test rows, and how a task's adapter is trained and measured."""

from importlib import import_module
from pathlib import Path

from ...quickstart.world import quiet
from .base import World


WORLDS = ("quickstart", "quickstart_full", "stdlib", "minilm", "smollm2_code", "smollm2_bigbench", "paper")

__all__ = ["WORLDS", "World", "load_world"]


def load_world(name: str, home: str | Path, fast: bool = False, model: str | None = None) -> World:
    """Makes a world, which builds in `home`; its module is imported only now, with what it needs."""
    name = name.replace("-", "_")
    if name not in WORLDS:
        raise ValueError(f"world is {name!r}, expected one of {', '.join(WORLDS)}.")
    quiet()
    return import_module(f".{name}", __name__).make(Path(home), fast, model)
