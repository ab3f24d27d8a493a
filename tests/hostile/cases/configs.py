"""Configurations of adapters: their fields, and the file itself."""

import re
from functools import partial
from typing import Any

from tests.hostile.cases.case import REGEX, Case, Q
from tests.hostile.damage import CONFIG, changed, content, fields, raw


FIELDS = "fields of adapter_config.json"
text = partial(Case, "adapter_config.json as a file")


def config(name: str, value: Any, reason: str | None = None, *, either: bool = False, **own: Any) -> Case:
    """A value for one field of `adapter_config.json`."""
    change = fields(**{name: value})
    return Case(FIELDS, f"{name}={str(value)[:40]}", change, reason, either=either, own=own, field=name)


CASES = [
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
        FIELDS,
        "a head that a task trains",
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
    text("a list", content(CONFIG, "[]"), "holds a JSON list"),
    text("a number", content(CONFIG, "1"), "holds a JSON int"),
    text("an empty object", content(CONFIG, "{}"), "`peft_type` is None"),
    text("empty", content(CONFIG, ""), "adapter_config.json is empty"),
    text("spaces", content(CONFIG, " " * 1000), "not strict JSON"),
    text("cut short", changed(CONFIG, lambda data: data[:-3]), "not strict JSON"),
    text("text after the end", changed(CONFIG, lambda data: data + b"{}"), "not strict JSON"),
    text("comments", changed(CONFIG, lambda data: b"// LoRA\n" + data), "not strict JSON"),
    text("a byte order mark", changed(CONFIG, lambda data: b"\xef\xbb\xbf" + data), "not strict JSON"),
    text("UTF-16", changed(CONFIG, lambda data: data.decode().encode("utf-16")), "not strict JSON"),
    text("no UTF-8", raw("revision", '"\\u00ff"'), None),
    text("bytes that are no text", changed(CONFIG, lambda data: data.replace(b"0.21", b"\xff")), "not strict JSON"),
    text("NaN", raw("lora_alpha", "NaN"), "NaN"),
    text("Infinity", raw("lora_dropout", "-Infinity"), "Infinity"),
    text("a number beyond floats", raw("lora_alpha", "1e999"), "`lora_alpha` is inf"),
    text("a number of 10,000 digits", raw("r", "9" * 10_000), "not strict JSON"),
    text("a key twice", raw("x", '0, "r": 4'), "a key appears twice"),
    text("lists in lists", raw("loftq_config", "[" * 100_000), "nested too deeply"),
    text("objects in objects", content(CONFIG, '{"peft_type":' * 50_000), "nested too deeply"),
    text("as deep as goes", raw("loftq_config", "[" * 400 + "]" * 400), None, own={"loftq_config": {}}),
    text("too long", raw("loftq_config", f'"{"a" * 2**20}"'), "larger than 1,048,576 bytes"),
    text("too many values", raw("loftq_config", f"[{'0,' * 250_000}0]"), "more than 250,000 values"),
]
