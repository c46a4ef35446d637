"""How far a conversion is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

_LOG_SECONDS = 5.0


@contextmanager
def counting(log: Callable[[str], None], what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is told of so many bytes more, while it is said how many of `total` are
    through."""
    done, last = 0, time.monotonic()
    if sys.stdout.isatty():
        columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), *columns, console=Console()) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
        return

    def add(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last > _LOG_SECONDS:
            last = time.monotonic()
            log(f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    yield add
