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

    def __init__(self, name: str, total: int | None, bar: Progress | None) -> None:
        self.bar, self.done = bar, 0.0
        self.task = bar.add_task(name, total=total) if bar is not None else None

    def reach(self, rows: float) -> None:
        """Tells how many rows are done in all; fewer than before change nothing."""
        self.done = max(self.done, rows)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)


_stages: list[Stage] = []


def advance(rows: int) -> None:
    """Tells the stage that is under way, if there is one, that a batch of rows is done."""
    if _stages:
        _stages[-1].reach(_stages[-1].done + rows)


@contextmanager
def stage(name: str, total: int | None = None) -> Iterator[Stage]:
    """
    Shows a stage on stderr, in the main process.

    Args:
        name (`str`): What is done.
        total (`int`, *optional*): Rows that it takes; without it there is no time left.
    """
    console, started = Console(stderr=True), time.monotonic()
    live = (console.is_terminal or console.is_jupyter) and not console.is_dumb_terminal
    # A bar within a bar would write over it.
    bar = _bar(console) if live and is_main_process() and not _stages else None
    _stages.append(Stage(name, total, bar))
    if bar is not None:
        bar.start()
    try:
        yield _stages[-1]
        _end(_stages[-1])
    finally:
        _stages.pop()
        if bar is not None:
            bar.stop()
    if not live and is_main_process():
        sys.stderr.write(f"mashup: {name}: {time.monotonic() - started:.1f} s\n")


def _bar(console: Console) -> Progress:
    columns = (TextColumn("mashup: {task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)


def _end(stage: Stage) -> None:
    """Fills the bar, also where rows came from the cache or their number was not known."""
    if stage.bar is not None:
        total = stage.bar.tasks[0].total or max(stage.done, 1)
        stage.bar.update(stage.task, total=total, completed=total)
