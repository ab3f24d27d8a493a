"""A mashup to the Hub, as a repository of its own."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from ..candidates import describe, hub_name, is_transient, retry_after
from ..distributed import is_main_process
from ..errors import AdapterError
from ..formats import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    MODEL_CONFIG_NAME,
    WEIGHTS_NAME,
    parse_object,
    read_adapter,
    read_checkpoint,
    read_limited,
)
from ..report import FAILED_NAME, REPORT_NAME, MashupReport
from .card import ADAPTER_PLACEHOLDER, CARD_NAME, PICTURE_NAME, TITLE, is_license, mashup_card
from .save import MERGEKIT_NAME, mergekit_recipe
from .shareable import refuse_paths, shareable, without_paths


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
_NAME_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
_SETTINGS = (CONFIG_NAME, MODEL_CONFIG_NAME, "generation_config.json", "tokenizer_config.json")
_LONGEST_WAIT = 60.0


def push_mashup(
    directory: str | Path,
    repo_id: str,
    private: bool | None = None,
    create_pr: bool = False,
    *,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """
    Pushes a mashup to the Hub: its adapter as a plain PEFT repository, with the model card, the report and mergekit's
    configuration.

    The repository is created where it is missing. Texts are rewritten: a local path would mean nothing to others and
    tell them about this machine, so candidates have short names and the base model its Hub name or none. What goes
    out, and whether it is public, is logged.

    Args:
        directory (`str` or `Path`):
            What a run left in `<output_dir>/mashup`, or `mashup merge` wrote.
        repo_id (`str`):
            Repository to push to, `org/name`.
        private (`bool`, *optional*):
            Whether a new repository is private; by default as its owner's settings say.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request instead of committing to the main branch.
        base_model (`str`, *optional*):
            Hub name of the base model, where the run recorded a local path. The model card is then written anew.
        license (`str`, *optional*):
            License for the model card, such as `"apache-2.0"`; by default the one that the sources share.

    Returns:
        `str`: Address of the repository, or of the pull request. Only the main process of several pushes; on the
        others, the name of the repository.

    Raises:
        ValueError: The directory holds no report or no adapter, a file of it holds a local path all the same, or
            `base_model` is no Hub name.
        HfHubHTTPError: The Hub refused.
    """
    folder = Path(directory)
    _check(folder, base_model, license)
    if not is_main_process():
        return repo_id
    api = HfApi(library_name="mashup_callback")
    texts = shared_texts(folder, base_model)
    files: dict[str, bytes | Path] = {name: texts.get(name, folder / name) for name in _names(folder)}
    refuse_paths(files, MashupReport.load(folder), folder)
    repository = _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    repo_id = repository.repo_id
    files[CARD_NAME] = _named_card(texts[CARD_NAME].decode(), repo_id, license).encode()
    _announce(repo_id, _retried(lambda: api.model_info(repo_id)).private, files)
    commit = _retried(
        lambda: api.create_commit(
            repo_id,
            # The client marks operations as used, also by an attempt that failed.
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message="Add a mashup",
            create_pr=create_pr,
        )
    )
    return commit.pr_url or str(repository)


def share(folder: Path) -> None:
    """Takes the local paths out of a mashup's texts, as a Trainer is about to upload its directory."""
    for name, content in shared_texts(folder).items():
        path, temporary = folder / name, folder / f".{name}.tmp"
        if path.is_file() and path.read_bytes() != content:
            temporary.write_bytes(content)
            temporary.replace(path)


def shared_texts(folder: Path, base_model: str | None = None) -> dict[str, bytes]:
    """Returns the texts of a mashup as they may be shared; the card is written anew where a base model is named."""
    report = MashupReport.load(folder)
    if base_model is not None:
        report = replace(report, base_model=base_model, config={**report.config, "base_model": base_model})
    shared = shareable(report)
    paths = [folder / name for name in _SETTINGS if (folder / name).is_file()]
    settings = {path.name: parse_object(read_limited(path, MAX_CONFIG_BYTES), path.name) for path in paths}
    adapter, card = settings.get(CONFIG_NAME), folder / CARD_NAME
    if base_model is None and card.is_file():
        files = {CARD_NAME: card.read_bytes().decode("utf-8")}
    else:
        picture = (folder / PICTURE_NAME).is_file()
        files = {CARD_NAME: mashup_card(shared, adapter, picture, settings.get(MODEL_CONFIG_NAME))}
    if (folder / MERGEKIT_NAME).is_file():
        recipe = None if adapter is None else mergekit_recipe(shared, shared=True)
        files[MERGEKIT_NAME] = recipe or without_paths((folder / MERGEKIT_NAME).read_text(encoding="utf-8"), report)
    for name, values in settings.items():
        own = {"base_model_name_or_path": base_model or shared.base_model} if name == CONFIG_NAME else {}
        files[name] = _named(folder / name, values, own)
    if (folder / FAILED_NAME).is_file():
        files[FAILED_NAME] = shareable(MashupReport.load(folder / FAILED_NAME)).to_json()
    # The last to be written: a full model without a newer file than its report may be replaced.
    files[REPORT_NAME] = shared.to_json()
    return {name: text.encode() for name, text in files.items()}


