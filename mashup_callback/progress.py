"""How far a stage is: a bar with the time that is left on a terminal, one line a stage in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .distributed import is_main_process


class Stage:
    """A stage that is under way; rows are what it counts."""

    def __init__(self, name: str, total: int | None, bar: Progress) -> None:
        self.bar, self.done = bar, 0.0
        self.task = bar.add_task(name, total=total)

    def reach(self, rows: float) -> None:
        """Tells how many rows are done in all; fewer than before change nothing."""
        self.done = max(self.done, rows)
        self.bar.update(self.task, completed=self.done)


_stages: list[Stage] = []


def advance(rows: int) -> None:
    """Tells the stage that is under way, if there is one, that a batch of rows is done."""
    if _stages:
        _stages[-1].reach(_stages[-1].done + rows)


@contextmanager
def stage(name: str, total: int | None = None) -> Iterator[Stage]:
    """Shows a stage on stderr, in the main process; `total` rows that it takes tell how much time is left."""
    console, started = Console(stderr=True), time.monotonic()
    live = (console.is_terminal or console.is_jupyter) and not console.is_dumb_terminal
    columns = (TextColumn("mashup: {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    # A bar within a bar would write over it.
    hidden = not live or bool(_stages) or not is_main_process()
    bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=hidden)
    shown = Stage(name, total, bar)
    _stages.append(shown)
    try:
        with bar:
            yield shown
            # Filled too where rows came from the cache, or their number was not known.
            full = bar.tasks[0].total or max(shown.done, 1)
            bar.update(shown.task, total=full, completed=full)
    finally:
        _stages.pop()
    if not live and is_main_process():
        sys.stderr.write(f"mashup: {name}: {time.monotonic() - started:.1f} s\n")
