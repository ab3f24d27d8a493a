"""Short names for local paths: the last directories, as many as tell them apart."""

import os
import re
from collections import Counter
from collections.abc import Sequence


def told_apart(names: Sequence[str], local: Sequence[bool]) -> list[str]:
    """Returns the names, those that are local paths cut to the last directories that tell them from the others."""
    parts = [_parts(name) if is_local else [name] for name, is_local in zip(names, local, strict=True)]
    lengths = [1 + own[-1].startswith("checkpoint-") for own in parts]
    while True:
        short = ["/".join(own[-length:]) for own, length in zip(parts, lengths, strict=True)]
        counts = Counter(short)
        longer = [i for i, name in enumerate(short) if counts[name] > 1 and lengths[i] < len(parts[i])]
        if not longer:
            return _numbered(short)
        for index in longer:
            lengths[index] += 1


def _parts(path: str) -> list[str]:
    """Returns the directories of a path below the user's home, in printable characters."""
    home = os.path.join(os.path.expanduser("~"), "")
    if path.startswith(home):
        path = path.removeprefix(home)
    elif os.path.isabs(path):
        path = re.sub(r"^/(home|Users)/[^/]+/", "", path)
    text = "".join(character if character.isprintable() else "?" for character in path)
    return [part for part in re.split(r"[/\\]+", text) if part not in ("", ".", "..", "~")] or ["adapter"]


def _numbered(names: list[str]) -> list[str]:
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        names[index] = f"{name} ({seen[name]})" if seen[name] > 1 else name
    return names
