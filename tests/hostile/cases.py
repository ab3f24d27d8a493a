"""The collection: what is done to a good adapter or checkpoint, and the reason with which it must be rejected."""

import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hostile.damage import (
    CARD,
    CONFIG,
    INDEX,
    MODEL,
    MODEL_CONFIG,
    WEIGHTS,
    Change,
    both,
    changed,
    content,
    entry,
    fields,
    filled,
    gone,
    header,
    header_text,
    kept_stamp,
    link,
    longer,
    mapped,
    moved,
    packed,
    put,
    raw,
    renamed,
    special,
    tensors,
    without,
)
from tests.tiny import llama


@dataclass(frozen=True, eq=False)
class Case:
    """
    One hostile adapter or checkpoint.

    Args:
        name (`str`): What is done.
        kind (`str`): Row of the table of outcomes.
        change (`Change`): Does it to a copy of a good one.
        reason (`str`, *optional*): What the reason for its rejection says; None where it is harmless.
        base (`str`): What is copied: `adapter`, one of another kind, `model` (in shards) or `tied` (one file, the head
            is the embeddings).
        taker (`str`): Which trainee it is a candidate of where that does not follow from what is copied.
        either (`bool`): Whether it may as well be taken, and then computes what peft computes.
        own (`dict`): Fields that peft is given in the place of claims that it would run, or fail on.
        later (`Change`, *optional*): What happens after its description was read.
        field (`str`): Field of `LoraConfig` that is changed.
        size (`int`, *optional*): Size that the Hub states for its weights.
    """

    name: str
    kind: str
    change: Change
    reason: str | None = None
    base: str = "adapter"
    taker: str = ""
    either: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)
    later: Change | None = None
    field: str = ""
    size: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def config(name: str, value: Any, reason: str | None = None, *, either: bool = False, **own: Any) -> Case:
    """A value for one field of `adapter_config.json`."""
    return Case(
        f"{name}={str(value)[:40]}", FIELDS, fields(**{name: value}), reason, either=either, own=own, field=name
    )


FIELDS, JSON, HEADER, VALUES, FILES, CARDS, MODELS, KINDS, RACES = (
    "fields of adapter_config.json",
    "adapter_config.json as a file",
    "safetensors header",
    "names and values of tensors",
    "kinds of files",
    "model cards",
    "full checkpoints",
    "other kinds of adapters",
    "files that change while in use",
)
REGEX = "(a+)+" * 50 + "$"
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
QA, QB = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
BROKEN = "truncated, padded or no safetensors"
SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

