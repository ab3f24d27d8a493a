"""Where candidates come from: the grammar, local directories and the Hub."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .candidate import Candidate
    from .download import arriving, download
    from .find import check_specs, find_candidates, fits, read_source
    from .hub import Hub
    from .local import WEIGHTS_NAME
    from .spec import Spec, hub_name, parse_spec

_MODULES = {
    "Candidate": "candidate",
    "Hub": "hub",
    "Spec": "spec",
    "WEIGHTS_NAME": "local",
    "arriving": "download",
    "check_specs": "find",
    "download": "download",
    "find_candidates": "find",
    "fits": "find",
    "hub_name": "spec",
    "parse_spec": "spec",
    "read_source": "find",
}

__all__ = [
    "WEIGHTS_NAME",
    "Candidate",
    "Hub",
    "Spec",
    "arriving",
    "check_specs",
    "download",
    "find_candidates",
    "fits",
    "hub_name",
    "parse_spec",
    "read_source",
]


def __getattr__(name: str) -> Any:
    # Lazy, since those who read adapters need `Candidate` before `find` can import them.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
