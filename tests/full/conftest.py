"""Trained checkpoints that the tests of full fine-tuning share."""

import pytest

from tests.full_model import save_models


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    """Three trained checkpoints, each in several shards."""
    return save_models(tmp_path_factory.mktemp("untied"), 3)


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def tied(request):
    return request.param


@pytest.fixture(scope="session")
def models(tmp_path_factory, tied, untied):
    """The checkpoints, or some whose head is their embeddings."""
    return save_models(tmp_path_factory.mktemp("tied"), 3, tied=True) if tied else untied