CONFIGS = [
    *[
        config("peft_type", value, "`init_r`" if value == "ADALORA" else f"`peft_type` is {value}"[:20])
        for value in ("XLORA", "ADALORA", "IA3", "lora", None)
    ],
    config("peft_type", ["LORA"], "`peft_type` is .'LORA'"),
    config("task_type", ["SEQ_CLS"], "`task_type`"),
    config("task_type", "FEATURE_EXTRACTION", task_type=None),
    config("auto_mapping", {"base_model_class": "os.system", "parent_library": "os"}),
    config("peft_version", "99\n\x1b[31m", peft_version="0"),
    config("base_model_name_or_path", ["org/base"], "`base_model_name_or_path`"),
    config("base_model_name_or_path", "x" * 5000, "`base_model_name_or_path`"),
    config("base_model_name_or_path", "../../../etc/passwd\n\x1b[31m"),
    config("base_model_name_or_path", "\ud800"),
    config("revision", 1, "`revision`"),
    config("revision", "; rm -rf ~"),
    config("inference_mode", "no"),
    config("target_modules", [1], "`target_modules`"),
    config("target_modules", {"q_proj": 1}, "`target_modules`"),
    config("target_modules", REGEX, target_modules=["q_proj", "v_proj"]),
    config("target_modules", ["q_proj", "v_proj", "absent\n"]),
    config("exclude_modules", REGEX, exclude_modules=None),
    *[
        config("r", value, rf"`r` is {value}"[:14])
        for value in (10**8, 2**15 + 1, 0, -4, True, 4.0, None, "4", 10**300)
    ],
    config("r", 2, "has rank 4, but adapter_config.json says 2"),
    *[
        config("lora_alpha", value, f"`lora_alpha` is {re.escape(str(value))}")
        for value in (1e30, 0, -8, "8", None, True, [8], 100_001)
    ],
    config("lora_alpha", 5e-324),
    config("lora_alpha", 100_000, "times as large as the weight"),
    config("lora_dropout", 0.9),
    config("lora_dropout", 2, lora_dropout=0.0),
    config("fan_in_fan_out", True),
    *[config("bias", value, "`bias` is", either=True) for value in ("all", "lora_only")],
    *[config("bias", value, "`bias` is") for value in (None, ["none"], "None\n")],
    config("use_rslora", "false", "`use_rslora` is false, expected true or false"),
    config("use_rslora", 1, "`use_rslora` is 1"),
    config("use_rslora", True),
    config("modules_to_save", ["lm_head"], "`modules_to_save`"),
    config("modules_to_save", REGEX, "`modules_to_save`"),
    Case(
        "a head that a task trains",
        FIELDS,
        fields(task_type="SEQ_CLS", modules_to_save=["score"]),
        "a head of its own",
        field="modules_to_save",
    ),
    *[
        config("init_lora_weights", value, "`init_lora_weights`.*changed the base model")
        for value in ("pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "tomorrow", 1, ["pissa"], {})
    ],
    *[config("init_lora_weights", value) for value in (False, "gaussian", "orthogonal")],
    config("layers_to_transform", [7], layers_to_transform=None),
    config("layers_to_transform", "x", layers_to_transform=None),
    config("layers_pattern", REGEX, layers_pattern=None),
    config("rank_pattern", {REGEX: 4}, "`rank_pattern` has the key.*regular expression characters"),
    config("rank_pattern", {"": 4}, "`rank_pattern` has the key"),
    config("rank_pattern", [1], "`rank_pattern` is"),
    config("rank_pattern", {"q_proj": 10**8}, r"`rank_pattern\[q_proj\]`"),
    config("rank_pattern", {"q_proj": 2}, "has rank 4, but adapter_config.json says 2"),
    config("rank_pattern", {"self_attn.q_proj": 4, "proj": 9, "^q_proj": 7}),
    config("rank_pattern", {f"{i:x}": 4 for i in range(70_000)}, rank_pattern={}),
    config("alpha_pattern", {".*": 4}, "`alpha_pattern` has the key.*regular expression characters"),
    config("alpha_pattern", "q_proj", "`alpha_pattern` is"),
    config("alpha_pattern", {"q_proj": 1e30}, r"`alpha_pattern\[q_proj\]`"),
    config("alpha_pattern", {"q.proj": 32, "q_proj": 64, f"^{Q.replace('q', 'v')}": 2}),
    config("megatron_config", {"a": 1}, "`megatron_config`"),
    config("megatron_core", "os"),
    config("trainable_token_indices", [1], "`trainable_token_indices`", either=True),
    config("loftq_config", {"loftq_bits": 10**9}),
    config("loftq_config", "x", loftq_config={}),
    config("eva_config", "x", eva_config=None),
    config("corda_config", [[]], corda_config=None),
    config("lora_ga_config", {"x": 1}, lora_ga_config=None),
    config("use_dora", True, "lora_magnitude_vector is missing"),
    config("use_dora", "yes", "`use_dora`"),
    config("velora_config", {"rank": 1}, "`velora_config`"),
    config("alora_invocation_tokens", [1], "`alora_invocation_tokens`"),
    config("use_qalora", True, "`use_qalora`"),
    config("qalora_group_size", -1),
    config("monteclora_config", {"x": 1}, "`monteclora_config`"),
    config("layer_replication", [[0, 1]] * 1000, "`layer_replication`"),
    config("runtime_config", {"ephemeral_gpu_offload": True}, runtime_config={}),
    config("lora_bias", True, "`lora_bias`", either=True),
    config("target_parameters", ["experts.gate"], "`target_parameters`"),
    *[
        config("target_parameters", value, "`target_parameters` is .*, expected a list")
        for value in ("experts.gate", [1])
    ],
    config("use_bdlora", {"nblocks": 2}, "`use_bdlora`"),
    config("arrow_config", {"top_k": 1}, "`arrow_config`"),
    config("kasa_config", {"beta": 1}, "`kasa_config`"),
    config("ensure_weight_tying", True, "`ensure_weight_tying`"),
    config("a_feature\nof_tomorrow", 1, "`a_feature.of_tomorrow`.*not known"),
    config("x" * 10_000, [1], "`xxx.*is set to"),
]


def document(name: str, change: Change, reason: str | None = None, **own: Any) -> Case:
    return Case(name, JSON, change, reason, own=own)


DOCUMENTS = [
    document("a list", content(CONFIG, "[]"), "holds a JSON list"),
    document("a number", content(CONFIG, "1"), "holds a JSON int"),
    document("an empty object", content(CONFIG, "{}"), "`peft_type` is None"),
    document("empty", content(CONFIG, ""), "adapter_config.json is empty"),
    document("spaces", content(CONFIG, " " * 1000), "not strict JSON"),
    document("cut short", changed(CONFIG, lambda data: data[:-3]), "not strict JSON"),
    document("text after the end", changed(CONFIG, lambda data: data + b"{}"), "not strict JSON"),
    document("comments", changed(CONFIG, lambda data: b"// LoRA\n" + data), "not strict JSON"),
    document("a byte order mark", changed(CONFIG, lambda data: b"\xef\xbb\xbf" + data), "not strict JSON"),
    document("UTF-16", changed(CONFIG, lambda data: data.decode().encode("utf-16")), "not strict JSON"),
    document("no UTF-8", raw("revision", '"\\u00ff"'), None),
    document(
        "bytes that are no text", changed(CONFIG, lambda data: data.replace(b"0.21", b"\xff")), "not strict JSON"
    ),
    document("NaN", raw("lora_alpha", "NaN"), "NaN"),
    document("Infinity", raw("lora_dropout", "-Infinity"), "Infinity"),
    document("a number beyond floats", raw("lora_alpha", "1e999"), "`lora_alpha` is inf"),
    document("a number of 10,000 digits", raw("r", "9" * 10_000), "not strict JSON"),
    document("a key twice", raw("x", '0, "r": 4'), "a key appears twice"),
    document("lists in lists", raw("loftq_config", "[" * 100_000), "nested too deeply"),
    document("objects in objects", content(CONFIG, '{"peft_type":' * 50_000), "nested too deeply"),
    document("as deep as goes", raw("loftq_config", "[" * 400 + "]" * 400), None, loftq_config={}),
    document("too long", raw("loftq_config", f'"{"a" * 2**20}"'), "larger than 1,048,576 bytes"),
    document("too many values", raw("loftq_config", f"[{'0,' * 250_000}0]"), "more than 250,000 values"),
]


def head(name: str, change: Change, reason: str | None = None, **settings: Any) -> Case:
    return Case(name, HEADER, change, reason, **settings)


def _overlapping(entries: dict) -> None:
    entries[QA]["data_offsets"] = [offset - 4 for offset in entries[QA]["data_offsets"]]


def _nothing(*shape: int) -> Change:
    """Tensors of no bytes with a shape that torch does not take."""
    own = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    return content(WEIGHTS, packed(json.dumps({QA: own, QB: own}).encode()))


def _terabyte(directory: Path) -> None:
    own = {"dtype": "F32", "shape": [4, 2**35]}
    entries = {QA: {**own, "data_offsets": [0, 2**39]}, QB: {**own, "data_offsets": [2**39, 2**40]}}
    text = packed(json.dumps(entries).encode())
    content(WEIGHTS, text)(directory)
    longer(WEIGHTS, len(text) + 2**40)(directory)


def _many(count: int, size: int = 0) -> dict:
    names = [f"{PREFIX}{i:x}.lora_{letter}.weight" for i in range(count) for letter in "AB"]
    return {
        name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)
    }


