"""Runs in processes of their own, next to the library of adapters that all tests share."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.launching import Case, Launcher, Run
from tests.full_model import save_models
from tests.hostile.library import save_library
from tests.tiny import llama, save_random_adapter


CALLBACK = {"batch_size": 4}


@pytest.fixture(scope="session")
def places(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """
    Returns base model and candidates of `adapters`, of the full models `untied` and `tied`, of `hostile` adapters
    beside good ones, of these `good` ones, or of `variants` that need the base model's weights.
    """
    made = {}

    def mixed(name: str) -> dict[str, str]:
        directory = made.setdefault("library", tmp_path_factory.mktemp("library"))
        if not any(directory.iterdir()):
            save_library(directory, library)
        return {
            "base": place("adapters")["base"],
            "candidates": f"{directory}/{'*' if name == 'hostile' else '*-good'}",
        }

    def variants() -> dict[str, str]:
        directory = tmp_path_factory.mktemp("variants")
        save_random_adapter(directory / "plain", 5)
        save_random_adapter(directory / "dora", 5, use_dora=True)
        save_random_adapter(directory / "head", 5, modules_to_save=["lm_head"])
        return {"base": place("adapters")["base"], "candidates": f"{directory}/*"}

    def place(name: str) -> dict[str, str]:
        if name in ("hostile", "good"):
            return mixed(name)
        if name == "variants":
            return variants()
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            llama(tie_word_embeddings=name == "tied").save_pretrained(directory / "base")
            candidates = library if name == "adapters" else save_models(directory / "models", 2, tied=name == "tied")
            made[name] = {"base": str(directory / "base"), "candidates": f"{candidates}/*"}
        return made[name]

    return place


@pytest.fixture(scope="session")
def launcher(request: pytest.FixtureRequest, places: Callable, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Runs the cases of all the tests that were selected."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [value for each in parameters if each for value in each.params.values() if isinstance(value, Case)]
    return Launcher(tmp_path_factory.mktemp("launched"), cases, places)


@pytest.fixture
def run(request: pytest.FixtureRequest, launcher: Launcher) -> Run:
    """What came of the case that the test is parametrized by."""
    found = launcher[request.param]
    assert request.param.ends or len(found.ranks) == 2, f"The case {request.param} failed.\n{found.output[-8000:]}"
    return found


# A second case of the same test.
other = run


@pytest.fixture(scope="session")
def train_here(places: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Runs a case in this process alone, on the same global batches."""
    from tests.distributed.training import train

    directory, numbers = tmp_path_factory.mktemp("alone"), itertools.count()

    def run_here(library: str = "adapters", **settings) -> Run:
        own = directory / str(next(numbers))
        return Run(own, [train(**{"directory": str(own), **places(library), **settings})])

    return run_here


@pytest.fixture(scope="session")
def alone(train_here: Callable[..., Run]) -> Run:
    return train_here(callback=CALLBACK)
