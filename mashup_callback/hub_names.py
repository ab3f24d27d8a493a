"""Under which names the Hub knows a base model: that of its repository, and that of the model it quantizes."""

import json
import logging
import os
from pathlib import Path

from huggingface_hub import metadata_load

from .errors import AdapterError
from .formats.files import read_limited
from .hub import Hub
from .hub_errors import TROUBLE, describe
from .sharing.card import hub_name


logger = logging.getLogger(__name__)

_QUANTIZED = "base_model:quantized:"
_MAX_BYTES = 2**20


def base_model_names(base_model: str | None, hub: Hub) -> tuple[str, ...]:
    """
    Returns the Hub names whose adapters fit a base model, its own first.

    Args:
        base_model (`str`, *optional*):
            Its name, or the directory that it was loaded from: a path into the Hub's cache, or a copy whose
            `config.json` or model card says where it is from.
        hub (`Hub`):
            Asked once, whether the model is a quantized version of another.
    """
    name = _recorded_name(base_model)
    if name is None:
        return ()
    try:
        info, _ = hub.get_json(f"/api/models/{name}", params={"expand": ["tags"]})
    except TROUBLE as error:
        if hub.down:
            raise
        logger.info("The Hub does not tell what %s was quantized from, if it was: %s", name, describe(error, name))
        return (name,)
    tags = info.get("tags") if isinstance(info, dict) else None
    found = [tag.removeprefix(_QUANTIZED) for tag in tags or () if isinstance(tag, str) and tag.startswith(_QUANTIZED)]
    return tuple(dict.fromkeys([name, *found]))


def _recorded_name(base_model: str | None) -> str | None:
    if base_model is None or not os.path.isdir(base_model):
        return hub_name(base_model)
    directory = Path(base_model)
    for recorded in (str(directory.resolve()), _from_config(directory), _from_card(directory)):
        name = hub_name(recorded)
        if name is not None and not os.path.isdir(name):
            logger.info("%s is searched for on the Hub as %s; set `base_model` if it is another.", base_model, name)
            return name
    return None


def _from_config(directory: Path) -> str | None:
    try:
        name = json.loads(read_limited(directory / "config.json", _MAX_BYTES)).get("_name_or_path")
    except (AdapterError, ValueError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and "/" in name else None


def _from_card(directory: Path) -> str | None:
    try:
        metadata = metadata_load(directory / "README.md") or {}
    except Exception:
        # Whatever YAML makes of a broken card: it says nothing then.
        return None
    name = metadata.get("base_model")
    name = name[0] if isinstance(name, list) and name else name
    return name if isinstance(name, str) and "/" in name else None
