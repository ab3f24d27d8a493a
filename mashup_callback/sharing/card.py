"""The model card of a mashup."""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, constants

from ..candidates import Spec, hub_name, parse_spec
from ..names import printable
from ..report import CandidateRow, MashupReport


CARD_NAME = "README.md"
PICTURE_NAME = "ranking.png"
TITLE = "# Mashup"
"""Of the card, until the name of the repository is known."""
ADAPTER_PLACEHOLDER = "path/to/this/adapter"
"""Stands in the card for the name of the repository until that is known."""
BASE_PLACEHOLDER = "path/to/the/base/model"
_NO_BASE = (
    "the base model was loaded from a local path, and its name on the Hub was not recorded, so that this card cannot "
    "name it. The setting `base_model` does."
)
_LOST = "on held-out rows this merge was not better than a fresh initialization."
_TAKEN_BACK = (
    "written into the model that was trained, it did not compute what was judged on held-out rows: it was taken back."
)
_PAPER = "https://arxiv.org/abs/2603.10156"
_CITATION = f"""\
```bibtex
@misc{{mashup-learning,
  title = {{Mashup Learning}},
  eprint = {{2603.10156}},
  archivePrefix = {{arXiv}},
  url = {{{_PAPER}}}
}}
```"""
_DATASET = re.compile(r"[\w.-]+/[\w.-]+")
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


def mashup_card(
    report: MashupReport,
    adapter: Mapping[str, Any] | None,
    picture: bool = False,
    model: Mapping[str, Any] | None = None,
) -> str:
    """
    Returns the model card of a merge; whatever comes from a stranger (names, licenses, reasons) is inert code in it.

    `adapter` is what `adapter_config.json` holds, None for a full model, and `model` what that one's `config.json`
    does; `picture` says that the ranking's is there.
    """
    base_model, sources = base_name(report), merged_rows(report)
    license, warning = shared_license(sources)
    lost = (_TAKEN_BACK if _is_taken_back(report) else _LOST) if report.decision == "scratch" else None
    warnings = (warning, None if base_model else _NO_BASE, lost)
    form, kind = ("A full model", "models") if adapter is None else ("A LoRA adapter", "adapters")
    made = f"merged from past {kind}" if len(sources) != 1 else f"the best of the past {kind} compared, chosen"
    parts = [
        f"---\n{_metadata(report, sources, adapter, license).to_yaml()}\n---",
        TITLE,
        f"{form} of {_code(base_model) if base_model else 'a local base model'}, {made} by "
        f"[Mashup Learning]({_PAPER}). It is meant as a start for further training.",
        *(f"> **Warning:** {text}" for text in warnings if text),
        *([f"![Losses of the candidates, the fresh initialization and the merge]({PICTURE_NAME})"] if picture else []),
        "## Use",
        _usage(base_model, adapter, _model_class(model or {})),
        "## Mashup",
        _decision(report, adapter),
    ]
    if sources:
        parts.append(_source_table(report))
    if report.base_loss is not None:
        parts += ["### Held-out result", _result_table(report)]
    if report.merge is not None and sources:
        parts += ["### Reproduce", _reproduce(report, sources, adapter)]
    if any(report.environment.values()):
        versions = ", ".join(f"{name} {value}" for name, value in report.environment.items() if value)
        parts.append(f"Made with {_code(versions)}.")
    parts += ["## Citation", _CITATION]
    return "\n\n".join(parts) + "\n"


def is_license(name: str) -> bool:
    """Returns whether a text has the form of the Hub's license identifiers."""
    return _LICENSE.fullmatch(name) is not None


def shared_license(sources: Sequence[CandidateRow]) -> tuple[str | None, str | None]:
    """Returns the license for a card's metadata, if any is stated, and a warning where the sources share none."""
    stated = [(row.license or "").strip().lower() for row in sources]
    if not any(stated):
        return None, None
    if len(set(stated)) == 1 and is_license(stated[0]) and stated[0] not in ("other", "unknown"):
        return stated[0], None
    listed = ", ".join(dict.fromkeys(map(_license, sources)))
    return "other", f"the sources do not share one license: {listed}. All of them bind this merge."


def _metadata(
    report: MashupReport, sources: Sequence[CandidateRow], adapter: Mapping[str, Any] | None, license: str | None
) -> ModelCardData:
    base_model = base_name(report)
    task = "text-generation" if adapter is not None and adapter.get("task_type") == "CAUSAL_LM" else None
    # Only of the Hub: what a local card names may be a path or a project.
    names = [name for row in sources if hub_source(row) for name in row.datasets if _DATASET.fullmatch(name)]
    values = {
        "base_model": base_model,
        # "merge" would say that the base model is one of those that were merged, and searches would not find it.
        "base_model_relation": ("finetune" if adapter is None else "adapter") if base_model else None,
        "library_name": "transformers" if adapter is None else "peft",
        "license": license,
        "pipeline_tag": task,
        "datasets": list(dict.fromkeys(names)) or None,
        "tags": ["mashup", "merge"] if adapter is None else ["mashup", "merge", "lora"],
    }
    loss = report.single_loss if report.decision == "single" else report.merged_loss
    if loss is not None and report.config.get("metric", "loss") == "loss" and not _is_taken_back(report):
        result = EvalResult(
            task_type=task or "other",
            dataset_type="held-out",
            dataset_name="held-out rows of the training data",
            metric_type="loss",
            metric_name="loss per label token, before training",
            metric_value=round(loss, 4),
        )
        values |= {"model_name": ADAPTER_PLACEHOLDER, "eval_results": [result]}
    return ModelCardData(**values)