HEADERS = [
    head("empty file", content(WEIGHTS, ""), "adapter_model.safetensors is empty"),
    head("no header", content(WEIGHTS, b"\0" * 7), "truncated: 7 bytes"),
    head("a length of zero", header_text(bytes, 0), BROKEN),
    head("a length that is too short", header_text(bytes, 20), BROKEN),
    head("a length beyond the file", header_text(bytes, 9_000_000), BROKEN),
    head("a length of 2^63", header_text(bytes, 2**63), "header of 9,223,372,036,854,775,808 bytes"),
    head("a length just beyond", header_text(bytes, 10_000_001), "header of 10,000,001 bytes"),
    head("spaces behind it", header_text(lambda text: text + b" " * 999), None),
    head("a space before it", header_text(lambda text: b" " + text), None),
    head("a byte order mark", header_text(lambda text: b"\xef\xbb\xbf" + text), BROKEN),
    head("UTF-16", header_text(lambda text: text.decode().encode("utf-16")), BROKEN),
    head("no text", header_text(lambda text: text.replace(b"q_proj", b"q_\xff\xff\xff\xff")), BROKEN),
    head("a list", content(WEIGHTS, packed(b"[]")), BROKEN),
    head("no tensors", content(WEIGHTS, packed(b"{}")), "holds no tensors"),
    head("lists in lists", content(WEIGHTS, packed(b"[" * 100_000)), BROKEN),
    head("objects in objects", content(WEIGHTS, packed(b'{"a":' * 100_000)), BROKEN),
    head("a tensor twice", header_text(lambda text: text.rstrip()[:-1] + b"," + text[1:]), BROKEN),
    head(
        "ten thousand tensors", content(WEIGHTS, packed(json.dumps(_many(10_000)).encode(), b"\0" * 80_000)), "rank 1"
    ),
    head(
        "as many keys as modules",
        both(
            content(WEIGHTS, packed(json.dumps(_many(1001)).encode(), b"\0" * 8008)),
            fields(r=1, alpha_pattern={f"x{i:x}": 4 for i in range(1001)}),
        ),
        "`alpha_pattern` has 1,001 entries for 1,001 modules",
    ),
    head(
        "many parameters beside many modules",
        both(
            content(WEIGHTS, packed(json.dumps(_many(20_000)).encode(), b"\0" * 160_000)),
            fields(r=1, target_parameters=["a"] * 2000),
        ),
        "`target_parameters` has 2,000 entries for 20,000 modules",
    ),
    head(
        "many names beside many modules",
        both(
            content(WEIGHTS, packed(json.dumps(_many(5000)).encode(), b"\0" * 40_000)),
            fields(r=1, target_modules=[f"x{i:x}" for i in range(70_000)]),
        ),
        "another base model",
    ),
    head("metadata that is no object", header(lambda e: e | {"__metadata__": ["pt"]}), BROKEN),
    head("metadata of numbers", header(lambda e: e | {"__metadata__": {"format": 1}}), BROKEN),
    head("metadata of 9 MB", header(lambda e: e | {"__metadata__": {"format": "pt", "x": "x" * 9_000_000}}), None),
    head("dtype of integers", entry(QA, dtype="I32"), "has dtype I32, expected one of"),
    head("dtype of 8 bits", both(mapped(lambda value: value.to(torch.float8_e4m3fn))), "has dtype F8_E4M3"),
    head("dtype that is boolean", put(**{QA: torch.zeros(4, 32, dtype=torch.bool)}), "has dtype BOOL"),
    head("dtype that is unknown", entry(QA, dtype="F31"), BROKEN),
    head("dtype that is a list", entry(QA, dtype=["F32"]), BROKEN),
    head("dtype of half the size", entry(QA, dtype="F16"), BROKEN),
    head("no dtype", entry(QA, dtype=None), BROKEN),
    head("shape with a negative size", entry(QA, shape=[-4, -32]), BROKEN),
    head("shape of floats", entry(QA, shape=[4.0, 32.0]), BROKEN),
    head("shape of text", entry(QA, shape="4x32"), BROKEN),
    head("shape with true", entry(QA, shape=[True, 128]), BROKEN),
    head("shape beyond 64 bits", entry(QA, shape=[10**30]), BROKEN),
    head("shape whose product overflows", entry(QA, shape=[2**40, 2**40]), BROKEN),
    head("shape that lies", entry(QA, shape=[5, 32]), BROKEN),
    head("shape transposed", entry(QA, shape=[32, 4]), "q_proj make no update: the ranks differ, 32 rows"),
    head("shape of one dimension", entry(QA, shape=[128]), "expected a matrix"),
    head("shape of three", entry(QA, shape=[4, 32, 1]), "expected a matrix"),
    head("shape of nothing", put(**{QA: torch.zeros(4, 0)}), "expected a matrix"),
    *[
        head(f"shape of B: {tuple(shape)}", put(**{QB: torch.zeros(shape)}), "expected a matrix")
        for shape in ([128], [32, 4, 1], [0, 4])
    ],
    head("shape of nothing times 2^63", _nothing(0, 2**63), "q_proj make no update"),
    head("shape of nothing times 2^62 twice", _nothing(0, 2**62, 2**62), "q_proj make no update"),
    head("no shape", entry(QA, shape=None), BROKEN),
    head("offsets in reverse", entry(QA, data_offsets=[512, 0]), BROKEN),
    head("offsets that overlap", header(_overlapping), BROKEN),
    head("offsets beyond the file", entry(QA, data_offsets=[2**40, 2**40 + 512]), BROKEN),
    head("offsets below zero", entry(QA, data_offsets=[-512, 0]), BROKEN),
    head("one offset", entry(QA, data_offsets=[0]), BROKEN),
    head("offsets of text", entry(QA, data_offsets=["0", "512"]), BROKEN),
    head("no offsets", entry(QA, data_offsets=None), BROKEN),
    head("a property more", entry(QA, code="import os"), None),
    head("data cut short", changed(WEIGHTS, lambda data: data[:-1]), BROKEN),
    head("data too long", changed(WEIGHTS, lambda data: data + b"\0"), BROKEN),
    head("a hole of a terabyte", longer(WEIGHTS, 2**40), BROKEN),
    head("a hole of a terabyte that the header names", _terabyte, f"{BROKEN}|another base model"),
]


HEADERS += [
    Case(f"a size of {size} that the Hub states", HEADER, lambda directory: None, BROKEN, size=size)
    for size in (0, 100, 10**18 - 1, 2**64)
]


def value(name: str, change: Change, reason: str | None = None, **settings: Any) -> Case:
    return Case(name, VALUES, change, reason, **settings)


def extra(key: str, *shape: int) -> Change:
    return put(**{key: torch.zeros(shape)})


def _no_layer(directory: Path) -> None:
    shapes = {QA: (4, 32), QB: (32, 4)}
    values = {key.replace("model.layers.0.", ""): torch.zeros(shape) for key, shape in shapes.items()}
    save_file(values, directory / WEIGHTS)


