import contextlib
import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mashup_callback.errors import AdapterError
from mashup_callback.formats import (
    BaseModel,
    adapter_hash,
    load_factors,
    parse_adapter,
    parse_config,
    parse_header,
    read_adapter,
)
from mashup_callback.formats.adapter_config import AdapterConfig
from mashup_callback.lora import save_adapter, writer
from mashup_callback.lowrank import LoraFactors
from tests.tiny import LINEAR, save_random_adapter


A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj"
LAYERS = {
    f"model.layers.{i}.self_attn.{name}": (32, out) for i in (0, 1) for name, out in (("q_proj", 32), ("v_proj", 16))
}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def train_in_peft(base, directory: Path, dtype=torch.float32, **settings) -> dict[str, torch.Tensor]:
    """Saves a random adapter with peft; returns peft's own delta weights, the oracle."""
    torch.manual_seed(1)
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**(defaults | settings)))
    deltas = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            torch.nn.init.normal_(layer.lora_B["default"].weight)
            for factor in (layer.lora_A, layer.lora_B):
                factor["default"].weight.data = factor["default"].weight.data.to(dtype)
            deltas[name] = layer.get_delta_weight("default").detach().float().clone()
    model.save_pretrained(directory)
    model.unload()
    return deltas


@pytest.fixture
def sound(base, tmp_path) -> Path:
    train_in_peft(base, tmp_path / "sound")
    return tmp_path / "sound"


def check_adapter(adapter, layers, base_model=None):
    return adapter.fit(BaseModel(layers, name=base_model))


def edit_config(directory: Path, **fields) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(directory: Path, change) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# --- adapters made by peft -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"self_attn.v_proj": 32}},
        {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 3}, "alpha_pattern": {Q_PROJ: 5}, "use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"target_modules": r".*\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
)
def test_factors_are_what_peft_computes(base, tmp_path, settings):
    deltas = train_in_peft(base, tmp_path, **settings)
    adapter = check_adapter(read_adapter(tmp_path), LAYERS)
    factors = load_factors(adapter)
    assert factors.keys() == deltas.keys() == adapter.modules.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(factors[name].delta(), delta)
        assert adapter.modules[name].rank == factors[name].rank
    assert adapter.rank == 4
    assert adapter.warnings == ()


def test_bfloat16_is_read_and_converted(base, tmp_path):
    deltas = train_in_peft(base, tmp_path, dtype=torch.bfloat16)
    adapter = read_adapter(tmp_path)
    assert adapter.dtype == "bfloat16"
    factors = load_factors(adapter)[Q_PROJ]
    assert factors.A.dtype == torch.float32
    torch.testing.assert_close(factors.delta(), deltas[Q_PROJ], rtol=2e-2, atol=2e-2)
    assert load_factors(adapter, dtype=torch.float64)[Q_PROJ].B.dtype == torch.float64


def test_an_adapter_that_learnt_nothing_is_sound(sound):
    edit_tensors(sound, lambda tensors: [tensors[key].zero_() for key in tensors if "lora_B" in key])
    assert all(factor.norm() == 0 for factor in load_factors(read_adapter(sound)).values())


def test_an_adapter_knows_where_it_is(sound):
    assert read_adapter(str(sound)).path == sound
    config, weights = ((sound / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
    length = 8 + struct.unpack("<Q", weights[:8])[0]
    remote = parse_adapter(config, weights[:length], len(weights))
    here = read_adapter(sound)
    assert remote.path is None and (remote.config, remote.modules, remote.dtype, remote.warnings) == (
        here.config,
        here.modules,
        here.dtype,
        here.warnings,
    )
    for use in (load_factors, adapter_hash):
        with pytest.raises(AdapterError, match="not been downloaded"):
            use(remote)
    with pytest.raises(AdapterError, match="truncated"):
        parse_adapter(config, weights[:length], len(weights) - 1)


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


# --- writing ---------------------------------------------------------------------------------------------------------


def random_factors(ranks: dict[str, int], scaling: dict[str, float], seed: int = 0) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            torch.randn(rank, LAYERS[name][0], generator=generator),
            torch.randn(LAYERS[name][1], rank, generator=generator),
            scaling[name],
        )
        for name, rank in ranks.items()
    }