def _is_taken_back(report: MashupReport) -> bool:
    """Whether what was written into the model was taken back, as it was worse there than it had been judged."""
    return report.decision == "scratch" and report.expected_loss is not None


def _model_class(config: Mapping[str, Any]) -> str:
    """Returns the class of a model with this configuration, where that is a name."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) and name.isascii() and name.isidentifier() else "AutoModelForCausalLM"


def _usage(base_model: str | None, adapter: Mapping[str, Any] | None, model_class: str) -> str:
    if adapter is None:
        return (
            f"```python\nfrom transformers import {model_class}\n\n"
            f'model = {model_class}.from_pretrained("{ADAPTER_PLACEHOLDER}")\n```'
        )
    auto = _AUTO_CLASSES.get(str(adapter.get("task_type")), "AutoModelForCausalLM")
    return (
        "```python\nfrom peft import PeftModel\n"
        f"from transformers import {auto}\n\n"
        f"model = {auto}.from_pretrained({base_model or BASE_PLACEHOLDER!a})\n"
        f'model = PeftModel.from_pretrained(model, "{ADAPTER_PLACEHOLDER}", is_trainable=True)\n```\n\n'
        "Or let mashup_callback weigh it against other adapters at the beginning of training: "
        f'`callbacks=[MashupCallback(["{ADAPTER_PLACEHOLDER}"])]`.'
    )


def _decision(report: MashupReport, adapter: Mapping[str, Any] | None) -> str:
    if report.decision == "scratch":
        return f"Start of training: a fresh initialization ({_code(report.reason)})."
    if report.decision == "single":
        return "Start of training: the best past adapter."
    merge, text = report.merge, "Start of training: a merge of past adapters."
    if merge is None:
        return text
    parameters = f" with {_code(_json(merge.parameters))}" if merge.parameters else ""
    text += f" Method: {_code(merge.method)} of mergekit {_code(merge.mergekit_version)}{parameters}"
    if adapter is not None:
        text += (
            f" on {_code(merge.space)} updates, rank {merge.rank}, which keeps {merge.kept_energy:.1%} of the energy"
        )
    return f"{text}."


def _source_table(report: MashupReport) -> str:
    rows = []
    for row, share in zip(report.candidates, report.shares(), strict=True):
        if share is None:
            continue
        spec, name = hub_source(row), _code(row.name)
        if spec is not None:
            folder = f"/{spec.subfolder}" if spec.subfolder else ""
            name = f"[{name}]({constants.ENDPOINT}/{spec.repo_id}/tree/{spec.revision}{folder})"
        rows.append((name, _code(row.revision or "local"), _number(share), _number(row.loss), _license(row)))
    return _table(("source", "revision", "weight", "loss", "license"), rows)


def _result_table(report: MashupReport) -> str:
    metric = report.config.get("metric", "loss")
    label = "loss per token" if metric in ("loss", "token_accuracy") else _code(metric)
    losses = (
        ("fresh initialization", report.base_loss),
        ("best single adapter", report.single_loss),
        ("merge", report.merged_loss),
    )
    return _table(("start", label), [(name, _number(loss)) for name, loss in losses if loss is not None])


def _reproduce(report: MashupReport, sources: Sequence[CandidateRow], adapter: Mapping[str, Any] | None) -> str:
    local = [_code(row.name) for row in sources if not hub_source(row)]
    if local:
        verb = "is" if len(local) == 1 else "are"
        return f"{', '.join(local)} {verb} not on the Hub: only their owner can repeat this."
    merge, seed = report.merge, report.config.get("seed", 42)
    if adapter is None:
        # The configuration beside the card; a single model as it is needs none.
        return f"```bash\nmergekit-yaml mergekit.yaml merged --random-seed={seed}\n```"
    if models := [_code(row.name) for row in sources if row.kind == "model"]:
        return f"Of the full models {', '.join(models)} the low-rank part was merged, which only that run can repeat."
    weights = [row.weight for row in sources]
    options = {
        "weights": ",".join(map(repr, weights)) if set(weights) != {1 / len(weights)} else "equal",
        "method": merge.method,
        "space": merge.space,
        "rank": max(merge.rank, 1),
        **({"parameters": _json(merge.parameters)} if merge.parameters else {}),
        "seed": seed,
    }
    names = [f"{row.name}@{row.revision}" for row in sources]
    words = ["mashup", "merge", *names, *(f"--{key}={value}" for key, value in options.items()), "-o", "merged"]
    return "```bash\n" + " ".join(shlex.quote(printable(word)) for word in words) + "\n```"


def _license(row: CandidateRow) -> str:
    return _code(row.license) if row.license else "not known"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Replaced, not escaped: a backslash before an escaped bar would set it free, and split the code span.
    lines = [head, ["---"] * len(head), *([cell.replace("|", "¦") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: object) -> str:
    """Returns text as a Markdown code span, the one form in which neither Markdown nor HTML in it means anything."""
    plain = printable(str(text)) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    return f"{fence} {plain} {fence}" if "`" in plain else f"{fence}{plain}{fence}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _json(parameters: Mapping[str, Any]) -> str:
    return json.dumps(dict(parameters), sort_keys=True)
