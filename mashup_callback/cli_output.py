"""What the `mashup` command prints: tables, JSON that is nothing but JSON, and failures in one line."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from .display import below, common_warnings, number, percent, status, warnings
from .names import labels, printable
from .report import CandidateRow, MashupReport


_LONGEST_ERROR = 600


def show_result(value: Any, shown: RenderableType, as_json: bool) -> None:
    """Prints a result on stdout: `value` as JSON, or what is `shown` to people."""
    if as_json:
        typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))
    elif isinstance(shown, str):
        typer.echo(shown)
    else:
        Console().print(shown)


def _finite(value: Any) -> Any:
    # JSON has no word for infinity.
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(error: Exception) -> str:
    """Returns an error's message without line breaks, and not without end."""
    from .candidates import HTTP_ERROR, describe
    from .errors import HubError

    text = describe(error) if isinstance(error, HubError | HTTP_ERROR) else str(error)
    # The settings that errors name have other names here.
    text = re.sub(r"`merge_(method|space|parameters)`", r"--\1", text).replace("`base_model`", "--base-model")
    text = re.sub(r"for top_k=(\d+)", r"for \1 adapters", text)
    text = text.replace("Set top_k accordingly", "Give so many adapters")
    return " ".join(text.split())[:_LONGEST_ERROR] or type(error).__name__


def find_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the candidates that were found as a table."""
    table = _folding("candidate", "revision", "rank", "size", "license", "status")
    named = [
        CandidateRow(
            row["name"],
            "rejected" if row["reason"] else "scored",
            row["revision"],
            warnings=tuple(row["warnings"]),
            repo_id=row["repo_id"],
        )
        for row in rows
    ]
    said = common_warnings(named)
    table.caption = "\n".join(map(_text, below(said)))
    for name, row in zip(labels(named), rows, strict=True):
        # As git shortens it: a revision that is repeated in full would leave no room for the rest.
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f} MB"
        cells = ((row["revision"] or "")[:7], row["rank"], size, row["license"])
        warned = [text for text in row["warnings"] if text not in said]
        table.add_row(_text(name), *map(_text, cells), _text("; ".join([row["reason"] or "usable", *warned])))
    return table


def rank_table(rows: Sequence[CandidateRow], base_loss: float) -> Table:
    """Returns the ranking as a table."""
    table = _folding("candidate", "loss", "accuracy", "rows", "rank", "status")
    said = common_warnings(rows)
    table.caption = "\n".join(map(_text, [f"the base model alone: {base_loss:.4f}", *below(said)]))
    for name, row in zip(labels(rows), rows, strict=True):
        cells = (number(row.loss), number(row.accuracy), str(row.rows or ""), _text(row.rank))
        table.add_row(_text(name), *cells, _text(status(row, said)))
    return table


def merge_lines(report: MashupReport, output: Path) -> str:
    """Returns what was merged, with which weights, and how much of it the rank keeps."""
    rows = report.candidates
    sources = zip(labels(rows), report.shares(), rows, strict=True)
    lines = [f"  {percent(share):>4}  {printable(name)} (rank {row.rank})" for name, share, row in sources]
    kept = f"rank {report.merge.rank} keeps {report.merge.kept_energy:.1%} of the merge"
    title = f"Merged {len(rows)} adapters by {report.merge.method}; {kept}:"
    return "\n".join((title, *lines, *(f"Warning: {text}" for text in warnings(report)), f"Wrote {output}"))


def _folding(*columns: str) -> Table:
    table = Table(caption_justify="left")
    for name in columns:
        # The widest columns share what the others leave; with `no_wrap` one could take all of it.
        table.add_column(name, overflow="fold")
    return table


def _text(value: Any) -> str:
    # Imported here: the help of the command must not wait for torch.
    from .formats import quote

    return "" if value is None else escape(quote(value, 500))