@pytest.mark.parametrize("ranks", [[4, 4, 4, 4], [2, 4, 4, 3], [1, 2, 3, 4]])
@pytest.mark.parametrize("scalings", [[1.0] * 4, [0.5, 2.0, 1 / 3, 0.5]])
def test_a_saved_adapter_gives_the_same_logits_in_peft(base, tmp_path, ranks, scalings):
    factors = random_factors(dict(zip(LAYERS, ranks, strict=True)), dict(zip(LAYERS, scalings, strict=True)))
    path = save_adapter(tmp_path / "new" / "adapter", factors, base_model="org/base", task_type="CAUSAL_LM")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        for name, factor in factors.items():
            base.get_submodule(name).weight += factor.delta()
        expected = base(ids).logits
        for name, factor in factors.items():
            base.get_submodule(name).weight -= factor.delta()
        model = PeftModel.from_pretrained(base, path)
        found = model(ids).logits
        model.unload()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    loaded = load_factors(check_adapter(read_adapter(path), LAYERS, "org/base"))
    for name, factor in factors.items():
        torch.testing.assert_close(loaded[name].A, factor.A, rtol=0, atol=0)
        assert math.isclose(loaded[name].scaling, factor.scaling, rel_tol=1e-12)


def test_a_name_that_ends_like_another_keeps_its_own_rank_and_scaling(tmp_path):
    ranks = {"q_proj": 2, "layers.q_proj": 3, "decoder.layers.q_proj": 3, "x.q_proj": 3}
    factors = {n: LoraFactors(torch.ones(r, 4), torch.ones(4, r), 2.0 if r == 2 else 1.0) for n, r in ranks.items()}
    adapter = read_adapter(save_adapter(tmp_path / "x", factors, base_model=None))
    assert {name: (shape.rank, shape.scaling) for name, shape in adapter.modules.items()} == {
        name: (factor.rank, factor.scaling) for name, factor in factors.items()
    }


def test_views_of_one_tensor_and_a_dtype_are_saved(tmp_path):
    block = torch.randn(64, 32)
    factors = {Q_PROJ: LoraFactors(block[:4], block[:32].T[:, :4], 1.0)}
    adapter = read_adapter(save_adapter(tmp_path / "x", factors, base_model=None, dtype=torch.bfloat16))
    assert adapter.dtype == "bfloat16"
    assert adapter.config.base_model is None
    torch.testing.assert_close(load_factors(adapter)[Q_PROJ].A, block[:4].bfloat16().float(), rtol=0, atol=0)


def test_saving_replaces_an_adapter_and_leaves_nothing_else(tmp_path):
    for seed in (0, 1):
        factors = random_factors({Q_PROJ: 4}, {Q_PROJ: 1.0}, seed)
        save_adapter(tmp_path / "x", factors, base_model=None)
    torch.testing.assert_close(load_factors(read_adapter(tmp_path / "x"))[Q_PROJ].A, factors[Q_PROJ].A)
    assert os.listdir(tmp_path) == ["x"]
    assert sorted(os.listdir(tmp_path / "x")) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("failing", ["write_adapter", "rename"])
def test_a_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch, failing):
    save_adapter(tmp_path / "x", random_factors({Q_PROJ: 4}, {Q_PROJ: 1.0}), base_model=None)
    before = adapter_hash(read_adapter(tmp_path / "x"))

    def fail(source, *args, **settings):
        if failing == "write_adapter" or (".x." in str(source) and not str(source).endswith(".old")):
            raise OSError(28, "No space left on device")
        return rename(source, *args)

    rename = os.rename
    monkeypatch.setattr(*((writer, "write_adapter") if failing == "write_adapter" else (os, "rename")), fail)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tmp_path / "x", random_factors({Q_PROJ: 2}, {Q_PROJ: 1.0}), base_model=None)
    assert adapter_hash(read_adapter(tmp_path / "x")) == before
    assert os.listdir(tmp_path) == ["x"]


