"""What a person sees of a comparison on the terminal or in a log."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from horovod_lm.report.results import Comparison, aligned, cell
from horovod_lm.report.runs import Follower

WIDTH = 100
COLOURS = ("blue", "dark_orange")


class Display(AbstractContextManager["Display"]):
    """The progress of two runs: a bar for each on a terminal, a line for each turn in a log."""

    def __init__(self, names: Sequence[str], steps: int, console: Console) -> None:
        self.console = console
        self._names, self._steps = names, steps
        self._bars: Progress | None = None
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.fields[name]}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=self.console,
                refresh_per_second=2,  # the ranks need the cores
            )
            self._tasks = [self._bars.add_task("", total=steps, name=name) for name in names]

    def __enter__(self) -> Display:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bars if there are any."""
        self.console.print(text, markup=False)

    def progress(self, which: int, follower: Follower, state: str) -> None:
        """Redraw one run's bar; `state` says what it is doing."""
        if self._bars:
            described = f"{_figures(follower)}  {state}"
            self._bars.update(self._tasks[which], completed=follower.step, description=described)

    def turn(self, which: int, follower: Follower, state: str) -> None:
        """A run's turn has ended: a line in a log, the bar on a terminal."""
        self.progress(which, follower, state)
        if not self._bars:
            name = self._names[which].ljust(max(map(len, self._names)))
            where = f"step {follower.step}/{self._steps}"
            self.say(f"{name}  {where}  {_figures(follower)}  {state}")


def make_console() -> Console:
    """Of the terminal's width; a log is as wide as the table."""
    wide = None if sys.stdout.isatty() else WIDTH
    return Console(highlight=False, soft_wrap=True, width=wide)


def _figures(follower: Follower) -> str:
    if not follower.steps:
        return ""
    recent = follower.steps[-10:]
    loss = recent[-1]["loss"]
    # the median, since a step that a pause cut has slept within its seconds
    rate = statistics.median(row["tokens"] / max(row["seconds"], 1e-9) for row in recent)
    return f"loss {'–' if loss is None else f'{loss:.4f}'}  {rate:,.0f} tokens/s"


def print_results(comparison: Comparison, console: Console) -> None:
    """The table and, below it, the verdict: the last thing that is read."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name, colour in zip(comparison.names, COLOURS, strict=True):
        table.add_column(Text(name, style=colour), justify="right")
    table.add_column("")
    lines = comparison.table
    columns = [aligned([cell(line, which) for line in lines]) for which in (0, 1)]
    for line, first, second in zip(lines, *columns, strict=True):
        table.add_row(Text(line.quantity), Text(first), Text(second), Text(line.compared))
    console.print(table, soft_wrap=False)
    for sentence in comparison.verdict:
        console.print(Text(sentence, style="bold"), soft_wrap=False)
