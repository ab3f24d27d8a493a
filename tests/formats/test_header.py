"""Headers of safetensors files, broken in every way, and what the Hub says of a file's size."""

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mashup_callback.errors import AdapterError
from mashup_callback.formats import parse_header
from tests.formats.conftest import SHAPES, json_values
from tests.hostile.cases.case import BROKEN
from tests.hub.faults import safetensors_file as header
from tests.tiny import save_random_adapter


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    directory = save_random_adapter(tmp_path_factory.mktemp("genuine"), 0, target_modules=list(SHAPES))
    return (directory / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("size", [0, 8, 2**40, 2**62, 2**63, 2**64, -1])
def test_a_size_that_is_not_the_files_own_is_refused(genuine, size):
    """What the Hub says of a file may be wrong in any way."""
    assert parse_header(genuine, len(genuine))
    with pytest.raises(AdapterError, match=BROKEN):
        parse_header(genuine, size)


@given(st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(header), json_values.map(header)))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_header_or_are_refused(data):
    with contextlib.suppress(AdapterError):
        parse_header(data, len(data))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_refused_or_has_the_same_tensors(genuine, data):
    expected = parse_header(genuine, len(genuine))
    length = 8 + struct.unpack("<Q", genuine[:8])[0]
    position = data.draw(st.integers(0, length - 1))
    damaged = bytearray(genuine)
    damaged[position] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.sampled_from([len(damaged), length, position]))])
    try:
        found = parse_header(damaged, len(damaged))
    except AdapterError:
        return
    # A damaged letter in a name goes unnoticed here; the shapes and the file as a whole do not.
    assert sorted(info.shape for info in found.values()) == sorted(info.shape for info in expected.values())