def _wider_type(data: bytes) -> bytes:
    return data.replace(b'"F32","shape":[4,32]', b'"F64","shape":[4,16]')


def _other_type(data: bytes) -> bytes:
    return data.replace(b'"F32","shape":[4,32]', b'"F4","shape":[4,256]')


TENSORS = [
    value(
        "weights of the base",
        extra(PREFIX + EMBED, 96, 32),
        "embed_tokens.weight would overwrite",
    ),
    value("a layer of the base", extra(f"{PREFIX}{Q}.base_layer.weight", 32, 32), "would overwrite a weight"),
    value(
        "embeddings",
        extra(f"{PREFIX}model.embed_tokens.lora_embedding_A", 4, 96),
        "embed_tokens.*lora_B.* is missing",
    ),
    value("DoRA's magnitudes", extra(f"{PREFIX}{Q}.lora_magnitude_vector", 32), "DoRA|magnitude", either=True),
    value("a bias of B", extra(QB.replace("weight", "bias"), 32), "bias", either=True),
    value("a bias of the layer", extra(f"{PREFIX}{Q}.bias", 32), "bias", either=True),
    value("a module besides", extra(f"{PREFIX}lm_head.modules_to_save.weight", 96, 32), "trained besides"),
    value("the name of an adapter", renamed(QA, QA.replace("A.weight", "A.default.weight"))),
    value("a factor under two names", extra(QA.replace("A.weight", "A.default.weight"), 4, 32), "under two names"),
    value("a weight that no layer has", extra(f"{PREFIX}model.norm.weight", 32), "norm.weight: .* no layer of the"),
    value("no prefix", renamed(QA, QA.removeprefix(PREFIX)), "unexpected tensor model.layers.0"),
    value("no module", extra("base_model.model.lora_A.weight", 4, 32), "unexpected tensor"),
    value("a name of 200 kB", extra(f"{PREFIX}{'a.' * 10**5}lora_A.weight", 4, 32), "a name of 200,030 characters"),
    value(
        "a name with a line break", renamed(QA, QA.replace("layers", "lay\nrs\x1b")), r"lay\?rs\?.*is missing|missing"
    ),
    value("a name of another script", renamed(QA, QA.replace("layers", "l\u0430yers")), "missing"),
    value("a layer that is not there", renamed(QA, QA.replace("0", "7")), "missing"),
    value(
        "another model's layer",
        both(renamed(QA, QA.replace("0", "7")), renamed(QB, QB.replace("0", "7"))),
        "trained on another base model: 1 of its 4 modules",
    ),
    value(
        "a module of either layer",
        _no_layer,
        "self_attn.q_proj could be model.layers.0.self_attn.q_proj or model.layers.1",
    ),
    value("A is missing", tensors(lambda found: found.pop(QA)), "lora_A.weight is missing"),
    value("B is missing", tensors(lambda found: found.pop(QB)), "lora_B.weight is missing"),
    value("a module is missing", tensors(lambda found: (found.pop(QA), found.pop(QB))), None),
    value("ranks that differ", put(**{QA: torch.zeros(3, 32)}), "q_proj make no update: the ranks differ, 3 rows"),
    value("too wide", put(**{QA: torch.zeros(4, 33)}), "maps 33 features to 32, expected 32 to 32"),
    value("too high", put(**{QB: torch.zeros(33, 4)}), "maps 32 features to 33, expected 32 to 32"),
    *[
        value(f"{number} in A", filled(QA, number), f"q_proj holds the value {text}")
        for number, text in ((float("nan"), "nan"), (float("-inf"), "inf"), (-1e18, r"1e\+18"), (10_001, "10001"))
    ],
    value("a number in B that is none", filled(QB, float("nan")), "q_proj holds the value nan"),
    value("a number that halves lose", mapped(lambda v: v.half() * float("inf")), "holds the value (nan|inf)"),
    value("huge factors", mapped(lambda value: value * 300), "times as large as the weight"),
    value("all zeros", mapped(torch.zeros_like), None),
    value("denormal numbers", mapped(lambda value: value * 1e-40), None),
    value("float64", mapped(torch.Tensor.double), None),
    value("float16", mapped(torch.Tensor.half), None),
    value("bfloat16 beside float32", mapped(torch.Tensor.bfloat16, part="lora_A"), None),
]


def file(name: str, change: Change, reason: str | None = None, **settings: Any) -> Case:
    return Case(name, FILES, change, reason, **settings)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


PICKLE = pickle.dumps(_Bomb())


def _torch_file(directory: Path) -> None:
    torch.save({QA: torch.zeros(4, 32)}, directory / WEIGHTS)


