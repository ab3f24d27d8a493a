"""A report and texts as others may see them: without a path of this machine."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..report import MashupReport
from .card import base_name


_ABSOLUTE = re.compile(r"(?<![\w./~\\])(?:file://)?(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\"`,;:()<>|]+){2,}[/\\]?")
_HOME = re.compile(r"[/\\](?:home|Users)[/\\][^/\\]+")


def shareable(report: MashupReport) -> MashupReport:
    """Returns the report with a short name, such as `./adapter`, in place of every local path."""
    values = without_paths(json.loads(report.to_json()), report)
    for row, new, name in zip(report.candidates, values["candidates"], report.short_names(), strict=True):
        new["name"] = f"./{name}" if row.is_local else name
    values["base_model"] = base_name(report)
    if values["config"].get("report_dir"):
        values["config"]["report_dir"] = os.path.basename(values["config"]["report_dir"])
    return MashupReport.from_json(json.dumps(values))


def without_paths(value: Any, report: MashupReport) -> Any:
    """Returns a text, or what JSON holds, with short names in place of the local paths in its texts."""
    pairs = zip(report.candidates, report.short_names(), strict=True)
    known = {row.name: f"./{name}" for row, name in pairs if row.is_local}
    known = {path: name for path, name in known.items() if os.sep in path.removeprefix("./")}
    words = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    home = os.path.join(os.path.expanduser("~"), "")
    named = re.compile(rf"(?<![\w./])(?:{words})(?![\w-])") if known else None

    def clean(text: str) -> str:
        text = named.sub(lambda match: known[match[0]], text) if named else text
        return _ABSOLUTE.sub(_last_part, text.replace(home, "/home/user/") if len(home) > 2 else text)

    return _mapped(value, clean)


def refuse_paths(files: Mapping[str, bytes | Path], report: MashupReport, folder: Path) -> None:
    """Raises `ValueError` where a file holds the home directory, a candidate's path or that of the mashup."""
    paths = {os.path.expanduser("~"), str(folder.resolve()), report.base_model, report.config.get("report_dir")}
    paths |= {row.name for row in report.candidates if row.is_local}
    local = sorted(path for path in paths if path and os.path.isabs(path) and path != os.sep)
    for name, content in files.items():
        text = _text(content)
        for path in local:
            # A short path such as /root may be a word of a vocabulary.
            needle = path if path.count(os.sep) > 1 else f"{path}{os.sep}"
            if any(form.encode() in text for form in (needle, json.dumps(needle)[1:-1])):
                raise ValueError(
                    f"{name} holds the local path {path!r}, which others should not see, and nothing was pushed. "
                    "Remove it from the file and push again."
                )


def _text(content: bytes | Path) -> bytes:
    if isinstance(content, bytes):
        return content
    with content.open("rb") as file:
        # Of weights the header, whose metadata is text.
        return file.read(int.from_bytes(file.read(8), "little") if content.suffix == ".safetensors" else -1)


def _last_part(match: re.Match[str]) -> str:
    path = match[0].rstrip("/\\")
    return "~" if _HOME.fullmatch(path) else re.split(r"[/\\]", path)[-1]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
