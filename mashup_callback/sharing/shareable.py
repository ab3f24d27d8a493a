"""A mashup's report and files as others may see them: without a path of this machine."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..formats.adapter_config import CONFIG_NAME, MAX_CONFIG_BYTES
from ..formats.files import parse_object, read_limited
from ..report import REPORT_NAME, MashupReport
from .card import CARD_NAME, base_name, has_section, hub_name, mashup_card, with_section
from .recipe import MERGEKIT_NAME, mergekit_config


_ABSOLUTE = re.compile(r"(?<![\w./~\\])(?:file://)?(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\"`,;:()<>|]+){2,}[/\\]?")
_HOME = re.compile(r"[/\\](?:home|Users)[/\\][^/\\]+")
_NAME_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
_SETTINGS = (CONFIG_NAME, "config.json", "generation_config.json", "tokenizer_config.json")
_BINARY = (".safetensors", ".png")


def shareable(report: MashupReport) -> MashupReport:
    """Returns the report with a short name, such as `./adapter`, in place of every local path."""
    clean = _cleaner(report)
    values = _mapped(json.loads(report.to_json()), clean)
    for row, new, name in zip(report.candidates, values["candidates"], report.shared_names(), strict=True):
        new["name"] = f"./{name}" if row.is_local else name
    values["base_model"] = base_name(report)
    if values["config"].get("report_dir"):
        values["config"]["report_dir"] = os.path.basename(values["config"]["report_dir"])
    return MashupReport.from_json(json.dumps(values))


def shared_texts(folder: Path, base_model: str | None = None) -> dict[str, bytes]:
    """
    Returns the text files of a mashup's directory as they may be shared.

    Args:
        folder (`Path`):
            The directory.
        base_model (`str`, *optional*):
            Hub name of the base model; the model card is then written anew.
    """
    report = MashupReport.load(folder)
    if base_model is not None:
        report = replace(report, base_model=base_model, config={**report.config, "base_model": base_model})
    shared = shareable(report)
    settings = {name: _settings(folder / name) for name in _SETTINGS if (folder / name).is_file()}
    card = _card(folder, shared, settings.get(CONFIG_NAME, {}).get("task_type"), base_model)
    files = {REPORT_NAME: shared.to_json(), CARD_NAME: card}
    if (folder / MERGEKIT_NAME).is_file():
        recipe = None if report.is_full else mergekit_config(shared, shared=True)
        files[MERGEKIT_NAME] = recipe or _clean_yaml(folder / MERGEKIT_NAME, _cleaner(report))
    for name, values in settings.items():
        own = {"base_model_name_or_path": base_model or _card_base(card)} if name == CONFIG_NAME else {}
        files[name] = _without_paths(folder / name, values, own)
    return {name: text.encode() for name, text in files.items()}


def share(folder: Path) -> None:
    """Rewrites the text files of a mashup's directory, which is about to be uploaded, as they may be shared."""
    for name, content in shared_texts(folder).items():
        path = folder / name
        if not path.is_file() or path.read_bytes() == content:
            continue
        temporary = path.with_name(f".{name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(path)


def refuse_paths(files: Mapping[str, bytes | Path], folder: Path) -> None:
    """
    Refuses files that hold the home directory, a candidate's path or that of the mashup.

    Raises:
        ValueError: The file and what was found in it.
    """
    report = MashupReport.load(folder)
    paths = {os.path.expanduser("~"), str(folder.resolve()), report.base_model, report.config.get("report_dir")}
    paths |= {row.name for row in report.candidates if row.is_local}
    local = sorted(path for path in paths if path and os.path.isabs(path) and path != os.sep)
    # A short path such as /root may be a word of a vocabulary.
    needles = {path: path if path.count(os.sep) > 1 else f"{path}{os.sep}" for path in local}
    for name, content in files.items():
        text = _text(name, content)
        for path, needle in needles.items():
            if any(form.encode() in text for form in (needle, json.dumps(needle)[1:-1])):
                raise ValueError(
                    f"{name} holds the local path {path!r}, which others should not see, and nothing was pushed. "
                    "Remove it from the file and push again."
                )


def _cleaner(report: MashupReport) -> Callable[[str], str]:
    """Returns a function that puts short names in place of the local paths in a text."""
    pairs = zip(report.candidates, report.shared_names(), strict=True)
    known = {row.name: f"./{name}" for row, name in pairs if row.is_local}
    known = {path: name for path, name in known.items() if os.sep in path.removeprefix("./")}
    words = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    home = os.path.join(os.path.expanduser("~"), "")
    named = re.compile(rf"(?<![\w./])(?:{words})(?![\w-])") if known else None

    def clean(text: str) -> str:
        text = named.sub(lambda match: known[match[0]], text) if named else text
        return _ABSOLUTE.sub(_last_part, text.replace(home, "/home/user/") if len(home) > 2 else text)

    return clean


def _last_part(match: re.Match[str]) -> str:
    path = match[0].rstrip("/\\")
    return "~" if _HOME.fullmatch(path) else re.split(r"[/\\]", path)[-1]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _card(folder: Path, shared: MashupReport, task_type: str | None, base_model: str | None) -> str:
    path = folder / CARD_NAME
    if base_model is not None or not path.is_file():
        return mashup_card(shared, task_type)
    card = path.read_bytes().decode("utf-8")
    # The rest of the card is the user's.
    return with_section(card, shared) if has_section(card) else card


def _card_base(card: str) -> str | None:
    base = ModelCard(card).data.base_model
    return base if isinstance(base, str) else None


def _settings(path: Path) -> dict[str, Any]:
    return parse_object(read_limited(path, MAX_CONFIG_BYTES), path.name)


def _without_paths(path: Path, values: dict[str, Any], own: dict[str, Any]) -> str:
    """Returns a JSON file with the Hub name of a model, or none, in place of a path; as it is if there is no path."""
    names = {key: hub_name(values[key]) for key in _NAME_KEYS if isinstance(values.get(key), str)} | own
    if all(values.get(key) == name for key, name in names.items()):
        return path.read_text(encoding="utf-8")
    return json.dumps(values | names, indent=2, sort_keys=True) + "\n"


def _clean_yaml(path: Path, clean: Callable[[str], str]) -> str:
    try:
        return yaml.safe_dump(_mapped(yaml.safe_load(path.read_text(encoding="utf-8")), clean), sort_keys=False)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from error


def _text(name: str, content: bytes | Path) -> bytes:
    if isinstance(content, bytes):
        return content
    if content.suffix not in _BINARY:
        return content.read_bytes()
    with content.open("rb") as file:
        # The header of safetensors, whose metadata is text.
        return file.read(8 + int.from_bytes(file.read(8), "little")) if content.suffix == _BINARY[0] else b""
