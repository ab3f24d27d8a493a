"""A report for people: one sentence, what to watch out for, and a table. Below the report, so it is not typed here."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .names import labels, printable


_NAMED = 3
# Shares of a merge, by its squared Frobenius norm, from which on a loss is worth a warning.
_KEPT, _LOST = 0.5, 0.1
_HTML = '<pre style="line-height:normal;overflow-x:auto"><code style="font-family:monospace">{code}</code></pre>'


def shown(report: Any) -> RenderableType:
    """Returns a report for a terminal: the sentence, the warnings, and the table, if there is anything in it."""
    texts = [
        Text(printable(summary(report)), "bold"),
        *(Text(printable(f"Warning: {text}"), "yellow") for text in warnings(report)),
    ]
    # A first run has no candidates, and a table of blanks says nothing.
    tables = [table(report)] if report.candidates or report.decision != "scratch" else []
    return Group(*texts, *tables)


def html(report: Any) -> str:
    """Returns the same for a notebook."""
    console = Console(record=True, file=io.StringIO(), width=120, force_jupyter=False)
    console.print(shown(report))
    return console.export_html(inline_styles=True, code_format=_HTML)


def summary(report: Any) -> str:
    """Returns what training starts from, what that gains and what it cost, in one sentence."""
    would = "would start" if report.dry_run else "starts"
    if not report.candidates and report.decision == "scratch":
        return f"Training {would} from the fresh initialization: {report.reason}."
    merged, [*single] = _merged(report), (name for name, row in _named(report) if row.weight is not None)
    if report.decision == "scratch":
        return f"Training {would} from the fresh initialization: {_why_scratch(report, merged)}."
    starts = {"merged": f"a merge of {_listed(merged, _kind(report))}"}
    text = f"Training {would} from {starts.get(report.decision, f'the {_kind(report)} {_listed(single)}')}"
    loss = {"merged": report.merged_loss, "single": report.single_loss}.get(report.decision)
    if loss is None:
        return f"{text}: {report.reason}."
    costs = [duration(report.seconds)]
    if report.share is not None:
        costs.append(f"about {max(report.share, 0.01):.0%} of the run")
    return f"{text}: held-out loss {_apart(loss, report.base_loss)}, {', '.join(costs)}."


def warnings(report: Any) -> list[str]:
    """Returns what a user should look at: a merge that does not fit what is trained."""
    merge = report.merge
    if merge is None:
        return []
    found = []
    if merge.lost_energy >= _LOST:
        found.append(
            f"{merge.lost_energy:.0%} of the merge is in {len(merge.lost_layers)} layers that are not trained "
            f"({_listed(merge.lost_layers)}). Add them to `target_modules`."
        )
    if merge.kept_energy < _KEPT:
        found.append(
            f"rank {merge.rank} keeps {merge.kept_energy:.0%} of the merge (of its squared norm). A larger `r` keeps "
            "more."
        )
    sources = [row for row in report.candidates if row.weight is not None]
    if merge.space == "weights" and sources and all(row.rank is not None for row in sources):
        found.append(
            "all weights of the model are trained, and every candidate in use is an adapter. If an adapter was meant, "
            "give the Trainer a `peft_config=LoraConfig(...)`."
        )
    return found


def table(report: Any) -> Table:
    """Returns the candidates with their losses, and what was compared on the held-out rows."""
    caption = None if report.reason in summary(report) else _plain(report.reason)
    table = Table(title=_plain(f"mashup: {report.decision}"), caption=caption)
    table.title_justify = table.caption_justify = "left"
    table.add_column("candidate", overflow="fold", ratio=1, min_width=14)
    for name in ("loss", "rows", "weight"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold", ratio=1)

    def add(name: str, loss: float | None, status: str, rows: str = "", weight: str = "") -> None:
        table.add_row(_plain(name), number(loss), rows, weight, _plain(status))

    rows = report.candidates
    for row, label, share in zip(rows, labels(rows), report.shares(), strict=True):
        add(label, row.loss, status(row), str(row.rows or ""), percent(share))
    table.add_section()
    if len(report.rounds) > 1:
        steps = (f"{one.entered} on {one.rows} rows" for one in report.rounds)
        add("race", None, f"{', '.join(steps)}; {report.rounds[-1].kept} left")
        table.add_section()
    merged = _merged(report)
    add("fresh initialization", report.base_loss, "held-out rows")
    add("best single", report.single_loss, "held-out rows")
    name = f"merge of {_listed(merged)}" if merged else "merge"
    add(name, report.merged_loss, ", ".join(("held-out rows", *_merge_facts(report.merge))))
    return table


def _plain(text: str) -> str:
    """Returns text for a table without markup, and without what a terminal would obey or cannot show."""
    return escape(printable(text))


def status(row: Any) -> str:
    """Returns a candidate's status with its reason and warnings."""
    # Why a candidate left the race says that it did.
    name = "" if row.status == "eliminated" and row.reason else f"{row.status}: "
    reasons = "; ".join(filter(None, (row.reason, *row.warnings)))
    return f"{name}{reasons}" if reasons else str(row.status)


def number(value: float | None) -> str:
    """Returns a loss as it stands in a table."""
    return "" if value is None else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def percent(value: float | None) -> str:
    """Returns a share as it stands in a table."""
    return "" if value is None else f"{value:.0%}" if abs(value) < 1e3 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Returns a time for people."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _why_scratch(report: Any, merged: Sequence[str]) -> str:
    if report.base_loss is None or report.merged_loss is None:
        return str(report.reason)
    others = f"{number(report.merged_loss)} of a merge of {_listed(merged, _kind(report))}"
    if report.single_loss is not None:
        others += f" or {number(report.single_loss)} of the best single one"
    return f"its held-out loss of {number(report.base_loss)} is not clearly above {others}, {duration(report.seconds)}"


def _merge_facts(merge: Any) -> Iterator[str]:
    if merge is not None:
        yield merge.method
        if merge.rank:
            yield f"rank {merge.rank} keeps {merge.kept_energy:.0%}"


def _merged(report: Any) -> list[str]:
    """Returns the names of what was merged, also of a merge that lost."""
    named = _named(report)
    return [name for name, row in named if row.in_merge] or [name for name, row in named if row.weight is not None]


def _named(report: Any) -> list[tuple[str, Any]]:
    return [*zip(report.short_names(), report.candidates, strict=True)]


def _kind(report: Any) -> str:
    sources = [row for row in report.candidates if row.weight is not None]
    return "model" if sources and all(row.rank is None for row in sources) else "adapter"


def _listed(names: Sequence[str], kind: str = "") -> str:
    """Returns the first of several names, with how many there are of a kind."""
    more = len(names) - _NAMED
    text = ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"{len(names)} {kind}s ({text})" if kind else text


def _apart(first: float, second: float | None) -> str:
    """Returns two losses with as few digits as tell them apart."""
    if second is None:
        return f"{first:.2f}"
    form = ".2f" if abs(first - second) > 0.02 and abs(second) < 1e5 else ".4g"
    return f"{first:{form}} instead of {second:{form}}"
