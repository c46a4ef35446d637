"""How far a benchmark is, on stderr: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from horovod_lm.bench.result import significant
from horovod_lm.bench.rounds import Sample


class Display(AbstractContextManager["Display"]):
    """A bar over all turns of a benchmark; `unit` is what a sample counts."""

    def __init__(self, turns: int, unit: str) -> None:
        self._unit = unit
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("measuring"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                refresh_per_second=1,  # what is measured needs the cores
            )
            self._task = self._bar.add_task("", total=turns)

    def __enter__(self) -> Display:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, markup=False)

    def turn(self, label: str, sample: Sample) -> None:
        """A turn has ended."""
        if self._bar:
            rate = f"{label}: {significant(sample.rate)} {self._unit}/s"
            self._bar.update(self._task, advance=1, description=rate)