def test_saving_never_removes_other_files(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    factors = random_factors({Q_PROJ: 4}, {Q_PROJ: 1.0})
    with pytest.raises(ValueError, match="holds checkpoint-1 and would be replaced"):
        save_adapter(tmp_path, factors, base_model=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_adapter(tmp_path / "file", factors, base_model=None)
    with pytest.raises(ValueError, match="no factors"):
        save_adapter(tmp_path / "x", {}, base_model=None)


# --- against the live model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add", ["0.auto_model.", "wrapped."])
def test_one_prefix_is_added_or_removed(sound, add):
    adapter = read_adapter(sound)
    layers = {add + name: shape for name, shape in LAYERS.items()}
    assert check_adapter(adapter, layers).modules.keys() == layers.keys()
    layers = {name.removeprefix("model."): shape for name, shape in LAYERS.items()}
    checked = check_adapter(adapter, layers)
    assert checked.modules.keys() == layers.keys()
    assert load_factors(checked).keys() == layers.keys()


def test_two_possible_prefixes_are_refused(sound):
    layers = {side + name: shape for side in ("encoder.", "decoder.") for name, shape in LAYERS.items()}
    with pytest.raises(AdapterError, match=r"could be encoder.* or decoder"):
        check_adapter(read_adapter(sound), layers)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "4 of its 4 modules are no linear layers"),
        ({name.replace("v_proj", "o_proj"): shape for name, shape in LAYERS.items()}, "2 of its 4 modules"),
        (LAYERS | {Q_PROJ: (48, 32)}, "maps 32 features to 32, expected 48 to 32"),
        (LAYERS | {Q_PROJ: (32, 48)}, "maps 32 features to 32, expected 32 to 48"),
    ],
)
def test_an_adapter_of_another_model_is_refused(sound, layers, message):
    with pytest.raises(AdapterError, match=f"trained on another base model.*{message}"):
        check_adapter(read_adapter(sound), layers)


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
    edit_config(sound, base_model_name_or_path=recorded)
    assert bool(check_adapter(read_adapter(sound), LAYERS, base_model).warnings) == warns


# --- hostile configurations ------------------------------------------------------------------------------------------

