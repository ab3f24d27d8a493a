"""An adapter as peft saves it, and the layers that it fits."""

import pytest
from hypothesis import strategies as st

from mashup_callback.formats import BaseModel, read_adapter
from tests.tiny import save_random_adapter


SHAPES = {"q_proj": (32, 32), "v_proj": (32, 16)}
LAYERS = {f"model.layers.{number}.self_attn.{name}": SHAPES[name] for number in range(2) for name in SHAPES}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture
def sound(tmp_path):
    return save_random_adapter(tmp_path / "sound", 0, target_modules=list(SHAPES))


def fitted(directory, layers=LAYERS, base_model=None):
    return read_adapter(directory).fit(BaseModel(layers, name=base_model))
