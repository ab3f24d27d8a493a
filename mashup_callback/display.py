"""A report for people: one sentence, what to watch out for, and a table. Below the report, so it is not typed here."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .names import labels, printable


_NAMED = 3
# Shares of a merge, by its squared Frobenius norm, from which on a loss is worth a warning.
_KEPT, _LOST = 0.5, 0.1


def shown(report: Any) -> RenderableType:
    """Returns a report for a terminal: the sentence, the warnings, and the table, if there is anything in it."""
    sentence = Text(printable(summary(report)), "bold")
    texts = [Text(printable(f"Warning: {text}"), "yellow") for text in warnings(report)]
    # A first run has no candidates, and a table of blanks says nothing.
    tables = [table(report)] if report.candidates or report.decision != "scratch" else []
    return Group(sentence, *texts, *tables)


def summary(report: Any) -> str:
    """Returns what training starts from, what that gains and what it cost, in one sentence."""
    start = "Training would start from" if report.dry_run else "Training starts from"
    if report.decision == "scratch":
        return f"{start} the fresh initialization: {_why_scratch(report)}."
    if report.decision == "merged":
        loss, chosen = report.merged_loss, f"a merge of {_counted(report)}"
    else:
        loss, chosen = report.single_loss, f"the {_kind(report)} {_listed(_weighted(report))}"
    if loss is None:
        return f"{start} {chosen}: {report.reason}."
    text = f"{start} {chosen}: held-out loss {_apart(loss, report.base_loss)}, {duration(report.seconds)}"
    return f"{text}." if report.share is None else f"{text}, about {max(report.share, 0.01):.0%} of the run."


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
    said = common_warnings(report.candidates)
    captions = [*([] if report.reason in summary(report) else [report.reason]), *below(said)]
    table = Table(title=_plain(f"mashup: {report.decision}"), caption="\n".join(map(_plain, captions)))
    table.title_justify = table.caption_justify = "left"
    table.add_column("candidate", overflow="fold", ratio=1, min_width=14)
    for name in ("loss", "rows", "weight"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold", ratio=1)

    def add(name: str, loss: float | None, status: str, rows: str = "", weight: str = "") -> None:
        table.add_row(_plain(name), number(loss), rows, weight, _plain(status))

    rows = report.candidates
    for row, label, share in zip(rows, labels(rows), report.shares(), strict=True):
        add(label, row.loss, status(row, said), str(row.rows or ""), percent(share))
    table.add_section()
    if len(report.rounds) > 1:
        steps = (f"{one.entered} on {one.rows} rows" for one in report.rounds)
        add("race", None, f"{', '.join(steps)}; {report.rounds[-1].kept} left")
        table.add_section()
    merged, merge = _merged(report), report.merge
    facts = ["held-out rows"] + ([merge.method] if merge else [])
    if merge and merge.rank:
        facts.append(f"rank {merge.rank} keeps {merge.kept_energy:.0%}")
    add("fresh initialization", report.base_loss, "held-out rows")
    add("best single", report.single_loss, "held-out rows")
    add(f"merge of {_listed(merged)}" if merged else "merge", report.merged_loss, ", ".join(facts))
    return table


def _plain(text: str) -> str:
    """Returns text for a table without markup, and without what a terminal would obey or cannot show."""
    return escape(printable(text))


def common_warnings(rows: Sequence[Any]) -> list[str]:
    """Returns the warnings that all of several candidates in use have, which a table says once."""
    found = [row.warnings for row in rows if row.status in ("scored", "eliminated")]
    return [text for text in found[0] if all(text in texts for texts in found)] if len(found) > 1 else []


def below(warnings: Sequence[str]) -> list[str]:
    """Returns what all candidates have in common as lines below a table."""
    return [f"All candidates: {text}" for text in warnings]


def status(row: Any, said: Sequence[str] = ()) -> str:
    """Returns a candidate's status with its reason, and its warnings but for what is said below the table."""
    # Why a candidate left the race says that it did.
    name = "" if row.status == "eliminated" and row.reason else f"{row.status}: "
    reasons = "; ".join(filter(None, (row.reason, *(text for text in row.warnings if text not in said))))
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


def _why_scratch(report: Any) -> str:
    # A swap that was taken back was checked before.
    if report.base_loss is None or report.merged_loss is None or report.expected_loss is not None:
        return str(report.reason)
    others = f"{number(report.merged_loss)} of a merge of {_counted(report)}"
    if report.single_loss is not None:
        others += f" or {number(report.single_loss)} of the best single one"
    return f"its held-out loss of {number(report.base_loss)} is not clearly above {others}, {duration(report.seconds)}"


def _weighted(report: Any) -> list[str]:
    names = zip(report.short_names(), report.candidates, strict=True)
    return [name for name, row in names if row.weight is not None]


def _merged(report: Any) -> list[str]:
    """Returns the names of what was merged, also of a merge that lost."""
    names = zip(report.short_names(), report.candidates, strict=True)
    return [name for name, row in names if row.in_merge] or _weighted(report)


def _kind(report: Any) -> str:
    sources = [row for row in report.candidates if row.weight is not None]
    return "model" if sources and all(row.kind == "model" for row in sources) else "adapter"


def _counted(report: Any) -> str:
    merged = _merged(report)
    return f"{len(merged)} {_kind(report)}s ({_listed(merged)})"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _apart(first: float, second: float | None) -> str:
    """Returns two losses with as few digits as tell them apart."""
    if second is None:
        return f"{first:.2f}"
    form = ".2f" if abs(first - second) > 0.02 and abs(second) < 1e5 else ".4g"
    return f"{first:{form}} instead of {second:{form}}"
