"""
A plugin for axolotl, whose YAML then takes the settings of `MashupArguments`:

    plugins:
      - mashup_callback.integrations.axolotl.MashupPlugin
    mashup_candidates: ["outputs/*"]
    mashup_top_k: 3
"""

import logging
from dataclasses import fields
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import create_model

from ..arguments import MashupArguments
from ..callback import MashupCallback


logger = logging.getLogger(__name__)

_FIELDS = [item.name for item in fields(MashupArguments)]
# What a YAML may hold is checked by `MashupConfig`, and what is not set keeps that class's default.
_SETTINGS: dict[str, Any] = dict.fromkeys(_FIELDS, (Any, None))
MashupArgs = create_model("MashupArgs", __doc__="The settings of a mashup in axolotl's YAML.", **_SETTINGS)


class MashupPlugin(BasePlugin):
    """Starts training from a mashup if the configuration has `mashup_candidates`."""

    def get_input_args(self) -> str:
        """Returns where the settings that the configuration may have are declared."""
        return f"{__name__}.{MashupArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[MashupCallback]:
        """Returns the callback, bound to axolotl's trainer: its own loss ranks, its trackers hear of the mashup."""
        settings = {name: cfg.get(name) for name in _FIELDS if cfg.get(name) is not None}
        candidates = settings.pop("mashup_candidates", None)
        if not candidates:
            logger.info("There are no `mashup_candidates`: training starts as without the plugin.")
            return []
        candidates = [candidates] if isinstance(candidates, str) else [*candidates]
        callback = MashupArguments(mashup_candidates=candidates, **settings).callback()
        # A metric of the user's own ranks instead of the trainer's loss.
        if callback is not None and callback.config.metric == "loss":
            callback.bind(trainer)
        return [] if callback is None else [callback]
