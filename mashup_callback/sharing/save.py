"""A mashup's directory: the report, the picture and the merge with its card and mergekit's configuration."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import yaml

from ..formats import CONFIG_NAME, MAX_CONFIG_BYTES, MODEL_CONFIG_NAME, parse_object, read_limited
from ..methods import MergeRule, mergekit_config
from ..report import FAILED_NAME, REPORT_NAME, CandidateRow, MashupReport
from ..storage import replacing
from .card import BASE_PLACEHOLDER, CARD_NAME, PICTURE_NAME, base_name, hub_source, mashup_card, merged_rows
from .ranking import plot_ranking
from .shareable import shareable


logger = logging.getLogger(__name__)

MERGEKIT_NAME = "mergekit.yaml"
_HEADER = """\
# The merge in mergekit's terms: of full models, each the base with a LoRA, or as it was found. mashup_callback merges
# the updates alone, and cuts the result to the adapter's rank. But for the cut, the merge of the full models is the
# same for linear (with normalized weights), task_arithmetic and model_stock.
"""


def save_mashup(directory: Path, report: MashupReport, write: Callable[[Path], object] | None = None) -> None:
    """Replaces a mashup's directory at once; `write` is given an empty one for the weights of the merge, if any."""
    with replacing(directory) as draft:
        if write is not None:
            write(draft)
        written = any(draft.iterdir())
        plot_ranking(report, draft / PICTURE_NAME)
        if written:
            describe(draft, report)
        report.save(draft / REPORT_NAME)


def save_failure(directory: Path, report: MashupReport) -> None:
    """Writes the report of a mashup that failed; beside an earlier merge, which is kept, as `failed.json`."""
    if not any(directory.glob("*.safetensors")):
        save_mashup(directory, report)
        return
    logger.warning("The earlier merge in %s is kept; the report of this failure is %s there.", directory, FAILED_NAME)
    report.save(directory / FAILED_NAME)


def describe(directory: Path, report: MashupReport) -> None:
    """Writes the card of the merge in a directory, as others may see it, and mergekit's configuration of it."""
    paths = [path for path in (directory / CONFIG_NAME, directory / MODEL_CONFIG_NAME) if path.is_file()]
    configs = {path.name: parse_object(read_limited(path, 4 * MAX_CONFIG_BYTES), path.name) for path in paths}
    adapter, picture = configs.get(CONFIG_NAME), (directory / PICTURE_NAME).is_file()
    card = mashup_card(shareable(report), adapter, picture, configs.get(MODEL_CONFIG_NAME))
    (directory / CARD_NAME).write_text(card, encoding="utf-8")
    recipe = None if adapter is None else mergekit_recipe(report)
    if recipe is not None:
        (directory / MERGEKIT_NAME).write_text(recipe, encoding="utf-8")


def mergekit_recipe(report: MashupReport, shared: bool = False) -> str | None:
    """Returns mergekit's configuration of a merge of adapters; `shared` keeps the report's names of local ones."""
    sources = merged_rows(report)
    if report.merge is None or not sources:
        return None
    rule = MergeRule.create(report.merge.method, report.merge.parameters)
    base = {"path": base_name(report) or report.base_model or BASE_PLACEHOLDER}
    paths = [_model_path(row, shared) for row in sources]
    models = [
        {"model": path} if row.kind == "model" else {"model": base, "lora": path}
        for row, path in zip(sources, paths, strict=True)
    ]
    config = mergekit_config(rule, models, [row.weight for row in sources], {"model": base})
    # Through JSON, since YAML would write an object that it meets twice as an alias.
    return _HEADER + yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False)


def _model_path(row: CandidateRow, shared: bool) -> dict[str, str]:
    spec = hub_source(row)
    if spec is None:
        return {"path": row.name if shared else os.path.abspath(os.path.expanduser(row.name))}
    # mergekit knows no folders of a repository: such an input has to be downloaded first.
    return {"path": "/".join(filter(None, (spec.repo_id, spec.subfolder))), "revision": spec.revision}
