"""How far a long pass over documents is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from horovod_lm.data.documents import Piece
from horovod_lm.topology import place

Log = Callable[[str], None]

_LOG_SECONDS = 5.0
_LOOK = 64  # documents between looks at the clock
_LARGE = 2**16  # characters of a piece that is worth a look by itself


def follow(
    pieces: Iterator[Piece], log: Log, what: str, total: int | None
) -> closing[Generator[Piece, None, None]]:
    """`pieces`, while saying how many of `total` documents (None: nobody knows) are through. A
    context manager: on leaving, the bar stands still."""
    return closing(_follow(pieces, log, what, total))


def _follow(
    pieces: Iterator[Piece], log: Log, what: str, total: int | None
) -> Generator[Piece, None, None]:
    done, last = 0, time.monotonic()
    of = "" if total is None else f" of {total:,}"
    # Under a launcher stdout may be a pseudo-terminal of the launcher's, not a person's.
    if not sys.stdout.isatty() or place().launcher is not None:
        for piece in pieces:
            yield piece
            done += piece[1] and piece[2] == 0  # pairs count once
            if _due(done, piece) and time.monotonic() - last > _LOG_SECONDS:
                last = time.monotonic()
                log(f"{what}: {done:,}{of} documents")
        return
    columns = (MofNCompleteColumn(), TextColumn("documents"), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=Console())
    with bar:
        task = bar.add_task(what, total=total)
        try:
            for piece in pieces:
                # Before it is used: nobody may ask for what comes after the last one.
                done += piece[1] and piece[2] == 0
                if _due(done, piece):
                    bar.update(task, completed=done)
                yield piece
        finally:
            bar.update(task, completed=done)


def _due(done: int, piece: Piece) -> bool:
    return done % _LOOK == 0 or len(piece[0]) >= _LARGE
