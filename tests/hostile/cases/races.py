"""Files that change between the time they are looked at and the time they are used."""

import os
from pathlib import Path

from tests.hostile.cases.case import QA, SHARDS, Case
from tests.hostile.damage import WEIGHTS, Change, changed, fields, filled, gone, link, special


def race(name: str, later: Change, reason: str | None, base: str = "adapter") -> Case:
    return Case("files that change while in use", name, lambda directory: None, reason, base, later=later)


def quiet(old: bytes, new: bytes, name: str = WEIGHTS) -> Change:
    """Replaces text in a file, and leaves its size and time as they were."""

    def change(directory: Path) -> None:
        before = os.stat(directory / name)
        changed(name, lambda data: data.replace(old, new))(directory)
        assert os.stat(directory / name).st_size == before.st_size
        os.utime(directory / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    return change


A = b'"F32","shape":[4,32]'
USED = "changed while it was in use"
CASES = [
    race("weights are gone", gone(WEIGHTS), f"{WEIGHTS} cannot be read"),
    race("weights get shorter", changed(WEIGHTS, lambda data: data[:-4]), USED),
    race("weights get longer", changed(WEIGHTS, lambda data: data + b"0"), USED),
    race("weights get another number", filled(QA, 1.0), USED),
    race("weights turn into a pipe", special(WEIGHTS, "pipe"), f"{WEIGHTS} is not a regular file"),
    race("weights cannot be read", link(WEIGHTS, "/sys/class/net/lo/speed"), f"{WEIGHTS} cannot be read"),
    race("another name, same size and time", quiet(b"q_proj", b"x_proj"), f"{USED}: .*q_proj is gone"),
    race("A of another shape, same size and time", quiet(b"[4,32]", b"[32,4]"), "the ranks differ"),
    race("B of another shape, same size and time", quiet(b"[16,4]", b"[4,16]"), "the ranks differ"),
    race("a type that torch lacks, same size and time", quiet(A, b'"F4","shape":[4,256]'), "cannot be loaded"),
    race("a broken header, same size and time", quiet(b'"F32"', b'"F99"'), "cannot be loaded"),
    race(
        "half as many inputs of twice the size, same size and time",
        quiet(A, b'"F64","shape":[4,16]'),
        f"{USED}: .* has another shape",
    ),
    race("the configuration changes", fields(lora_alpha=1e30), None),
    race("a shard is gone", gone(SHARDS[2]), f"{SHARDS[2]} cannot be read", "model"),
    race("a shard gets shorter", changed(SHARDS[2], lambda data: data[:-4]), USED, "model"),
    race("a shard turns into a pipe", special(SHARDS[2], "pipe"), "is not a regular file", "model"),
    race(
        "a shard with a broken header, same size and time",
        quiet(b'"F32"', b'"F99"', SHARDS[2]),
        "cannot be read from",
        "model",
    ),
]