def _check(folder: Path, base_model: str | None, license: str | None) -> None:
    """Raises `ValueError` unless the directory is that of a mashup with an adapter or a model that can be read."""
    if license is not None and not is_license(license):
        raise ValueError(f"`license` is {license!r}, expected an identifier of the Hub such as 'apache-2.0'.")
    if base_model is not None and hub_name(base_model) is None:
        raise ValueError(f"`base_model` is {base_model!r}, expected its name on the Hub such as 'org/name'.")
    if not (folder / REPORT_NAME).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {REPORT_NAME}, expected the directory of a mashup: <output_dir>/mashup, or "
            "what `mashup merge` wrote."
        )
    report = MashupReport.load(folder)
    is_model = (folder / MODEL_CONFIG_NAME).is_file()
    if not is_model and not (folder / WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {WEIGHTS_NAME}: the decision was {report.decision!r} ({report.reason}). There "
            "is no merged adapter to push."
        )
    try:
        (read_checkpoint if is_model else read_adapter)(folder)
    except AdapterError as error:
        kind = "model" if is_model else "adapter"
        raise ValueError(f"The {kind} in {str(folder)!r} cannot be pushed: {error}.") from error


def _names(folder: Path) -> list[str]:
    """Returns which files of a mashup's directory are pushed."""
    names = {path.name for path in folder.iterdir() if path.is_file()} - {FAILED_NAME} | {CARD_NAME}
    if not (folder / MODEL_CONFIG_NAME).is_file():
        names &= {CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, REPORT_NAME, MERGEKIT_NAME, PICTURE_NAME}
    return sorted(names)


def _named_card(text: str, repo_id: str, license: str | None) -> str:
    """Returns a card with the repository's name in it, where its author has not written another title."""
    text = text.replace(ADAPTER_PLACEHOLDER, repo_id).replace(f"\n{TITLE}\n", f"\n# {repo_id}\n", 1)
    if license is None:
        return text
    card = ModelCard(text, ignore_metadata_errors=True)
    card.data.license = license
    return str(card)


def _announce(repo_id: str, private: bool, files: dict[str, bytes | Path]) -> None:
    sizes = {name: len(item) if isinstance(item, bytes) else item.stat().st_size for name, item in files.items()}
    listed = ", ".join(f"{name} ({size:,} bytes)" for name, size in sizes.items())
    seen = "private" if private else "public: anyone can read it"
    # Seen by everyone who has not asked for silence: it cannot be taken back.
    level = logging.INFO if private else logging.WARNING
    logger.log(level, "Pushing %d files to %s, which is %s: %s.", len(files), repo_id, seen, listed)


def _named(path: Path, values: dict[str, Any], own: dict[str, Any]) -> str:
    """Returns a JSON file with the Hub name of a model, or none, in place of a path; as it is if there is no path."""
    names = {key: hub_name(values[key]) for key in _NAME_KEYS if isinstance(values.get(key), str)} | own
    if all(values.get(key) == name for key, name in names.items()):
        return path.read_text(encoding="utf-8")
    return json.dumps(values | names, indent=2, sort_keys=True) + "\n"


def _retried(request: Callable[[], Result]) -> Result:
    """Repeats what the client itself does not: creating a repository and the final request of a commit."""
    for wait in _WAITS:
        try:
            return request()
        except HfHubHTTPError as error:
            if not is_transient(error):
                raise
            wait = min(retry_after(error.response) or wait, _LONGEST_WAIT)
            logger.warning("%s; trying again in %.1f s.", describe(error), wait)
            time.sleep(wait)
    return request()
