"""What the `mashup` command prints: tables, JSON that is nothing but JSON, and failures in one line."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from .report import CandidateRow


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
    return " ".join(text.split())[:_LONGEST_ERROR] or type(error).__name__


def find_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the candidates that were found as a table."""
    table = Table("candidate", "revision", "rank", "bytes", "license", "status")
    for row in rows:
        cells = (row["revision"], row["rank"], row["bytes"], row["license"], row["reason"] or "usable")
        table.add_row(_text(row["name"]), *map(_text, cells))
    return table


def rank_table(rows: Sequence[CandidateRow], base_loss: float) -> Table:
    """Returns the ranking as a table."""
    table = Table("candidate", "loss", "accuracy", "rows", "status", caption=f"the base model alone: {base_loss:.4f}")
    for row in rows:
        status = f"{row.status}: {row.reason}" if row.reason else row.status
        numbers = ("" if value is None else f"{value:.4f}" for value in (row.loss, row.accuracy))
        table.add_row(_text(row.name), *numbers, str(row.rows), _text(status))
    return table


def _text(value: Any) -> str:
    # Imported here: the help of the command must not wait for torch.
    from .formats import quote

    return "" if value is None else escape(quote(value, 500))
