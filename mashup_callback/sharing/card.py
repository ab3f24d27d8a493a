"""What a mashup says of itself to others: the model card, and its part in the card of a trained model."""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, constants

from ..candidates.spec import Spec, hub_name, parse_spec
from ..report import CandidateRow, MashupReport


CARD_NAME = "README.md"
TAGS = ("mashup", "merge", "lora")
ADAPTER_PLACEHOLDER = "path/to/this/adapter"
"""Stands in the card for the name of the repository until that is known."""

_BEGIN, _END = "<!-- mashup: begin -->", "<!-- mashup: end -->"
BASE_PLACEHOLDER = "path/to/the/base/model"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,49}")
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def base_name(report: MashupReport) -> str | None:
    """Returns the Hub name of a report's base model; what exists on this machine is local unless the user named it."""
    named = report.base_model is not None and report.config.get("base_model") == report.base_model
    name = hub_name(report.base_model)
    return name if named or name != report.base_model or not os.path.exists(name or "") else None


def merged_rows(report: MashupReport) -> list[CandidateRow]:
    """Returns the rows of the candidates that were merged."""
    return [row for row in report.candidates if row.weight is not None]


def hub_source(row: CandidateRow) -> Spec | None:
    """Returns where on the Hub a candidate is, None for a local one."""
    try:
        spec = parse_spec(f"{row.name}@{row.revision}") if row.revision else None
    except ValueError:
        return None
    return spec if spec is not None and spec.kind == "repo" else None


def mashup_card(report: MashupReport, task_type: str | None = None) -> str:
    """
    Returns the model card of a merged adapter.

    Whatever comes from a stranger (names, licences, reasons) appears as inert code only.

    Args:
        report (`MashupReport`):
            The report.
        task_type (`str`, *optional*):
            peft's task type of the adapter, for the example.
    """
    base_model = base_name(report)
    licence, warning = shared_license(merged_rows(report))
    library, tags = ("transformers", TAGS[:2]) if report.is_full else ("peft", TAGS)
    data = ModelCardData(base_model=base_model, library_name=library, license=licence, tags=list(tags))
    warnings = [warning, _base_warning(report), _scratch_warning(report)]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# Mashup",
        f"{'A full model' if report.is_full else 'A LoRA adapter'} of "
        f"{_code(base_model) if base_model else 'a local base model'}, merged from past "
        f"{'models' if report.is_full else 'adapters'} by "
        "[Mashup Learning](https://arxiv.org/abs/2603.10156). It is meant as a start for further training.",
        *(f"> **Warning:** {text}" for text in warnings if text),
        "## Use",
        _full_usage(task_type) if report.is_full else _usage(base_model, task_type),
        mashup_section(report),
    ]
    return "\n\n".join(parts) + "\n"


def mashup_section(report: MashupReport) -> str:
    """Returns the part of a card that says what was merged, how, and how good it is, between two markers."""
    sources = merged_rows(report)
    parts = [_BEGIN, "## Mashup", _decision(report)]
    if sources:
        parts.append(_source_table(sources))
    if report.base_loss is not None:
        parts += ["### Held-out result", _result_table(report)]
    if report.merge is not None and sources:
        parts += ["### Reproduce", _command(report, sources)]
    return "\n\n".join([*parts, _END])


def with_section(card: str, report: MashupReport) -> str:
    """
    Returns a trained model's card with the mashup's section in it, in place of an earlier one.

    The tag `mashup` is added, and the base model where the card has none and its Hub name is known.

    Args:
        card (`str`):
            The card, with or without metadata.
        report (`MashupReport`):
            The report.

    Raises:
        ValueError: The card's metadata is not YAML.
    """
    try:
        parsed = ModelCard(card, ignore_metadata_errors=True)
    except yaml.YAMLError as error:
        raise ValueError(f"the card's metadata is not YAML: {error}") from error
    tags = list(parsed.data.tags or [])
    parsed.data.tags = tags if TAGS[0] in tags else [*tags, TAGS[0]]
    parsed.data.base_model = parsed.data.base_model or base_name(report)
    start, end = parsed.text.find(_BEGIN), parsed.text.rfind(_END)
    before, after = (parsed.text[:start], parsed.text[end + len(_END) :]) if 0 <= start < end else (parsed.text, "\n")
    parsed.text = f"{before.rstrip()}\n\n{mashup_section(report)}{after}"
    return str(parsed)


def has_section(card: str) -> bool:
    """Whether a card has the mashup's section."""
    return 0 <= card.find(_BEGIN) < card.rfind(_END)


def shared_license(sources: Sequence[CandidateRow]) -> tuple[str | None, str | None]:
    """
    Returns the licence that all sources share, with a warning where they do not.

    Args:
        sources (`Sequence[CandidateRow]`):
            What was merged.

    Returns:
        `tuple[str | None, str | None]`: The licence for a card's metadata (`"other"` where they differ, one of them is
        unknown or it is no identifier; None where none is stated), and the warning.
    """
    stated = [(row.license or "").strip().lower() for row in sources]
    if not any(stated):
        return None, None
    if len(set(stated)) == 1 and _LICENSE.fullmatch(stated[0]) and stated[0] not in ("other", "unknown"):
        return stated[0], None
    return "other", f"the sources do not share one licence: {_license_list(sources)}. All of them bind this merge."


