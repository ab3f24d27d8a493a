"""Full checkpoints: their configuration, the index of their shards, and the shards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.hostile.cases.case import BROKEN, CODE, EMBED, HEAD, PICKLE, SHARDS, Case
from tests.hostile.damage import (
    INDEX,
    MODEL,
    MODEL_CONFIG,
    Change,
    both,
    changed,
    content,
    edited,
    fields,
    filled,
    gone,
    link,
    longer,
    mapped,
    moved,
    raw,
    special,
    tensors,
)


def model(name: str, change: Change, reason: str | None = None, base: str = "model") -> Case:
    return Case("full checkpoints", name, change, reason, base)


def mapping(edit: Callable[[dict], Any]) -> Change:
    """Edits the files that the index names."""
    return edited(INDEX, lambda index: edit(index["weight_map"]))


def shard_of(name: object) -> Change:
    """Lets the index name another file for the head."""
    return mapping(lambda names: names.update({HEAD: name}))


def shard(letters: str) -> str:
    return f"{INDEX} names the file {letters}.*expected a .*beside it"


def _tensor_twice(directory: Path) -> None:
    save_file({HEAD: torch.zeros(96, 32), "more": torch.zeros(2)}, directory / "zz.safetensors")
    mapping(lambda names: names.update({"more": "zz.safetensors"}))(directory)


def _head_besides(offset: float) -> Change:
    return tensors(lambda found: found.update({HEAD: found[EMBED] + offset}), MODEL)


BELOW = f"other/{SHARDS[3]}"
CASES = [
    model("another architecture", fields(MODEL_CONFIG, model_type="mistral"), "model_type is mistral, expected llama"),
    model("no architecture", edited(MODEL_CONFIG, lambda found: found.pop("model_type")), "model_type is None"),
    model("an architecture that is a list", fields(MODEL_CONFIG, model_type=["llama"]), "model_type is"),
    model("head tied", fields(MODEL_CONFIG, tie_word_embeddings=True), "its head is tied to its embeddings"),
    model("head tied by a number", fields(MODEL_CONFIG, tie_word_embeddings=0), "its head is"),
    model("head untied", fields(MODEL_CONFIG, tie_word_embeddings=False), "apart from its embeddings", "tied"),
    model("code to run", both(fields(MODEL_CONFIG, auto_map={"AutoModelForCausalLM": "modeling.Model"}), CODE)),
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
    model("index: other letters", changed(INDEX, lambda d: d.replace(b"total", b"t\xc3\xb6tal")), "is not ASCII"),
    model("index: a link to nothing", link(INDEX, "absent"), "the file model.safetensors is missing"),
    model("index: sizes that lie", fields(INDEX, metadata={"total_size": 10**18})),
    model("shard: absent", shard_of("model-00009-of-00004.safetensors"), "00009.*, which .* names is missing"),
    model("shard: above", shard_of("../model-00001-of-00004.safetensors"), shard("../")),
    model("shard: absolute", shard_of("/etc/model.safetensors"), shard("/etc/")),
    model("shard: below", both(moved(SHARDS[3], BELOW), shard_of(BELOW)), shard("other/")),
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
