"""How far a long pass over documents is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from horovod_lm.data.documents import Piece
from horovod_lm.topology import place

Log = Callable[[str], None]

_LOG_SECONDS = 5.0
_LOOK = 64  # documents between looks at the clock


def follow(pieces: Iterator[Piece], log: Log, what: str, total: int | None) -> Iterator[Piece]:
    """`pieces`, while saying how many of `total` documents (None: nobody knows) are through."""
    done, last = 0, time.monotonic()
    of = "" if total is None else f" of {total:,}"
    with ExitStack() as stack:
        bar = None
        # Under a launcher stdout may be a pseudo-terminal of the launcher's, not a person's.
        if sys.stdout.isatty() and place().launcher is None:
            columns = (MofNCompleteColumn(), TextColumn("documents"), TimeRemainingColumn())
            bar = Progress(
                TextColumn("{task.description}"), BarColumn(), *columns, console=Console()
            )
            task = stack.enter_context(bar).add_task(what, total=total)
        for piece in pieces:
            yield piece
            done += piece[1]
            if done % _LOOK and not (bar is None and len(piece[0]) > 2**16):
                continue
            if bar is not None:
                bar.update(task, completed=done)
            elif time.monotonic() - last > _LOG_SECONDS:
                last = time.monotonic()
                log(f"{what}: {done:,}{of} documents")
        if bar is not None:
            bar.update(task, completed=done)
