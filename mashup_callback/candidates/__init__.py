"""Where candidates come from: the grammar, local directories and the Hub."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .candidate import Candidate
    from .download import arriving, download_candidate
    from .find import check_specs, find_candidates, fits, read_source
    from .hub import Hub
    from .local import WEIGHTS_NAME
    from .spec import Spec, hub_name, parse_spec

_MODULES = ("candidate", "download", "find", "hub", "local", "spec")
__all__ = [
    "WEIGHTS_NAME",
    "Candidate",
    "Hub",
    "Spec",
    "arriving",
    "check_specs",
    "download_candidate",
    "find_candidates",
    "fits",
    "hub_name",
    "parse_spec",
    "read_source",
]


def __getattr__(name: str) -> Any:
    # Lazy, since those who read adapters need `Candidate` before `find` can import them.
    for module in _MODULES if name in __all__ else ():
        found = vars(importlib.import_module(f".{module}", __name__))
        if name in found:
            return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
