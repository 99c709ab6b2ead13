"""How far a long piece of work is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
"""Plain lines are at least so far apart."""

Item = TypeVar("Item")


class Pace:
    """Says when the next plain line is due."""

    def __init__(self, seconds: float = PLAIN_SECONDS) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether the last line is long enough ago; if so, the time until the next one starts now."""
        due = time.monotonic() - self._last > self._seconds
        if due:
            self._last = time.monotonic()
        return due


class ProgressLines:
    """Callback that prints a plain line now and then; `line` has the fields {done} and {total}."""

    def __init__(self, line: str, seconds: float = 5.0) -> None:
        self._line = line
        self._pace = Pace(seconds)

    def __call__(self, done: int, total: int) -> None:
        if self._pace.is_due():
            print(self._line.format(done=done, total=total), flush=True)


@dataclass(frozen=True)
class Wording:
    """What `track` says."""

    doing: str
    """Stands before the bar."""
    line: str
    """Plain line with the fields {done}, {total} and {speed}."""
    before: str
    """Plain line, with {done} and {total}, about items that an earlier run did."""
    last_line: bool = False
    """Print a line after the last item too, even if none is due."""


def track(
    items: Iterable[Item],
    console: Console,
    wording: Wording,
    done: int,
    total: int,
    speed: Callable[[Item], str] | None = None,
) -> Iterator[Item]:
    """Pass `items` on and show how many of `total` are done, `done` of them before.

    `speed` is called with every item and returns what is shown beside the count.
    """
    if console.is_terminal:
        columns = (TextColumn(wording.doing), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=total, completed=done, speed="")
            for item in items:
                text = speed(item) if speed else ""
                yield item
                bar.update(task, advance=1, speed=text)
        return
    if done:
        console.print(wording.before.format(done=done, total=total))
    pace = Pace()
    for count, item in enumerate(items, start=done + 1):
        text = speed(item) if speed else ""
        yield item
        if (count < total and pace.is_due()) or (count == total and wording.last_line):
            console.print(wording.line.format(done=count, total=total, speed=text), highlight=False)


@contextlib.contextmanager
def bytes_read(total: int) -> Iterator[Callable[[int], None]]:
    """Show on stderr how much of `total` bytes is read; the block gets the function to call with that number."""
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console, pace = Console(stderr=True), Pace()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)

        def show(done: int) -> None:
            bar.update(task, completed=done)
            if not console.is_terminal and pace.is_due():
                console.print(f"read {done >> 20} of {total >> 20} MiB", highlight=False)

        yield show
