"""Where candidates come from: the grammar, local directories and the Hub."""

from .candidate import Candidate
from .download import arriving, download_candidate
from .find import as_candidate, check_specs, find_candidates, read_source
from .hub import HTTP_ERROR, Hub, describe, is_transient, retry_after
from .provenance import same_data, stated_datasets
from .spec import Spec, hub_name, parse_spec
