"""Where candidates come from: the grammar, local directories and the Hub."""

from .candidate import Candidate
from .download import arriving, download_candidate
from .find import as_candidate, check_specs, find_candidates, read_source
from .hub import Hub
from .local import WEIGHTS_NAME
from .provenance import same_data
from .spec import Spec, hub_name, parse_spec


__all__ = [
    "WEIGHTS_NAME",
    "Candidate",
    "Hub",
    "Spec",
    "arriving",
    "as_candidate",
    "check_specs",
    "download_candidate",
    "find_candidates",
    "hub_name",
    "parse_spec",
    "read_source",
    "same_data",
]
