"""The settings for YAML and the command line."""

import inspect
import re
from dataclasses import MISSING, dataclass, field, fields, make_dataclass

from .callback import MashupCallback
from .config import MashupConfig


# Parsers know no unions, so that these are text: see `MashupConfig.from_texts`.
_TEXTS = ("top_k", "sample_size", "metric", "merge_parameters", "weights")
_PYTHON_ONLY = ("guard_dataset",)
_DESCRIPTIONS = re.findall(r"^    (\w+) \(.*\):\n((?: {8}.*\n)+)", inspect.getdoc(MashupConfig) or "", re.MULTILINE)
# For argparse, which takes a percent sign as the beginning of a format.
_HELP = {name: " ".join(text.split()).replace("%", "%%") for name, text in _DESCRIPTIONS}

_Settings = make_dataclass(
    "_Settings",
    [
        (
            f"mashup_{item.name}",
            str if item.name in _TEXTS else item.type,
            field(
                default="{}" if item.default is MISSING else item.default,
                metadata={"help": _HELP.get(item.name, "")},
            ),
        )
        for item in fields(MashupConfig)
        if item.name not in _PYTHON_ONLY
    ],
)


@dataclass
class MashupArguments(_Settings):  # type: ignore[valid-type, misc]
    """
    The settings of [`MashupConfig`] with the prefix `mashup_`, for `trl.TrlParser` and `transformers.HfArgumentParser`
    beside any other arguments, with the candidates.

    Args:
        mashup_candidates (`list[str]`, *optional*):
            Directories, globs, Hub repositories, searches and collections; without any there is no mashup.
        mashup_* (*optional*):
            Each field of [`MashupConfig`] but `guard_dataset`. On the command line `merge_parameters` is JSON, and
            `weights` may be numbers with commas between them; YAML may hold a mapping and a list.

    Example:

    ```python
    script, training, model, mashup = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig, MashupArguments)
    ).parse_args_and_config()
    callback = mashup.callback()
    trainer = SFTTrainer(..., callbacks=[callback] if callback else [])
    ```
    """

    mashup_candidates: list[str] = field(
        default_factory=list, metadata={"help": "Directories, globs, Hub repositories, searches and collections."}
    )

    def config(self) -> MashupConfig:
        """Returns the settings."""
        names = [item.name for item in fields(MashupConfig) if item.name not in _PYTHON_ONLY]
        return MashupConfig.from_texts({name: getattr(self, f"mashup_{name}") for name in names})

    def callback(self) -> MashupCallback | None:
        """Returns the callback, None if there are no candidates."""
        return MashupCallback(self.mashup_candidates, config=self.config()) if self.mashup_candidates else None
