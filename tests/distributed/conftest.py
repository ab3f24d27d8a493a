"""Runs in processes of their own, next to the library of adapters that all tests share."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.launching import Run, launch
from tests.tiny import llama


@pytest.fixture(scope="session")
def start(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Starts a run with the shared library, see [`launch`]."""
    llama().save_pretrained(library.parent / "base")
    directory, numbers = tmp_path_factory.mktemp("launched"), itertools.count()
    return lambda **settings: launch(directory / str(next(numbers)), library, **settings)


@pytest.fixture(scope="session")
def alone(start: Callable[..., Run]) -> Run:
    """The same run in a single process, on the same global batches."""
    return start(world=1, callback={"batch_size": 4})
