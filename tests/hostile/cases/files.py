"""Files that are no files, or not the ones expected, and model cards."""

from functools import partial
from pathlib import Path

import torch

from tests.hostile.cases.case import BROKEN, CODE, PICKLE, QA, Case
from tests.hostile.damage import CARD, CONFIG, MODEL_CONFIG, WEIGHTS, both, content, gone, link, longer, moved, special


file = partial(Case, "kinds of files")


def _torch_file(directory: Path) -> None:
    torch.save({QA: torch.zeros(4, 32)}, directory / WEIGHTS)


CASES = [
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
            file(f"a web page as {name}", content(name, "<!DOCTYPE html><html>"), "not strict JSON|not safetensors"),
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
    file("code", both(CODE, content("setup.py", "x")), None),
    file("a directory that holds itself", link("checkpoint-1", "."), None),
    file("a directory that holds all", link("up", "/"), None),
    file("other names of the file system", content("a\nb\x1b[31m|`", "x"), None),
    file("a model besides", content(MODEL_CONFIG, '{"model_type": "llama"}'), None),
]
CASES += [
    Case("model cards", name, change)
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
