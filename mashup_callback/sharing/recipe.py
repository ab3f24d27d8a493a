"""The merge as a configuration of mergekit's own."""

import os
from typing import Any

import yaml

from ..report import CandidateRow, MashupReport
from .card import BASE_PLACEHOLDER, base_name, hub_source, merged_rows


MERGEKIT_NAME = "mergekit.yaml"
_HEADER = """\
# The merge in mergekit's terms: of full models, each the base with a LoRA. mashup_callback merges the updates alone,
# and cuts the result to the adapter's rank. But for the cut, the merge of the full models is the same for linear
# (with normalised weights), task_arithmetic and model_stock.
"""


def mergekit_config(report: MashupReport, shared: bool = False) -> str | None:
    """
    Returns the merge as a configuration file of mergekit, None if nothing was merged.

    Args:
        report (`MashupReport`):
            The report.
        shared (`bool`, *optional*, defaults to `False`):
            Name local adapters as the report does, not by their absolute paths.
    """
    sources = merged_rows(report)
    if report.merge is None or not sources:
        return None
    # Imported here so that a card can be read and written without mergekit.
    from ..methods import MergeRule

    rule = MergeRule.create(report.merge.method, report.merge.parameters)
    base = {"path": base_name(report) or report.base_model or BASE_PLACEHOLDER}
    models = [{"model": base, "lora": _model_path(row, shared)} for row in sources]
    shared = {name: value for name, value in rule.parameters if not isinstance(value, tuple)}
    entries = []
    for index, (row, model) in enumerate(zip(sources, models, strict=True)):
        own = {name: value[index] for name, value in rule.parameters if isinstance(value, tuple)}
        weight = {"weight": row.weight} if rule.takes_weights else {}
        entries.append({"model": model, **({"parameters": weight | own} if weight | own else {})})
    config: dict[str, Any] = {"merge_method": rule.method, "models": entries}
    if rule.spec.contract.base.name == "REQUIRED":
        config["base_model"] = models[0] if rule.spec.contract.max_inputs == 2 else {"model": base}
    config |= {"parameters": shared} if shared else {}
    return _HEADER + yaml.dump(config, Dumper=_PlainDumper, sort_keys=False)


def _model_path(row: CandidateRow, shared: bool) -> dict[str, str]:
    spec = hub_source(row)
    if spec is None:
        return {"path": row.name if shared else os.path.abspath(os.path.expanduser(row.name))}
    # mergekit knows no folders of a repository: such an input has to be downloaded first.
    return {"path": "/".join(filter(None, (spec.repo_id, spec.subfolder))), "revision": spec.revision}


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        # mergekit reads aliases, people do not.
        return True