def _base_warning(report: MashupReport) -> str | None:
    if base_name(report) is not None:
        return None
    return (
        "the base model was loaded from a local path, and its name on the Hub was not recorded, so that this card "
        "cannot name it. The setting `base_model` does."
    )


def _scratch_warning(report: MashupReport) -> str | None:
    if report.decision != "scratch":
        return None
    return "on held-out rows this merge was not better than a fresh initialization."


def _usage(base_model: str | None, task_type: str | None) -> str:
    auto = _AUTO_CLASSES.get(task_type, "AutoModelForCausalLM")
    return (
        "```python\nfrom peft import PeftModel\n"
        f"from transformers import {auto}\n\n"
        f"model = {auto}.from_pretrained({base_model or BASE_PLACEHOLDER!a})\n"
        f'model = PeftModel.from_pretrained(model, "{ADAPTER_PLACEHOLDER}", is_trainable=True)\n```\n\n'
        "Or let mashup_callback weigh it against other adapters at the beginning of training: "
        f'`callbacks=[MashupCallback(["{ADAPTER_PLACEHOLDER}"])]`.'
    )


def _full_usage(task_type: str | None) -> str:
    auto = _AUTO_CLASSES.get(task_type, "AutoModelForCausalLM")
    return (
        f'```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{ADAPTER_PLACEHOLDER}")\n```'
    )


def _decision(report: MashupReport) -> str:
    if report.decision == "scratch":
        return f"Start of training: a fresh initialization ({_code(report.reason)})."
    merge = report.merge
    start = "a merge of past adapters" if report.decision == "merged" else "the best past adapter"
    text = f"Start of training: {start}."
    if merge is None:
        return text
    parameters = f" with {_code(_json(merge.parameters))}" if merge.parameters else ""
    if report.is_full:
        return f"{text} Method: {_code(merge.method)} of mergekit {_code(merge.mergekit_version)}{parameters}."
    return (
        f"{text} Method: {_code(merge.method)} of mergekit {_code(merge.mergekit_version)}{parameters} on "
        f"{_code(merge.space)} updates, rank {int(merge.rank)}, which keeps {float(merge.kept_energy):.1%} of the "
        "energy."
    )


def _source_table(sources: Sequence[CandidateRow]) -> str:
    rows = [
        (_source_name(row), _code(row.revision or "local"), _number(row.weight), _number(row.loss), _license(row))
        for row in sources
    ]
    return _table(("source", "revision", "weight", "loss", "licence"), rows)


def _source_name(row: CandidateRow) -> str:
    spec = hub_source(row)
    if spec is None:
        return _code(row.name)
    folder = f"/{spec.subfolder}" if spec.subfolder else ""
    return f"[{_code(row.name)}]({constants.ENDPOINT}/{spec.repo_id}/tree/{spec.revision}{folder})"


def _result_table(report: MashupReport) -> str:
    metric = report.config.get("metric", "loss")
    label = "loss per token" if metric in ("loss", "token_accuracy") else _code(metric)
    losses = (
        ("fresh initialization", report.base_loss),
        ("best single adapter", report.single_loss),
        ("merge", report.merged_loss),
    )
    return _table(("start", label), [(name, _number(loss)) for name, loss in losses if loss is not None])


def _command(report: MashupReport, sources: Sequence[CandidateRow]) -> str:
    merge = report.merge
    if report.is_full:
        # The configuration beside the card; a single model as it is needs none.
        return f"```bash\nmergekit-yaml mergekit.yaml merged --random-seed={report.config.get('seed', 42)}\n```"
    names = [f"{row.name}@{row.revision}" if hub_source(row) else row.name for row in sources]
    weights = [row.weight for row in sources]
    equal = all(weight == 1 / len(weights) for weight in weights)
    words = ["mashup", "merge", *names, "--weights=" + ("equal" if equal else ",".join(map(repr, weights)))]
    words += [f"--method={merge.method}", f"--space={merge.space}", f"--rank={max(int(merge.rank), 1)}"]
    words += [f"--parameters={_json(merge.parameters)}"] if merge.parameters else []
    words += [f"--seed={report.config.get('seed', 42)}", "-o", "merged"]
    return "```bash\n" + " ".join(shlex.quote(_printable(word)) for word in words) + "\n```"


def _license_list(sources: Sequence[CandidateRow]) -> str:
    return ", ".join(dict.fromkeys(map(_license, sources)))


def _license(row: CandidateRow) -> str:
    return _code(row.license) if row.license else "not stated"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Replaced, not escaped: a backslash before an escaped bar would set it free, and split the code span.
    lines = [head, ["---"] * len(head), *([cell.replace("|", "¦") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: object) -> str:
    """Returns text as a Markdown code span, the one form in which neither Markdown nor HTML in it means anything."""
    plain = _printable(str(text)) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    return f"{fence} {plain} {fence}" if "`" in plain else f"{fence}{plain}{fence}"


def _printable(text: str) -> str:
    # A comment could pass for a marker of the section.
    return "".join(character if character.isprintable() else "?" for character in text).replace("<!--", "<!- -")


def _number(value: float | None) -> str:
    return "" if value is None else f"{float(value):.4f}"


def _json(parameters: Mapping[str, Any]) -> str:
    return json.dumps(dict(parameters), sort_keys=True)
