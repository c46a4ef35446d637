"""What a person sees while the wheel is built: one line that changes on a terminal, a few plain
lines in a log.
"""

from __future__ import annotations

import re
import sys
import time
from typing import TextIO

_PERCENT = re.compile(r"\[ *(\d+)%\] (?:Building|Linking)")
_LOG_EVERY = 20  # percent, where the output is not a terminal


def compiled_percent(line: str) -> int | None:
    """How far make says it is, in percent, from a line of its output; None from any other line."""
    match = _PERCENT.search(line)
    return int(match.group(1)) if match else None


class Progress:
    """Says which stage the build is in and how far it is."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._terminal = self.stream.isatty()
        self._start = time.monotonic()
        self._shown = 0
        self._open = False

    def stage(self, text: str) -> None:
        """Begins a stage, on a line of its own."""
        self.close()
        self._shown = 0
        print(f"horovod: {text}", file=self.stream, flush=True)

    def compiled(self, percent: int) -> None:
        """Shows how much is compiled."""
        seconds = time.monotonic() - self._start
        if self._terminal:
            bar = "#" * (percent // 4)
            print(
                f"\r  compiled {percent:3d}% [{bar:<25}] {seconds:4.0f} s",
                end="",
                file=self.stream,
                flush=True,
            )
            self._open = True
        elif percent >= self._shown + _LOG_EVERY:
            self._shown = percent - percent % _LOG_EVERY
            print(f"  compiled {percent}% after {seconds:.0f} s", file=self.stream, flush=True)

    def close(self) -> None:
        """Ends a line that is still open."""
        if self._open:
            print(file=self.stream)
            self._open = False
