"""Weights of which the header, or its length, is not what safetensors writes."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.hostile.cases.case import BROKEN, PREFIX, QA, QB, Case
from tests.hostile.damage import (
    WEIGHTS,
    Change,
    both,
    changed,
    content,
    entry,
    fields,
    header,
    header_text,
    longer,
    mapped,
    zeros,
)
from tests.hub.faults import safetensors_file as packed


head = partial(Case, "safetensors header")


def _overlapping(entries: dict) -> None:
    entries[QA]["data_offsets"] = [offset - 4 for offset in entries[QA]["data_offsets"]]


def _nothing(*shape: int) -> Change:
    """Tensors of no bytes with a shape that torch does not take."""
    own = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    return content(WEIGHTS, packed({QA: own, QB: own}))


def _terabyte(directory: Path) -> None:
    own = {"dtype": "F32", "shape": [4, 2**35]}
    entries = {QA: {**own, "data_offsets": [0, 2**39]}, QB: {**own, "data_offsets": [2**39, 2**40]}}
    text = packed(entries)
    content(WEIGHTS, text)(directory)
    longer(WEIGHTS, len(text) + 2**40)(directory)


def _many(modules: int, **config: Any) -> Change:
    """Modules of rank 1 with one input and one output."""
    names = [f"{PREFIX}{i:x}.lora_{letter}.weight" for i in range(modules) for letter in "AB"]
    own = {name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    return both(content(WEIGHTS, packed(own, b"\0" * 8 * modules)), fields(**config))


CASES = [
    head("empty file", content(WEIGHTS, ""), "adapter_model.safetensors is empty"),
    head("no header", content(WEIGHTS, b"\0" * 7), "truncated: 7 bytes"),
    head("a length of zero", header_text(bytes, 0), BROKEN),
    head("a length that is too short", header_text(bytes, 20), BROKEN),
    head("a length beyond the file", header_text(bytes, 9_000_000), f"{BROKEN}.*header length"),
    head("a length of 2^63", header_text(bytes, 2**63), "header of 9,223,372,036,854,775,808 bytes"),
    head("a length just beyond", header_text(bytes, 10_000_001), "header of 10,000,001 bytes"),
    head("spaces behind it", header_text(lambda text: text + b" " * 999), None),
    head("a space before it", header_text(lambda text: b" " + text), None),
    head("a byte order mark", header_text(lambda text: b"\xef\xbb\xbf" + text), BROKEN),
    head("UTF-16", header_text(lambda text: text.decode().encode("utf-16")), BROKEN),
    head("no text", header_text(lambda text: text.replace(b"q_proj", b"q_\xff\xff\xff\xff")), BROKEN),
    head("a list", content(WEIGHTS, packed(b"[]")), f"{BROKEN}.*sequence"),
    head("no tensors", content(WEIGHTS, packed(b"{}")), "holds no tensors"),
    head("lists in lists", content(WEIGHTS, packed(b"[" * 100_000)), BROKEN),
    head("objects in objects", content(WEIGHTS, packed(b'{"a":' * 100_000)), BROKEN),
    head("a tensor twice", header_text(lambda text: text.rstrip()[:-1] + b"," + text[1:]), BROKEN),
    head("ten thousand tensors", _many(10_000), "rank 1"),
    head(
        "as many keys as modules",
        _many(1001, r=1, alpha_pattern={f"x{i:x}": 4 for i in range(1001)}),
        "`alpha_pattern` has 1,001 entries for 1,001 modules",
    ),
    head(
        "many parameters beside many modules",
        _many(20_000, r=1, target_parameters=["a"] * 2000),
        "`target_parameters` has 2,000 entries for 20,000 modules",
    ),
    head(
        "many names beside many modules",
        _many(5000, r=1, target_modules=[f"x{i:x}" for i in range(70_000)]),
        "another base model",
    ),
    head("metadata that is no object", header(lambda e: e | {"__metadata__": ["pt"]}), BROKEN),
    head("metadata of numbers", header(lambda e: e | {"__metadata__": {"format": 1}}), BROKEN),
    head("metadata of 9 MB", header(lambda e: e | {"__metadata__": {"format": "pt", "x": "x" * 9_000_000}}), None),
    head("dtype of integers", entry(QA, dtype="I32"), "has dtype I32, expected one of"),
    head("dtype of 8 bits", mapped(lambda value: value.to(torch.float8_e4m3fn)), "has dtype F8_E4M3"),
    head("dtype that is boolean", zeros(QA, 4, 32, dtype=torch.bool), "has dtype BOOL"),
    head("dtype that is unknown", entry(QA, dtype="F31"), BROKEN),
    head("dtype that is a list", entry(QA, dtype=["F32"]), BROKEN),
    head("dtype of half the size", entry(QA, dtype="F16"), BROKEN),
    head("no dtype", entry(QA, dtype=None), BROKEN),
    head("shape with a negative size", entry(QA, shape=[-4, -32]), BROKEN),
    head("shape of floats", entry(QA, shape=[4.0, 32.0]), BROKEN),
    head("shape of text", entry(QA, shape="4x32"), BROKEN),
    head("shape with true", entry(QA, shape=[True, 128]), f"{BROKEN}.*boolean"),
    head("shape beyond 64 bits", entry(QA, shape=[10**30]), BROKEN),
    head("shape whose product overflows", entry(QA, shape=[2**40, 2**40]), BROKEN),
    head("shape that lies", entry(QA, shape=[5, 32]), f"{BROKEN}.*shape"),
    head("shape transposed", entry(QA, shape=[32, 4]), "q_proj make no update: the ranks differ, 32 rows"),
    head("shape of one dimension", entry(QA, shape=[128]), "expected a matrix"),
    head("shape of three", entry(QA, shape=[4, 32, 1]), "expected a matrix"),
    head("shape of nothing", zeros(QA, 4, 0), "expected a matrix"),
    *[
        head(f"shape of B: {tuple(shape)}", zeros(QB, *shape), "expected a matrix")
        for shape in ([128], [32, 4, 1], [0, 4])
    ],
    head("shape of nothing times 2^63", _nothing(0, 2**63), "q_proj make no update"),
    head("shape of nothing times 2^62 twice", _nothing(0, 2**62, 2**62), "q_proj make no update"),
    head("no shape", entry(QA, shape=None), BROKEN),
    head("offsets in reverse", entry(QA, data_offsets=[512, 0]), f"{BROKEN}.*offset"),
    head("offsets that overlap", header(_overlapping), BROKEN),
    head("offsets beyond the file", entry(QA, data_offsets=[2**40, 2**40 + 512]), BROKEN),
    head("offsets below zero", entry(QA, data_offsets=[-512, 0]), BROKEN),
    head("one offset", entry(QA, data_offsets=[0]), BROKEN),
    head("offsets of text", entry(QA, data_offsets=["0", "512"]), BROKEN),
    head("no offsets", entry(QA, data_offsets=None), BROKEN),
    head("a property more", entry(QA, code="import os"), None),
    head("data cut short", changed(WEIGHTS, lambda data: data[:-1]), f"{BROKEN}.*not fully covered"),
    head("data too long", changed(WEIGHTS, lambda data: data + b"\0"), f"{BROKEN}.*not fully covered"),
    head("a hole of a terabyte", longer(WEIGHTS, 2**40), BROKEN),
    head("a hole of a terabyte that the header names", _terabyte, f"{BROKEN}|another base model"),
    *[
        head(f"a size of {size} that the Hub states", lambda directory: None, BROKEN, size=size)
        for size in (0, 100, 10**18 - 1, 2**64)
    ],
]