FILE_CASES = [
    *[
        case
        for name, missing in ((CONFIG, "holds no adapter"), (WEIGHTS, "is missing: its training may"))
        for case in (
            file(f"no {name}", gone(name), missing),
            file(f"a directory as {name}", special(name, "directory"), f"{name} is not a regular file"),
            file(f"a pipe as {name}", special(name, "pipe"), f"{name} is not a regular file"),
            file(f"a socket as {name}", special(name, "socket"), f"{name} cannot be read"),
            file(f"/dev/zero as {name}", link(name, "/dev/zero"), f"{name} is not a regular file"),
            file(f"/dev/stdin as {name}", link(name, "/dev/stdin"), f"{name} (is|cannot)"),
            file(f"the kernel's log as {name}", link(name, "/proc/kmsg"), f"{name} (is empty|cannot be read)"),
            file(f"this process' memory as {name}", link(name, "/proc/self/mem"), f"{name} is empty"),
            file(f"a device's setting as {name}", link(name, "/sys/class/net/lo/speed"), f"{name} cannot be read"),
            file(f"a link to itself as {name}", link(name, name), f"{name} cannot be read"),
            file(f"a link to nothing as {name}", link(name, "../../absent"), f"{name} cannot be read"),
            file(f"a link beside as {name}", both(moved(name, "x"), link(name, "x")), None),
            file(f"a link with .. as {name}", both(moved(name, "b/x"), link(name, "b/../b/x")), None),
            file(
                f"a web page as {name}", content(name, "<!DOCTYPE html><html>"), "not strict JSON|is not safetensors"
            ),
            file(f"a pickle as {name}", content(name, PICKLE), f"not strict JSON|is not safetensors|{BROKEN}"),
            file(
                f"a pointer of git lfs as {name}", content(name, "version https://git-lfs.github.com/spec/v1\n"), "is"
            ),
        )
    ],
    file("a password file as configuration", link(CONFIG, "/etc/passwd"), "not strict JSON"),
    file("a huge hole as configuration", longer(CONFIG, 2**40), "larger than 1,048,576 bytes"),
    file("torch's zip as weights", _torch_file, "is not safetensors"),
    file("only pickled weights", both(gone(WEIGHTS), content("adapter_model.bin", PICKLE)), "never opened"),
    file("only pickled weights (.pt)", both(gone(WEIGHTS), content("adapter.pt", PICKLE)), "never opened"),
    file("pickled weights too", content("adapter_model.bin", PICKLE), None),
    file("training_args.bin", content("training_args.bin", PICKLE), None),
    file(
        "weights in parts",
        moved(WEIGHTS, "adapter_model-00001-of-00002.safetensors"),
        "its weights are split over several files",
    ),
    file("code", both(content("modeling.py", "import os; os.mkdir('executed')"), content("setup.py", "x")), None),
    file("a directory that holds itself", link("checkpoint-1", "."), None),
    file("a directory that holds all", link("up", "/"), None),
    file("other names of the file system", content("a\nb\x1b[31m|`", "x"), None),
    file("a model besides", content(MODEL_CONFIG, '{"model_type": "llama"}'), None),
]
CARD_CASES = [
    Case(name, CARDS, change)
    for name, change in {
        "a tag that is no boolean": content(CARD, "---\ndatasets: !!bool foo\n---\n"),
        "a tag of an empty number": content(CARD, "---\ndatasets: !!int ''\n---\n"),
        "a tag that is no time": content(CARD, "---\ndatasets: !!timestamp x\n---\n"),
        "a tag that calls": content(CARD, "---\ndatasets: !!python/object/apply:os.mkdir [executed]\n---\n"),
        "deep lists": content(CARD, f"---\ndatasets: {'[' * 100_000}\n---\n"),
        "many items": content(CARD, "---\ndatasets:\n" + "- 1\n" * 100_000 + "---\n"),
        "references": content(CARD, "---\na: &a [x]\nb: &b [*a , *a ]\ndatasets: [*b , *b ]\n---\n"),
        "a reference to itself": content(CARD, "---\ndatasets: &a [*a ]\n---\n"),
        "a number in base 60": content(CARD, f"---\ndatasets: 1{':00' * 80_000}\n---\n"),
        "no end": content(CARD, "---\n" + "a" * 2**19),
        "too long": content(CARD, "---\ndatasets: x\n---\n" + "a" * 2**21),
        "spaces": content(CARD, " \n" * 2**19),
        "no text": content(CARD, b"---\ndatasets: \xff\x00\n---\n"),
        "a pipe": special(CARD, "pipe"),
        "an endless device": link(CARD, "/dev/zero"),
    }.items()
]


def model(
    name: str, change: Change, reason: str | None = None, base: str = "model", later: Change | None = None
) -> Case:
    return Case(name, MODELS, change, reason, base, later=later)


