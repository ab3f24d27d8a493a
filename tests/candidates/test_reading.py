"""Reading the description of a candidate, and what of it is reused."""

import pytest

from mashup_callback.candidates import Candidate, as_candidate, read_source
from mashup_callback.errors import AdapterError
from mashup_callback.formats import Adapter, Checkpoint
from tests.tiny import llama, save_random_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_random_adapter(tmp_path_factory.mktemp("adapters") / "adapter", 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reason": "beyond max_candidates=1"}, "beyond max_candidates"),
        ({"kind": "model"}, "config.json cannot be read"),
        ({"path": None, "repo_id": "org/x"}, "not been downloaded"),
    ],
    ids=str,
)
def test_what_cannot_be_read_says_why(adapter, fields, message):
    with pytest.raises(AdapterError, match=message):
        read_source(Candidate(**{"name": "x", "path": adapter} | fields))


def test_a_directory_is_read_as_what_it_is(adapter, tmp_path):
    llama().save_pretrained(tmp_path / "model")
    found, model = (read_source(as_candidate(path)) for path in (adapter, tmp_path / "model"))
    assert isinstance(found, Adapter) and found.path == adapter
    assert isinstance(model, Checkpoint) and model.path == tmp_path / "model"
    assert read_source(as_candidate(adapter), lambda description: description.rank) == 4
