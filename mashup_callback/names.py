"""Short names of candidates that can be told apart."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any


# A name up to this length stays as it is in tables.
_SHORT = 24


def short_names(rows: Sequence[Any]) -> list[str]:
    """Returns the candidates' names, those that are local paths cut to the last directories that tell them apart."""
    short = _shortest(rows)
    seen: Counter[str] = Counter()
    for index, name in enumerate(short):
        seen[name] += 1
        short[index] = f"{name} ({seen[name]})" if seen[name] > 1 else name
    return short


def labels(rows: Sequence[Any]) -> list[str]:
    """Returns names for people on this machine: a path that was cut starts with an ellipsis, and shows its end."""
    hub, found = Counter(row.name for row in rows if not row.is_local), []
    for row, short in zip(rows, _shortest(rows), strict=True):
        name = row.name
        if row.is_local and len(name) > max(_SHORT, len(short) + 2):
            name = f"…/{short}"
        elif row.revision and hub[name] > 1:
            name = f"{name}@{row.revision[:7]}"
        found.append(name)
    return found


def _shortest(rows: Sequence[Any]) -> list[str]:
    tails = [_tails(row.name) if row.is_local else [row.name] for row in rows]
    counts = Counter(tail for own in tails for tail in own)
    return [next((tail for tail in own if counts[tail] == 1), own[-1]) for own in tails]


def _tails(path: str) -> list[str]:
    """Returns the ends of a path below the user's home, the shortest first, in printable characters."""
    home = os.path.join(os.path.expanduser("~"), "")
    path = path.removeprefix(home) if path.startswith(home) else re.sub(r"^/(home|Users)/[^/]+/", "", path)
    parts = [part for part in re.split(r"[/\\]+", printable(path)) if part not in ("", ".", "..", "~")] or ["adapter"]
    first = 2 if parts[-1].startswith("checkpoint-") and len(parts) > 1 else 1
    return ["/".join(parts[-length:]) for length in range(first, len(parts) + 1)]


def printable(text: str) -> str:
    """Returns a text with a question mark for every character that does not print."""
    return "".join(character if character.isprintable() else "?" for character in text)
