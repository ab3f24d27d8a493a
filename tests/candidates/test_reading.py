"""Reading the description of a candidate, and what of it is reused."""

import hashlib
import os

import pytest

from mashup_callback.candidates import Candidate, as_candidate, read_source
from mashup_callback.errors import AdapterError
from mashup_callback.formats import Adapter, Checkpoint, adapter_hash, read_adapter
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


def test_a_digest_counts_for_the_file_that_it_was_taken_of(adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    true = hashlib.sha256(weights.read_bytes()).hexdigest()
    status = os.stat(weights)
    known = Candidate("x", path=adapter, bytes=status.st_size, modified=status.st_mtime_ns, digest="0" * 64)
    assert read_source(known).digest == "0" * 64
    changed = Candidate("x", path=adapter, bytes=status.st_size, modified=status.st_mtime_ns - 1, digest="0" * 64)
    assert read_source(changed).digest == true == read_adapter(adapter).digest
    assert adapter_hash(read_source(changed)) == adapter_hash(read_adapter(adapter))
    assert adapter_hash(read_source(known)) != adapter_hash(read_adapter(adapter))
