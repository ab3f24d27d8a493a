"""Whether an adapter fits the model at hand: the names, shapes and prefixes of its layers."""

import pytest

from mashup_callback.errors import AdapterError
from mashup_callback.formats import load_factors
from tests.formats.conftest import LAYERS, fitted
from tests.hostile.cases.case import Q
from tests.hostile.damage import fields


@pytest.mark.parametrize("add", ["0.auto_model.", "wrapped."])
def test_one_prefix_is_added_or_removed(sound, add):
    layers = {add + name: shape for name, shape in LAYERS.items()}
    assert fitted(sound, layers).modules.keys() == layers.keys()
    layers = {name.removeprefix("model."): shape for name, shape in LAYERS.items()}
    checked = fitted(sound, layers)
    assert checked.modules.keys() == layers.keys()
    assert load_factors(checked).keys() == layers.keys()


def test_two_possible_prefixes_are_refused(sound):
    layers = {side + name: shape for side in ("encoder.", "decoder.") for name, shape in LAYERS.items()}
    with pytest.raises(AdapterError, match=r"could be encoder.* or decoder"):
        fitted(sound, layers)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "4 of its 4 modules are no linear layers"),
        ({name.replace("v_proj", "o_proj"): shape for name, shape in LAYERS.items()}, "2 of its 4 modules"),
        (LAYERS | {Q: (48, 32)}, "maps 32 features to 32, expected 48 to 32"),
        (LAYERS | {Q: (32, 48)}, "maps 32 features to 32, expected 32 to 48"),
    ],
)
def test_an_adapter_of_another_model_is_refused(sound, layers, message):
    with pytest.raises(AdapterError, match=f"trained on another base model.*{message}"):
        fitted(sound, layers)


@pytest.mark.parametrize(
    ("recorded", "base_model", "warns"),
    [
        ("google/gemma-3-1b", "google/gemma-3-1b", False),
        ("/models/Gemma-3-1B/", "google/gemma-3-1b", False),
        ("/hub/models--google--gemma-3-1b/snapshots/0a1b", "google/gemma-3-1b", False),
        (None, "google/gemma-3-1b", False),
        ("google/gemma-3-1b", None, False),
        ("google/gemma-3-4b", "google/gemma-3-1b", True),
    ],
)
def test_another_recorded_name_is_a_warning(sound, recorded, base_model, warns):
    fields(base_model_name_or_path=recorded)(sound)
    assert bool(fitted(sound, base_model=base_model).warnings) == warns
