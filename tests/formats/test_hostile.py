"""The hostile adapters of the collection, and some more, are refused by reading them alone, without a model."""

from math import inf

import pytest
import torch

from mashup_callback.errors import AdapterError
from mashup_callback.formats import load_factors, read_adapter
from tests.formats.conftest import fitted
from tests.hostile.cases import configs, headers, values
from tests.hostile.cases.case import BROKEN, PREFIX, QA, QB, Q
from tests.hostile.cases.configs import config
from tests.hostile.cases.headers import head
from tests.hostile.cases.values import value
from tests.hostile.damage import WEIGHTS, content, filled, tensors, zeros
from tests.hub.faults import safetensors_file


# What is refused with a model at hand, or for another reason.
LATER = ("lora_alpha=100000", "many names beside many modules", "weights of the base", "huge factors")


def refused(*modules):
    cases = [case for module in modules for case in module.CASES if case.reason and not case.either]
    return [case for case in cases if case.size is None and case.name not in LATER]


def only(entries, data=b"", size=None):
    """Weights that are nothing but this."""
    return content(WEIGHTS, safetensors_file(entries, data, size))


A, OVERLAP, GAP = ({"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]} for start in (0, 4, 12))
FILES = [
    *refused(configs, headers),
    config("bias", "some", "`bias` is some"),
    config("lora_bias", 1, "`lora_bias`"),
    config("modules_to_save", ["lm_head"], "`modules_to_save` names lm_head, expected tensors"),
    config("modules_to_save", ["a"] * 200_000, "`modules_to_save` has 200,000 entries for 8 tensors"),
    config("trainable_token_indices", [1], "`trainable_token_indices`"),
    config("lora_alpha", inf, "Infinity"),
    config("alpha_pattern", {"^": 4}, "regular expression characters"),
    head("a header that is as long as it says", only({}, b" " * 10_000_001, 10_000_001), "header of 10,000,001 bytes"),
    head("a length of one", only({}, size=1), BROKEN),
    head("a number in the place of a tensor", only({"a": 1}), f"{BROKEN}.*TensorInfo"),
    # What safetensors has no use for is not looked at; the key is.
    head("a property more, and another name", only({"a": {**A, "extra": 1}}, b"0" * 8), "unexpected tensor a"),
    head("an overlap", only({"a": A, "b": OVERLAP}, b"0" * 12), f"{BROKEN}.*offset"),
    head("a gap", only({"a": A, "b": GAP}, b"0" * 20), f"{BROKEN}.*offset"),
]
TENSORS = [
    *refused(values),
    value("weights of the base alone", zeros(f"{PREFIX}model.embed_tokens.weight", 64, 32), "tokens.*no LoRA factor"),
    value("DoRA's magnitudes", zeros(f"{PREFIX}{Q}.lora_magnitude_vector", 32), "DoRA"),
    value("a bias of B", zeros(QB.replace("weight", "bias"), 32), "trained biases"),
    value("no tensors", tensors(lambda found: found.clear()), "holds no tensors"),
    value("a tensor of four dimensions", zeros(QA, 4, 32, 1, 1), "expected a matrix"),
    value("no inputs", zeros(QA, 4, 0), "expected a matrix"),
    value("whole numbers", zeros(QA, 4, 32, dtype=torch.int8), "dtype I8"),
    value("truth values", zeros(QA, 4, 32, dtype=torch.bool), "dtype BOOL"),
    value("infinity", filled(QA, inf), "holds the value inf"),
]


@pytest.mark.parametrize("case", [*FILES, *TENSORS], ids=str)
def test_what_is_hostile_is_refused(sound, case):
    case.change(sound)
    with pytest.raises(AdapterError, match=case.reason) as error:
        if case in FILES:
            read_adapter(sound)
        else:
            load_factors(fitted(sound))
    assert len(str(error.value)) < 500