HOSTILE_FIELDS = [
    ({"peft_type": "XLORA"}, "`peft_type` is XLORA"),
    ({"peft_type": ["LORA"]}, "`peft_type`"),
    ({"use_dora": True}, "lora_magnitude_vector is missing"),
    ({"bias": "some"}, "`bias` is some"),
    ({"lora_bias": 1}, "`lora_bias`"),
    ({"modules_to_save": ["lm_head"]}, "`modules_to_save` names lm_head, expected tensors"),
    ({"modules_to_save": ["a"] * 200_000}, "`modules_to_save` has 200,000 entries for 8 tensors"),
    ({"trainable_token_indices": [1]}, "`trainable_token_indices`"),
    ({"layer_replication": [[0, 1]] * 1000}, "`layer_replication`"),
    ({"target_parameters": ["experts.gate"]}, "`target_parameters`"),
    ({"megatron_config": {"a": 1}}, "`megatron_config`"),
    ({"alora_invocation_tokens": [1]}, "`alora_invocation_tokens`"),
    ({"use_qalora": True}, "`use_qalora`"),
    ({"use_bdlora": {"nblocks": 2}}, "`use_bdlora`"),
    ({"arrow_config": {"top_k": 1}}, "`arrow_config`"),
    ({"kasa_config": {"beta": 1}}, "`kasa_config`"),
    ({"a_feature_of_tomorrow": 1}, "`a_feature_of_tomorrow`.*not known"),
    *[
        ({"init_lora_weights": init}, "`init_lora_weights`.*changed the base model")
        for init in ("pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "tomorrow", 1, ["pissa"])
    ],
    ({"r": 10**8}, "`r` is 100000000"),
    ({"r": True}, "`r` is True"),
    ({"r": 4.0}, "`r` is 4.0"),
    ({"r": 0}, "`r` is 0"),
    ({"r": 2}, "has rank 4, but adapter_config.json says 2"),
    ({"r": None}, "`r` is None"),
    ({"lora_alpha": math.nan}, "NaN"),
    ({"lora_alpha": math.inf}, "Infinity"),
    ({"lora_alpha": 1e30}, r"`lora_alpha` is 1e\+30"),
    ({"lora_alpha": "8"}, "`lora_alpha` is 8"),
    ({"lora_alpha": -8}, "`lora_alpha` is -8"),
    ({"use_rslora": "false"}, "`use_rslora` is false, expected true or false"),
    ({"use_rslora": 1}, "`use_rslora` is 1"),
    ({"rank_pattern": {"(a+)+$": 4}}, "`rank_pattern` has the key.*regular expression characters"),
    ({"alpha_pattern": {".*": 4}}, "regular expression characters"),
    ({"alpha_pattern": {"^": 4}}, "regular expression characters"),
    ({"rank_pattern": {"q_proj": 10**8}}, r"`rank_pattern\[q_proj\]`"),
    ({"rank_pattern": {"q_proj": 2}}, "has rank 4, but adapter_config.json says 2"),
    ({"rank_pattern": [1]}, "`rank_pattern` is"),
    ({"alpha_pattern": {"q_proj": 1e30}}, r"`alpha_pattern\[q_proj\]`"),
    ({"base_model_name_or_path": ["a"]}, "`base_model_name_or_path`"),
    ({"base_model_name_or_path": "a" * 10**5}, "`base_model_name_or_path`"),
    ({"target_modules": [1]}, "`target_modules`"),
    ({"revision": 1}, "`revision`"),
    ({"task_type": ["SEQ_CLS"]}, "`task_type`"),
    ({"target_modules": {"q_proj": 1}}, "`target_modules`"),
]


@pytest.mark.parametrize(("fields", "message"), HOSTILE_FIELDS, ids=lambda value: str(value)[:40])
def test_hostile_configurations_are_refused(sound, fields, message):
    edit_config(sound, **fields)
    with pytest.raises(AdapterError, match=message) as error:
        read_adapter(sound)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "fields",
    [
        *({"lora_dropout": 2}, {"eva_config": "x"}, {"layers_pattern": [1]}, {"inference_mode": "no"}),
        *({"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}),
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_not_looked_at(sound, fields):
    before = adapter_hash(read_adapter(sound))
    edit_config(sound, **fields)
    assert adapter_hash(read_adapter(sound)) == before


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_regular_expressions_are_data(sound, field):
    edit_config(sound, **{field: "(a+)+" * 50 + "$"})
    assert len(read_adapter(sound).modules) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "holds a JSON list"),
        (b"", "adapter_config.json is empty"),
        (b"\xff\xfe", "not strict JSON"),
        (b'{"r": 4, "r": 8}', "a key appears twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"peft_type":' * 50_000, "nested too deeply"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "not strict JSON"),
        (b'{"x": "' + b"a" * 2**20 + b'"}', "larger than 1,048,576 bytes"),
    ],
    ids=range(8),
)
def test_files_that_are_no_configuration_are_refused(sound, text, message):
    (sound / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterError, match=message):
        read_adapter(sound)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
field_names = st.sampled_from(
    [
        "r",
        "lora_alpha",
        "bias",
        "rank_pattern",
        "init_lora_weights",
        "use_rslora",
        "target_modules",
        "loftq_config",
        "x",
    ]
)


@given(st.dictionaries(field_names, json_values, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_configuration_is_read_or_refused(fields):
    try:
        config = parse_config(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | fields).encode())
    except AdapterError:
        return
    assert 0 < config.scaling_of("a.b", config.rank_of("a.b")) < math.inf


# --- hostile weights -------------------------------------------------------------------------------------------------


def renamed(old: str, new: str):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def replaced(key: str, tensor: torch.Tensor):
    def change(tensors):
        tensors[key] = tensor

    return change


def poisoned(value: float):
    def change(tensors):
        tensors[A_KEY][0, 0] = value

    return change


HOSTILE_TENSORS = [
    (replaced("base_model.model.model.embed_tokens.weight", torch.zeros(64, 32)), "embed_tokens.*no LoRA factor"),
    (replaced(f"base_model.model.{Q_PROJ}.base_layer.weight", torch.zeros(32, 32)), "would overwrite a weight"),
    (replaced("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 64)), "lora_B.weight is missing"),
    (replaced(A_KEY.replace("lora_A.weight", "lora_magnitude_vector"), torch.zeros(32)), "DoRA"),
    (replaced(B_KEY.replace("weight", "bias"), torch.zeros(32)), "trained biases"),
    (replaced("base_model.model.lora_A.weight", torch.zeros(4, 32)), "unexpected tensor"),
    (replaced(f"base_model.model.{'a.' * 10**5}lora_A.weight", torch.zeros(4, 32)), "a name of 200,030 characters"),
    (lambda tensors: tensors.pop(A_KEY), "lora_A.weight is missing"),
    (lambda tensors: tensors.pop(B_KEY), "lora_B.weight is missing"),
    (lambda tensors: tensors.clear(), "holds no tensors"),
    (renamed(A_KEY, A_KEY.removeprefix("base_model.model.")), "unexpected tensor model.layers.0"),
    (replaced(A_KEY, torch.zeros(3, 32)), "q_proj make no update: the ranks differ, 3 rows .* 4 columns"),
    (replaced(A_KEY, torch.zeros(4, 32, 1, 1)), "expected a matrix"),
    (replaced(A_KEY, torch.zeros(4, 0)), "expected a matrix"),
    (replaced(A_KEY, torch.zeros(4, 32, dtype=torch.int8)), "dtype I8"),
    (replaced(A_KEY, torch.zeros(4, 32, dtype=torch.bool)), "dtype BOOL"),
    (replaced(A_KEY, torch.zeros(4, 33)), "maps 33 features to 32, expected 32 to 32"),
    (poisoned(math.nan), "holds the value nan"),
    (poisoned(math.inf), "holds the value inf"),
    (poisoned(-1e18), r"holds the value 1e\+18, expected at most 10000"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE_TENSORS, ids=range(len(HOSTILE_TENSORS)))
def test_hostile_weights_are_refused(sound, change, message):
    edit_tensors(sound, change)
    with pytest.raises(AdapterError, match=message):
        load_factors(check_adapter(read_adapter(sound), LAYERS))


def test_the_update_as_a_whole_is_bounded(sound):
    edit_config(sound, lora_alpha=1e5)
    edit_tensors(sound, lambda tensors: [tensor.fill_(1e4) for tensor in tensors.values()])
    factors = load_factors(read_adapter(sound))
    assert all(math.isfinite(factor.delta().abs().max()) for factor in factors.values())


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, **fields) -> dict:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]} | fields


BROKEN = "truncated, padded or no safetensors"
HOSTILE_HEADERS = [
    (b"", "adapter_model.safetensors is empty"),
    (b"0", "truncated: 1 bytes"),
    (header({}, length=2**63), "header of 9,223,372,036,854,775,808 bytes"),
    (header({}, length=10_000_001, data=b" " * 10_000_001), "header of 10,000,001 bytes"),
    (header({}, length=1), BROKEN),
    (header({}, length=100), f"{BROKEN}.*header length"),
    (header([]), f"{BROKEN}.*sequence"),
    (header(b"[" * 100_000), BROKEN),
    (header(b'{"a": ' * 100_000), BROKEN),
    (header(b'{"a": 1, "a": 2}'), BROKEN),
    (header({"a": 1}), f"{BROKEN}.*TensorInfo"),
    # What safetensors has no use for is not looked at; the key is.
    (header({"a": entry(0, 8, extra=1)}, b"0" * 8), "unexpected tensor a"),
    (header({"a": entry(0, 8, dtype=["F32"])}, b"0" * 8), BROKEN),
    (header({"a": entry(0, 8, dtype="F8")}, b"0" * 8), BROKEN),
    (header({"a": entry(0, 8, shape=[True])}, b"0" * 8), f"{BROKEN}.*boolean"),
    (header({"a": entry(0, 8, shape=[-2])}, b"0" * 8), BROKEN),
    (header({"a": entry(0, 8, shape=[2.0])}, b"0" * 8), BROKEN),
    (header({"a": entry(0, 8, shape="2")}, b"0" * 8), BROKEN),
    (header({"a": entry(0, 8, shape=[10**30])}, b"0" * 8), BROKEN),
    (header({"a": entry(0, 8, shape=[2**40, 2**40])}, b"0" * 8), BROKEN),
    (header({"a": entry(0, 8, shape=[3])}, b"0" * 8), f"{BROKEN}.*shape"),
    (header({"a": entry(8, 0, shape=[2])}, b"0" * 8), f"{BROKEN}.*offset"),
    (header({"a": entry(0, 8, data_offsets=[0])}, b"0" * 8), BROKEN),
    (header({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12), f"{BROKEN}.*offset"),
    (header({"a": entry(0, 8), "b": entry(12, 16)}, b"0" * 16), f"{BROKEN}.*offset"),
    (header({"a": entry(0, 8)}, b"0" * 7), f"{BROKEN}.*not fully covered"),
    (header({"a": entry(0, 8)}, b"0" * 9), f"{BROKEN}.*not fully covered"),
    (header({"__metadata__": {"format": 1}}), BROKEN),
    (header({"__metadata__": ["pt"]}), BROKEN),
]


@pytest.mark.parametrize(("data", "message"), HOSTILE_HEADERS, ids=range(len(HOSTILE_HEADERS)))
def test_malformed_safetensors_are_refused(sound, data, message):
    (sound / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match=message):
        read_adapter(sound)


@pytest.mark.parametrize("size", [0, 8, 2**40, 2**62, 2**63, 2**64, -1])
def test_a_size_that_is_not_the_files_own_is_refused(genuine, size):
    """What the Hub says of a file may be wrong in any way."""
    data = (genuine / "adapter_model.safetensors").read_bytes()
    assert parse_header(data, len(data))
    with pytest.raises(AdapterError, match=BROKEN):
        parse_header(data, size)


@given(st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(header), json_values.map(header)))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_header_or_are_refused(data):
    with contextlib.suppress(AdapterError):
        parse_header(data, len(data))


@pytest.fixture(scope="module")
def genuine(base, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("genuine")
    train_in_peft(base, directory)
    return directory


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_refused_or_has_the_same_tensors(genuine, data):
    original = (genuine / "adapter_model.safetensors").read_bytes()
    expected = parse_header(original, len(original))
    length = 8 + struct.unpack("<Q", original[:8])[0]
    position = data.draw(st.integers(0, length - 1))
    damaged = bytearray(original)
    damaged[position] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.sampled_from([len(damaged), length, position]))])
    try:
        found = parse_header(damaged, len(damaged))
    except AdapterError:
        return
    # A damaged letter in a name goes unnoticed here; the shapes and the file as a whole do not.
    assert sorted(info.shape for info in found.values()) == sorted(info.shape for info in expected.values())


# --- the file system -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files_directories_and_pipes_are_refused(sound, name):
    (sound / name).unlink()
    with pytest.raises(AdapterError, match=f"{name} cannot be read"):
        read_adapter(sound)
    (sound / name).mkdir()
    with pytest.raises(AdapterError, match=f"{name} is not a regular file"):
        read_adapter(sound)
    (sound / name).rmdir()
    os.mkfifo(sound / name)
    with pytest.raises(AdapterError, match=f"{name} is not a regular file"):
        read_adapter(sound)


@pytest.mark.parametrize("change", ["grow", "truncate", "rewrite", "remove"])
def test_a_file_that_changed_since_it_was_read_is_refused(sound, change):
    adapter = read_adapter(sound)
    path = sound / "adapter_model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if change != "remove":
        path.write_bytes({"grow": data + b"0", "truncate": data[:-1], "rewrite": data}[change])
        os.utime(path, ns=(adapter.stamp.modified + 1, adapter.stamp.modified + 1))
    for use in (load_factors, adapter_hash):
        with pytest.raises(AdapterError, match=r"changed while it was in use|cannot be read"):
            use(adapter)


def test_the_hash_depends_on_what_is_computed_only(sound, base, tmp_path):
    before = adapter_hash(read_adapter(sound))
    edit_config(sound, base_model_name_or_path="other", peft_version="0.1", lora_dropout=0.5)
    assert adapter_hash(read_adapter(sound)) == before
    edit_config(sound, lora_alpha=9)
    changed = adapter_hash(read_adapter(sound))
    assert changed != before
    edit_tensors(sound, poisoned(0.5))
    assert adapter_hash(read_adapter(sound)) not in (before, changed)


@pytest.mark.parametrize(
    ("extra", "dropped", "warning"),
    [
        (["nothing"], [], "`target_modules` contradicts the weights: nothing has no tensors"),
        ([], ["q_proj"], "such as model.layers.0.self_attn.q_proj, that it does not name"),
    ],
)
def test_target_modules_that_contradict_the_tensors_are_a_warning(tmp_path, extra, dropped, warning):
    adapter = save_random_adapter(tmp_path / "adapter", 0)
    assert read_adapter(adapter).warnings == ()
    edit_config(adapter, target_modules=[name for name in LINEAR + extra if name not in dropped])
    [found] = read_adapter(adapter).warnings
    assert warning in found


def test_regular_expressions_are_not_compared_with_the_tensors(sound):
    edit_config(sound, target_modules="all-linear")
    assert read_adapter(sound).warnings == ()
