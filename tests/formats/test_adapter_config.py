"""What the fields of a configuration mean, and what is no configuration."""

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from mashup_callback.errors import AdapterError
from mashup_callback.formats import adapter_hash, parse_config, read_adapter
from mashup_callback.formats.adapter_config import AdapterConfig
from tests.formats.conftest import json_values
from tests.hostile.cases.case import REGEX
from tests.hostile.damage import fields


names = st.lists(st.sampled_from(["a", "b", "a_b", "layers", "0", "q_proj"]), min_size=1, max_size=4).map(".".join)


@given(st.lists(st.builds("{}{}".format, st.sampled_from(["", "^"]), names), unique=True, max_size=4), names)
@example(["a.b"], "layers.a_b")
@example(["^a.b"], "layers.a.b")
@example(["b"], "a_b")
@settings(max_examples=300, deadline=None)
def test_patterns_match_as_in_peft_without_regular_expressions(keys, module):
    pattern = {key: rank for rank, key in enumerate(keys, start=2)}
    config = AdapterConfig(r=1, lora_alpha=1.0, rank_pattern=pattern)
    assert config.rank_of(module) == pattern.get(get_pattern_key(pattern, module), 1)


@pytest.mark.parametrize(
    "values",
    [
        *({"lora_dropout": 2}, {"eva_config": "x"}, {"layers_pattern": [1]}, {"inference_mode": "no"}),
        *({"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}),
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_not_looked_at(sound, values):
    before = adapter_hash(read_adapter(sound))
    fields(**values)(sound)
    assert adapter_hash(read_adapter(sound)) == before


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_regular_expressions_are_data(sound, field):
    fields(**{field: REGEX})(sound)
    assert len(read_adapter(sound).modules) == 4


field_names = [
    *("r", "lora_alpha", "bias", "rank_pattern", "init_lora_weights"),
    *("use_rslora", "target_modules", "loftq_config", "x"),
]


@given(st.dictionaries(st.sampled_from(field_names), json_values, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_configuration_is_read_or_refused(fields):
    try:
        config = parse_config(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | fields).encode())
    except AdapterError:
        return
    assert 0 < config.scaling_of("a.b", config.rank_of("a.b")) < math.inf