def shard_of(name: object) -> Change:
    """Lets the index name another file for the head."""

    def change(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        index["weight_map"][HEAD] = name
        (directory / INDEX).write_text(json.dumps(index))

    return change


def shard(letters: str) -> str:
    return f"{INDEX} names the file {letters}.*expected a .*beside it"


def mapping(edit: Callable[[dict], Any]) -> Change:
    def change(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        edit(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return change


def _tensor_twice(directory: Path) -> None:
    save_file({HEAD: torch.zeros(96, 32), "more": torch.zeros(2)}, directory / "zz.safetensors")
    mapping(lambda names: names.update({"more": "zz.safetensors"}))(directory)


def _other_directory(directory: Path) -> None:
    (directory / "other").mkdir()
    os.rename(directory / SHARDS[3], directory / "other" / SHARDS[3])


def _head_besides(offset: float) -> Change:
    return tensors(lambda found: found.update({HEAD: found[EMBED] + offset}), MODEL)


MODEL_CASES = [
    model("another architecture", fields(MODEL_CONFIG, model_type="mistral"), "model_type is mistral, expected llama"),
    model("no architecture", without(MODEL_CONFIG, "model_type"), "model_type is None"),
    model("an architecture that is a list", fields(MODEL_CONFIG, model_type=["llama"]), "model_type is"),
    model("head tied", fields(MODEL_CONFIG, tie_word_embeddings=True), "its head is tied to its embeddings"),
    model("head tied by a number", fields(MODEL_CONFIG, tie_word_embeddings=0), "its head is"),
    model("head untied", fields(MODEL_CONFIG, tie_word_embeddings=False), "apart from its embeddings", "tied"),
    model(
        "code to run",
        both(
            fields(MODEL_CONFIG, auto_map={"AutoModelForCausalLM": "modeling.Model"}),
            content("modeling.py", "import os; os.mkdir('executed')"),
        ),
    ),
    model("a configuration that is a list", content(MODEL_CONFIG, "[]"), "config.json holds a JSON list"),
    model("an empty configuration", content(MODEL_CONFIG, ""), "config.json is empty"),
    model("a deep configuration", raw("x", "[" * 100_000, MODEL_CONFIG), "config.json is nested too deeply"),
    model("a long configuration", raw("x", f'"{"a" * 2**22}"', MODEL_CONFIG), "config.json is larger than 4,194,304"),
    model("a pipe as configuration", special(MODEL_CONFIG, "pipe"), "config.json is not a regular file"),
    model("index: a list", content(INDEX, "[]"), f"{INDEX} holds a JSON list"),
    model("index: no map", content(INDEX, "{}"), f"{INDEX} has no weight_map"),
    model("index: an empty map", fields(INDEX, weight_map={}), f"{INDEX} has no weight_map"),
    model("index: a map that is a list", fields(INDEX, weight_map=[SHARDS]), f"{INDEX} has no weight_map"),
    model("index: empty", content(INDEX, ""), f"{INDEX} is empty"),
    model("index: a pipe", special(INDEX, "pipe"), f"{INDEX} is not a regular file"),
    model("index: a key twice", raw("weight_map", '{}, "weight_map": {}', INDEX), f"{INDEX} .*twice"),
    model("index: deep", raw("weight_map", '{"a":' * 100_000, INDEX), f"{INDEX} is nested too deeply"),
    model("index: too many", raw("x", f"[{'[],' * 250_000}0]", INDEX), f"{INDEX} holds more than 250,000 values"),
    model("index: too long", longer(INDEX, 2**30), f"{INDEX} is larger than 20,000,000 bytes"),
    model(
        "index: other letters", changed(INDEX, lambda data: data.replace(b"total", b"t\xc3\xb6tal")), "is not ASCII"
    ),
    model("index: a link to nothing", link(INDEX, "absent"), "the file model.safetensors is missing"),
    model("index: sizes that lie", fields(INDEX, metadata={"total_size": 10**18})),
    model("shard: absent", shard_of("model-00009-of-00004.safetensors"), "00009.*, which .* names is missing"),
    model("shard: above", shard_of("../model-00001-of-00004.safetensors"), shard("../")),
    model("shard: absolute", shard_of("/etc/model.safetensors"), shard("/etc/")),
    model("shard: below", both(_other_directory, shard_of(f"other/{SHARDS[3]}")), shard("other/")),
    model("shard: of Windows", shard_of("..\\model.safetensors"), "which .* names is missing"),
    model("shard: a number", shard_of(1), shard("1")),
    model("shard: no safetensors", shard_of("pytorch_model.bin"), shard("pytorch_model.bin")),
    model("shard: with a null", shard_of("a\0.safetensors"), "which .* names is missing"),
    model("shard: half a letter", shard_of("\ud800.safetensors"), "which .* names is missing"),
    model("shard: a long name", shard_of("a" * 300 + ".safetensors"), "which .* names is missing"),
    model("shard: another one", shard_of(SHARDS[0]), f"says that {HEAD} is in {SHARDS[0]}, and it is not there"),
    model("shard: two exchanged", mapping(lambda names: names.update({EMBED: SHARDS[3]})), f"{EMBED} is in"),
    model("shard: a tensor twice", _tensor_twice, "and it is not there"),
    model("shard: all in one", mapping(lambda names: names.update(dict.fromkeys(names, SHARDS[0]))), "is not there"),
    model("shard: not all are named", mapping(lambda names: names.pop(EMBED))),
    model("shard: cut short", changed(SHARDS[1], lambda data: data[:-4]), f"{SHARDS[1]}: .*{BROKEN}"),
    model("shard: a pipe", special(SHARDS[1], "pipe"), f"{SHARDS[1]} is not a regular file"),
    model("shard: an endless device", link(SHARDS[1], "/dev/zero"), f"{SHARDS[1]} is not a regular file"),
    model("shard: a hole of a terabyte", longer(SHARDS[1], 2**40), BROKEN),
    model("shard: a pickle", content(SHARDS[1], PICKLE), SHARDS[1]),
    model("shard: a link beside", both(moved(SHARDS[1], "x"), link(SHARDS[1], "x"))),
    model(
        "only pickled weights", both(*map(gone, [*SHARDS, INDEX]), content("pytorch_model.bin", b"")), "never opened"
    ),
    model("pickled weights too", content("pytorch_model.bin", PICKLE)),
    model("no index", gone(INDEX), "the file model.safetensors is missing"),
    model("a tensor is missing", both(gone(INDEX), moved(SHARDS[0], MODEL)), "of the model is missing"),
    model("a tensor more", tensors(lambda found: found.update(more=torch.zeros(2)), MODEL), None, "tied"),
    model("another vocabulary", tensors(lambda f: f.update({EMBED: torch.zeros(9, 32)}), MODEL), "vocabulary", "tied"),
    model("another width", mapped(lambda v: v[..., :-1], MODEL), r"another architecture: .* has shape", "tied"),
    model("a number that is none", filled(EMBED, float("nan"), MODEL), f"{EMBED} holds values that are not", "tied"),
    model(
        "infinity", filled("model.norm.weight", float("inf"), MODEL), "norm.weight holds values that are not", "tied"
    ),
    model("integers", mapped(lambda v: v.to(torch.int8), MODEL), "dtype I8, expected one of", "tied"),
    model("float16", mapped(torch.Tensor.half, MODEL), None, "tied"),
    model("float64", mapped(torch.Tensor.double, MODEL), None, "tied"),
    model("a head that is the embeddings", _head_besides(0), None, "tied"),
    model("a head that is not the embeddings", _head_besides(1), f"{HEAD} and {EMBED} differ", "tied"),
    model("a head of nothing", tensors(lambda f: f.update({HEAD: torch.zeros(0)}), MODEL), "differ", "tied"),
]


def kind(base: str, name: str, change: Change, reason: str | None = None, **settings: Any) -> Case:
    """An adapter of another kind than LoRA of linear layers."""
    return Case(f"{base}: {name}", KINDS, change, reason, base, **settings)


def part(name: str, module: str = Q) -> str:
    return f"{PREFIX}{module}.{name}"


def drop(*names: str) -> Change:
    return tensors(lambda found: [found.pop(part(name)) for name in names])


def as_it_is(directory: Path) -> None:
    pass


def _row_of_zeros(directory: Path) -> None:
    """A row of which DoRA leaves nothing, and which it divides by its norm."""
    row = llama().model.layers[0].self_attn.q_proj.weight[0].detach()

    def edit(found: dict[str, torch.Tensor]) -> None:
        found[QA][:], found[QB][:] = 0.0, 0.0
        found[QA][0], found[QB][0, 0] = row, -0.5

    tensors(edit)(directory)


def _fewer_rows(directory: Path) -> None:
    """As AdaLoRA saves an adapter after it has cut the ranks from 5 to 2."""
    edits = {"lora_A": lambda v: v[:2], "lora_E": lambda v: v[:2], "lora_B": lambda v: v[:, :2]}
    for end, edit in edits.items():
        mapped(edit, part=end)(directory)
    names = [key.removeprefix(PREFIX) for key in load_file(directory / WEIGHTS) if key.endswith("lora_E")]
    fields(rank_pattern={name: [True] * 2 + [False] * 3 for name in names})(directory)


def _no_ranks(directory: Path) -> None:
    """As a zero of all ranks would be saved."""
    edits = {"lora_A": lambda v: v[:0], "lora_E": lambda v: v[:0], "lora_B": lambda v: v[:, :0]}
    for end, edit in edits.items():
        mapped(edit, part=end)(directory)


def _of_rank(rank: int) -> Change:
    """LoHa of a rank whose square is the rank of the update's factors."""

    def edit(found: dict[str, torch.Tensor]) -> None:
        for key, tensor in found.items():
            rows = key.endswith("a")
            found[key] = (
                torch.full((len(tensor), rank), 0.1) if rows else torch.full((rank, tensor.shape[1]), 1 / rank)
            )

    return both(tensors(edit), fields(r=rank))


def _magnitudes(directory: Path) -> None:
    """Those of DoRA for all modules."""
    Bs = {key: value for key, value in load_file(directory / WEIGHTS).items() if "lora_B" in key}
    put(**{key.replace("B.weight", "magnitude_vector"): torch.ones(len(value)) for key, value in Bs.items()})(
        directory
    )


def _hidden_copy(directory: Path) -> None:
    """Other embeddings, and the right ones under another name that is read after them."""
    extra_key = COPY.replace("base_layer.", "")
    tensors(lambda found: found.update({extra_key: found[COPY], COPY: torch.zeros(96, 32)}))(directory)


def moved_parts(old: str, new: str, keep: bool = False) -> Change:
    """Renames tensors of the experts, or adds zeros under the new name."""

    def edit(found: dict[str, torch.Tensor]) -> None:
        for key in [key for key in found if old in key]:
            value = torch.zeros_like(found[key]) if keep else found.pop(key)
            found[key.replace(old, new)] = value

    return tensors(edit)


def experts_apart(**layers: int) -> Change:
    """Adds factors of layers of one expert, of so many outputs, to an adapter of rank 4."""
    As = {part("lora_A.weight", f"{EXPERTS}.0.{name}"): torch.ones(4, 32) for name in layers}
    Bs = {part("lora_B.weight", f"{EXPERTS}.0.{name}"): torch.ones(rows, 4) for name, rows in layers.items()}
    return put(**As, **Bs)


QM = part("lora_magnitude_vector")
EMBEDDING, EXPERTS = "model.embed_tokens", "model.layers.0.mlp.experts"
COPY = f"{PREFIX}{EMBEDDING}.base_layer.weight"
KIND_CASES = [
    *[
        kind(base, "as it is", as_it_is)
        for base in ("dora", "adalora", "loha", "lokr", "embeddings", "experts", "whole")
    ],
    # DoRA: a magnitude for each output.
    kind("dora", "no magnitude", drop("lora_magnitude_vector"), "lora_magnitude_vector is missing"),
    kind("dora", "magnitudes of LoRA", fields(use_dora=False), "parts of DoRA, and `use_dora` is not set"),
    *[
        kind("dora", f"magnitude of shape {shape}", put(**{QM: torch.ones(shape)}), "has shape")
        for shape in ((), (1,), (32, 1), (0,))
    ],
    kind("dora", "a magnitude that is none", filled(QM, float("nan")), "the value nan"),
    kind("dora", "a huge magnitude", filled(QM, 1e18), r"the value 1e\+18"),
    kind("dora", "magnitudes of zero", mapped(torch.zeros_like, part="magnitude")),
    kind("dora", "magnitudes below zero", mapped(torch.neg, part="magnitude")),
    kind("dora", "a row divided by nothing", _row_of_zeros, "times as large as the weight"),
    kind("dora", "without a model", as_it_is, "there is no base model here to read", taker="nobody"),
    # AdaLoRA: a number for each rank.
    kind("adalora", "no numbers", drop("lora_E"), "lora_E is missing"),
    kind("adalora", "one number for all ranks", put(**{part("lora_E"): torch.ones(1, 1)}), "lora_E has shape"),
    kind("adalora", "one number for each input", put(**{part("lora_E"): torch.ones(1, 32)}), "lora_E has shape"),
    kind("adalora", "a factor that is a number", put(**{part("lora_A"): torch.ones(())}), "make no update"),
    kind("adalora", "a number that is none", filled(part("lora_E"), float("inf")), "holds the value inf"),
    kind("adalora", "no ranks at all", _no_ranks, "all its ranks are zero"),
    kind("adalora", "more ranks than it began with", fields(init_r=3), "has rank 5, but .* says 3"),
    kind("adalora", "fewer ranks than it began with", _fewer_rows),
    kind("adalora", "an absurd rank", fields(init_r=10**8), "`init_r` is 100000000"),
    kind("adalora", "with magnitudes", fields(use_dora=True), "`use_dora` is set to"),
    # LoHa and LoKr: products of updates.
    kind("loha", "a factor is missing", drop("hada_w2_b"), "hada_w2_b is missing"),
    kind("loha", "two are missing", drop("hada_w1_a", "hada_w2_b"), "hada_w1_a and hada_w2_b is missing"),
    kind("loha", "ranks that differ", put(**{part("hada_w1_b"): torch.zeros(3, 32)}), "the ranks differ"),
    kind("loha", "another rank", fields(r=7), "has rank 2, but .* says 7"),
    kind("loha", "products of two shapes", put(**{part("hada_w2_b"): torch.zeros(2, 31)}), "different shapes"),
    kind("loha", "a convolution", put(**{part("hada_t1"): torch.zeros(2, 2, 3, 3)}), "this is a convolution"),
    kind("loha", "factors of LoRA besides", put(**{QA: torch.zeros(4, 32)}), "unexpected tensor .*lora_A"),
    kind("loha", "a number that is none", filled(part("hada_w1_a"), float("nan")), "holds the value nan"),
    kind("loha", "huge products", mapped(lambda v: 0 * v + 9000.0), "times as large as the weight"),
    kind("loha", "a rank of a thousand", _of_rank(1024)),
    kind("loha", "an absurd rank", fields(r=10**8), "`r` is 100000000"),
    kind("loha", "an absurd alpha", fields(alpha=1e30), "`alpha` is 1e"),
    kind("lokr", "a factor twice", put(**{part("lokr_w1"): torch.zeros(4, 4)}), "parts of more than one update"),
    kind("lokr", "another size", put(**{part("lokr_w1_a"): torch.zeros(5, 1)}), "maps 32 features to 40, expected 32"),
    # Embeddings: the base model's weights are saved besides.
    kind("embeddings", "other embeddings", filled(COPY, 1.0), "embed_tokens.*would overwrite"),
    kind("embeddings", "embeddings that are none", filled(COPY, float("nan")), "embed_tokens.*would overwrite"),
    kind("embeddings", "embeddings in a row", put(**{COPY: torch.zeros(96 * 32)}), "embed_tokens.*would overwrite"),
    kind("embeddings", "embeddings under two names", _hidden_copy, "under two names"),
    kind("embeddings", "without a model", as_it_is, "no base model here to compare", taker="nobody"),
    kind("embeddings", "where all weights are trained", as_it_is, "embed_tokens, an embedding or", taker="model"),
    # Experts that are parts of one parameter, which are wrapped one around the other.
    kind("experts", "parameters that are none", fields(target_parameters=["mlp.experts.gate"]), "no weights of"),
    kind("experts", "one parameter for two", fields(target_parameters=["mlp.experts.down_proj"]), "no weights of"),
    kind("experts", "no parameters", fields(target_parameters=None), "has rank 16, but adapter_config.json says 4"),
    kind("experts", "another rank", fields(r=5, rank_pattern={"q_proj": 4}), "4 experts of rank 5, .* 16 ranks"),
    kind(
        "experts",
        "a factor is missing",
        tensors(lambda found: found.pop(f"{PREFIX}{EXPERTS}.lora_A.weight")),
        "lora_A.weight is missing",
    ),
    kind(
        "experts",
        "too wide",
        put(**{part("lora_A.weight", EXPERTS): torch.zeros(16, 17)}),
        "experts.down_proj.0 maps 17 features|experts.*maps 17 features",
    ),
    kind(
        "experts",
        "a number that is none",
        filled(part("lora_B.weight", EXPERTS), float("nan")),
        "experts.* holds the value nan",
    ),
    kind("experts", "wrapped twice", moved_parts("experts.base_layer", "experts.base_layer.base_layer"), "no weights"),
    kind(
        "experts",
        "factors under two names",
        moved_parts("layers.0.mlp.experts.base_layer", "layers.base_layer.0.mlp.experts", keep=True),
        "layers.base_layer.0.mlp.experts has rank 16",
    ),
    kind(
        "experts",
        "magnitudes",
        both(fields(use_dora=True), _magnitudes),
        "magnitudes of DoRA, expected none for experts",
    ),
    kind("experts", "without a model", as_it_is, "several experts at once, and there is", taker="nobody"),
    kind("experts", "where all weights are trained", as_it_is, "or experts in one parameter", taker="experts' model"),
    # Layers of single experts, as older models have them, for a model that has all experts in one parameter.
    *[
        kind("adapter", f"a single expert's {name}", experts_apart(**layers), reason, taker="experts")
        for name, layers, reason in (
            ("layer under two names", {"gate_proj": 16, "w1": 16}, "under two names"),
            ("halves of two shapes", {"gate_proj": 16, "up_proj": 17}, "projections of one expert have different"),
        )
    ],
    # A head that is trained whole besides the factors.
    kind("whole", "where it is not trained", as_it_is, "was trained besides the adapter", taker="adapter"),
    kind("whole", "no tensor of it", tensors(lambda found: found.pop(f"{PREFIX}{HEAD}")), "expected tensors of these"),
    kind("whole", "a cube", put(**{f"{PREFIX}{HEAD}": torch.zeros(2, 3, 4)}), "expected a matrix or a vector"),
    kind("whole", "no rows", put(**{f"{PREFIX}{HEAD}": torch.zeros(0, 32)}), "expected a matrix or a vector"),
    kind("whole", "names without end", fields(modules_to_save=["a"] * 200_000), "more than it needs"),
]


def race(name: str, later: Change, reason: str | None, base: str = "adapter") -> Case:
    return Case(name, RACES, lambda directory: None, reason, base, later=later)


USED = "changed while it was in use"
RACE_CASES = [
    race("weights are gone", gone(WEIGHTS), f"{WEIGHTS} cannot be read"),
    race("weights get shorter", changed(WEIGHTS, lambda data: data[:-4]), USED),
    race("weights get longer", changed(WEIGHTS, lambda data: data + b"0"), USED),
    race("weights get another number", filled(QA, 1.0), USED),
    race("weights turn into a pipe", special(WEIGHTS, "pipe"), f"{WEIGHTS} is not a regular file"),
    race("weights cannot be read", link(WEIGHTS, "/sys/class/net/lo/speed"), f"{WEIGHTS} cannot be read"),
    race(
        "another name, same size and time",
        kept_stamp(WEIGHTS, changed(WEIGHTS, lambda data: data.replace(b"q_proj", b"x_proj"))),
        f"{USED}: .*q_proj is gone",
    ),
    *[
        race(
            f"{name} of another shape, same size and time",
            kept_stamp(WEIGHTS, changed(WEIGHTS, lambda data, old=old, new=new: data.replace(old, new))),
            "the ranks differ",
        )
        for name, old, new in (("A", b"[4,32]", b"[32,4]"), ("B", b"[16,4]", b"[4,16]"))
    ],
    race(
        "a type that torch lacks, same size and time",
        kept_stamp(WEIGHTS, changed(WEIGHTS, _other_type)),
        "cannot be loaded",
    ),
    race(
        "a broken header, same size and time",
        kept_stamp(WEIGHTS, changed(WEIGHTS, lambda data: data.replace(b'"F32"', b'"F99"'))),
        "cannot be loaded",
    ),
    race(
        "half as many inputs of twice the size, same size and time",
        kept_stamp(WEIGHTS, changed(WEIGHTS, _wider_type)),
        f"{USED}: .* has another shape",
    ),
    race("the configuration changes", fields(lora_alpha=1e30), None),
    race("a shard is gone", gone(SHARDS[2]), f"{SHARDS[2]} cannot be read", "model"),
    race("a shard gets shorter", changed(SHARDS[2], lambda data: data[:-4]), USED, "model"),
    race("a shard turns into a pipe", special(SHARDS[2], "pipe"), "is not a regular file", "model"),
    race(
        "a shard with a broken header, same size and time",
        kept_stamp(SHARDS[2], changed(SHARDS[2], lambda data: data.replace(b'"F32"', b'"F99"'))),
        "cannot be read from",
        "model",
    ),
]
CASES = [
    *CONFIGS,
    *DOCUMENTS,
    *HEADERS,
    *TENSORS,
    *FILE_CASES,
    *CARD_CASES,
    *MODEL_CASES,
    *KIND_CASES,
    *RACE_CASES,
]
