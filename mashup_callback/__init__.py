"""Start LoRA fine-tuning from a merge of your best past adapters: one callback for the Hugging Face Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .arguments import MashupArguments
    from .callback import MashupCallback
    from .candidates import Candidate, find_candidates
    from .config import MashupConfig
    from .lora import MergedAdapter, merge_adapters
    from .report import MashupReport
    from .scoring import Score, score_candidates
    from .sharing import push_mashup

__version__ = "0.1.0"

_HOME = {
    "Candidate": "candidates",
    "MashupArguments": "arguments",
    "MashupCallback": "callback",
    "MashupConfig": "config",
    "MashupReport": "report",
    "MergedAdapter": "lora",
    "Score": "scoring",
    "find_candidates": "candidates",
    "merge_adapters": "lora",
    "push_mashup": "sharing.push",
    "score_candidates": "scoring",
}

__all__ = [
    "Candidate",
    "MashupArguments",
    "MashupCallback",
    "MashupConfig",
    "MashupReport",
    "MergedAdapter",
    "Score",
    "find_candidates",
    "merge_adapters",
    "push_mashup",
    "score_candidates",
]


def __getattr__(name: str) -> Any:
    # Names are looked up when first used, so that importing the package imports neither torch nor mergekit.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
