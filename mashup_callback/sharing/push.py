"""A mashup back to the Hub: the merged adapter as a repository of its own, and its part in a trained model's card."""

import inspect
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..candidates import WEIGHTS_NAME, hub_name
from ..candidates.hub import describe, is_transient, retry_after
from ..errors import AdapterError
from ..formats.adapter_config import CONFIG_NAME
from ..report import FAILED_NAME, REPORT_NAME, MashupReport
from .card import ADAPTER_PLACEHOLDER, CARD_NAME, with_section
from .plot import PLOT_NAME
from .recipe import MERGEKIT_NAME
from .shareable import refuse_paths, share, shareable, shared_texts


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
MODEL_CONFIG_NAME = "config.json"
_LONGEST_WAIT = 60.0


def push_mashup(
    directory: str | Path,
    repo_id: str,
    private: bool | None = None,
    create_pr: bool = False,
    *,
    base_model: str | None = None,
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

    Returns:
        `str`: Address of the commit, or of the pull request. Only the main process of several pushes; on the others,
        the name of the repository.

    Raises:
        ValueError: The directory holds no report or no adapter, a file of it holds a local path all the same, or
            `base_model` is no Hub name.
        HfHubHTTPError: The Hub refused.
    """
    folder = Path(directory)
    _check(folder, base_model)
    # Imported here because it imports torch, which a wrong directory should not wait for.
    from ..distributed import is_main_process

    if not is_main_process():
        return repo_id
    api = HfApi(library_name="mashup_callback")
    files = _files(folder, base_model)
    repo_id = _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    files[CARD_NAME] = files[CARD_NAME].replace(ADAPTER_PLACEHOLDER.encode(), repo_id.encode())
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
    return commit.pr_url or commit.commit_url


def describe_on_push(report: MashupReport, output_dir: str | Path, directory: Path) -> None:
    """
    Prepares what a Trainer is about to push: no local paths in the mashup's directory, and the mashup's section in the
    card of the trained model.

    To be called in `on_push_begin`. `Trainer.push_to_hub` fires it before it writes the card, and has no event between
    writing and uploading; so the card that is there gets the section now, and the one that this Trainer writes next
    gets it as soon as it is written.

    Args:
        report (`MashupReport`):
            The report.
        output_dir (`str` or `Path`):
            The Trainer's output directory.
        directory (`Path`):
            The mashup's directory.
    """
    if (directory / REPORT_NAME).is_file():
        share(directory)
    report, path = shareable(report), Path(output_dir) / CARD_NAME
    _add_section(path, report)
    trainer = _pushing_trainer()
    if trainer is None:
        logger.warning("No Trainer was found behind this push: a card that it writes now will not tell of the mashup.")
        return
    _after_next_card(trainer, lambda: _add_section(path, report))


def _check(folder: Path, base_model: str | None) -> None:
    """Raises `ValueError` unless the directory is that of a mashup with an adapter or a model that can be read."""
    if base_model is not None and hub_name(base_model) is None:
        raise ValueError(f"`base_model` is {base_model!r}, expected its name on the Hub such as 'org/name'.")
    if not (folder / REPORT_NAME).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {REPORT_NAME}, expected the directory of a mashup: <output_dir>/mashup, or "
            "what `mashup merge` wrote."
        )
    report = MashupReport.load(folder)
    is_model = report.is_full and (folder / MODEL_CONFIG_NAME).is_file()
    if not is_model and not (folder / WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {WEIGHTS_NAME}: the decision was {report.decision!r} ({report.reason}). There "
            "is no merged adapter to push."
        )
    # Imported here because they import torch.
    from ..formats.adapter import read_adapter
    from ..formats.checkpoint import read_checkpoint

    try:
        (read_checkpoint if is_model else read_adapter)(folder)
    except AdapterError as error:
        kind = "model" if is_model else "adapter"
        raise ValueError(f"The {kind} in {str(folder)!r} cannot be pushed: {error}.") from error


def _files(folder: Path, base_model: str | None) -> dict[str, bytes | Path]:
    """Returns what is pushed of a mashup's directory: its texts rewritten, the other files as they are."""
    names = {path.name for path in folder.iterdir() if path.is_file()} - {FAILED_NAME} | {CARD_NAME}
    if not (folder / MODEL_CONFIG_NAME).is_file():
        names &= {CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, REPORT_NAME, MERGEKIT_NAME, PLOT_NAME}
    texts = shared_texts(folder, base_model)
    files = {name: texts.get(name, folder / name) for name in sorted(names)}
    refuse_paths(files, folder)
    return files


def _announce(repo_id: str, private: bool, files: dict[str, bytes | Path]) -> None:
    sizes = {name: len(item) if isinstance(item, bytes) else item.stat().st_size for name, item in files.items()}
    listed = ", ".join(f"{name} ({size:,} bytes)" for name, size in sizes.items())
    seen = "private" if private else "public: anyone can read it"
    logger.info("Pushing %d files to %s, which is %s: %s.", len(files), repo_id, seen, listed)


def _add_section(path: Path, report: MashupReport) -> None:
    if not path.is_file():
        return
    try:
        # Bytes, so that line ends stay what they are.
        text = with_section(path.read_bytes().decode("utf-8"), report)
    except ValueError as error:
        logger.warning("The model card %s stays without the mashup's section: %s", path, error)
        return
    path.write_bytes(text.encode("utf-8"))


def _pushing_trainer() -> Any:
    # A callback is not given the Trainer, and only the Trainer knows when it has written its card.
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def _after_next_card(trainer: Any, then: Callable[[], None]) -> None:
    """Has the Trainer call `then` after the next card that it writes; once, and nothing of it stays behind."""
    overridden = vars(trainer).pop("create_model_card", None)
    overridden = getattr(overridden, "overridden", overridden)
    write = overridden or trainer.create_model_card

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        vars(trainer).pop("create_model_card", None)
        if overridden is not None:
            trainer.create_model_card = overridden
        write(*args, **kwargs)
        if trainer.is_world_process_zero():
            then()

    create_model_card.overridden = overridden
    trainer.create_model_card = create_model_card


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
