"""The worlds: a base model, tasks with train and test rows, and how a task's adapter is trained and measured."""

from importlib import import_module
from pathlib import Path

from .base import World


WORLDS = (
    "quickstart",
    "stdlib",
    "minilm",
    "smollm2_code",
    "smollm2_bigbench",
    "paper",
    "lots_of_loras",
    "quickstart_full",
)

__all__ = ["WORLDS", "World", "load_world"]


def load_world(name: str, home: str | Path, fast: bool = False, model: str | None = None) -> World:
    """
    Makes a world; its module is imported only now, so that one world's dependencies do not burden the others.

    Args:
        name (`str`):
            One of `WORLDS`.
        home (`str` or `Path`):
            Where the world keeps what it builds: a base model, the library of adapters.
        fast (`bool`, *optional*, defaults to `False`):
            Take the small sizes.
        model (`str`, *optional*):
            Base model, for the worlds that have a choice.

    Raises:
        ValueError: The name is unknown.
    """
    name = name.replace("-", "_")
    if name not in WORLDS:
        raise ValueError(f"world is {name!r}, expected one of {', '.join(WORLDS)}.")
    return import_module(f".{name}", __name__).make(Path(home), fast, model)
