"""Tensors that do not belong there, are missing, or hold what no training leaves."""

from functools import partial
from math import inf, nan
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hostile.cases.case import EMBED, PREFIX, QA, QB, Case, Q
from tests.hostile.damage import WEIGHTS, both, filled, mapped, renamed, tensors, zeros


value = partial(Case, "names and values of tensors")


def _no_layer(directory: Path) -> None:
    shapes = {QA: (4, 32), QB: (32, 4)}
    values = {key.replace("model.layers.0.", ""): torch.zeros(shape) for key, shape in shapes.items()}
    save_file(values, directory / WEIGHTS)


CASES = [
    value("weights of the base", zeros(PREFIX + EMBED, 96, 32), "embed_tokens.weight would overwrite"),
    value("a layer of the base", zeros(f"{PREFIX}{Q}.base_layer.weight", 32, 32), "would overwrite a weight"),
    value(
        "embeddings", zeros(f"{PREFIX}model.embed_tokens.lora_embedding_A", 4, 96), "embed_tokens.*lora_B.* is missing"
    ),
    value("DoRA's magnitudes", zeros(f"{PREFIX}{Q}.lora_magnitude_vector", 32), "DoRA|magnitude", either=True),
    value("a bias of B", zeros(QB.replace("weight", "bias"), 32), "bias", either=True),
    value("a bias of the layer", zeros(f"{PREFIX}{Q}.bias", 32), "bias", either=True),
    value("a module besides", zeros(f"{PREFIX}lm_head.modules_to_save.weight", 96, 32), "trained besides"),
    value("the name of an adapter", renamed(QA, QA.replace("A.weight", "A.default.weight"))),
    value("a factor under two names", zeros(QA.replace("A.weight", "A.default.weight"), 4, 32), "under two names"),
    value("a weight that no layer has", zeros(f"{PREFIX}model.norm.weight", 32), "norm.weight: .* no layer of the"),
    value("no prefix", renamed(QA, QA.removeprefix(PREFIX)), "unexpected tensor model.layers.0"),
    value("no module", zeros("base_model.model.lora_A.weight", 4, 32), "unexpected tensor"),
    value("a name of 200 kB", zeros(f"{PREFIX}{'a.' * 10**5}lora_A.weight", 4, 32), "a name of 200,030 characters"),
    value("a name with a line break", renamed(QA, QA.replace("layers", "lay\nrs\x1b")), r"lay\?rs\?"),
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
    value("ranks that differ", zeros(QA, 3, 32), "q_proj make no update: the ranks differ, 3 rows .* 4 columns"),
    value("too wide", zeros(QA, 4, 33), "maps 33 features to 32, expected 32 to 32"),
    value("too high", zeros(QB, 33, 4), "maps 32 features to 33, expected 32 to 32"),
    *[
        value(f"{n} in A", filled(QA, n), f"q_proj holds the value {text}")
        for n, text in ((nan, "nan"), (-inf, "inf"), (-1e18, r"1e\+18, expected at most 10000"), (10_001, "10001"))
    ],
    value("a number in B that is none", filled(QB, nan), "q_proj holds the value nan"),
    value("a number that halves lose", mapped(lambda v: v.half() * inf), "holds the value (nan|inf)"),
    value("huge factors", mapped(lambda value: value * 300), "times as large as the weight"),
    value("all zeros", mapped(torch.zeros_like), None),
    value("denormal numbers", mapped(lambda value: value * 1e-40), None),
    value("float64", mapped(torch.Tensor.double), None),
    value("float16", mapped(torch.Tensor.half), None),
    value("bfloat16 beside float32", mapped(torch.Tensor.bfloat16, part="lora_A"), None),
]
