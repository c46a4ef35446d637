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

from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import Follower
from horovod_lm.report.table import Line, aligned, cell, digits, expanded

WIDTH = 100
COLOURS = ("blue", "dark_orange", "green", "magenta")
_MOST_COLUMNS = 4  # of runs; more of them are rows


class Display(AbstractContextManager["Display"]):
    """The progress of runs: a bar for each on a terminal, a line for each turn in a log."""

    def __init__(self, names: Sequence[str], steps: Sequence[int], console: Console) -> None:
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
            self._tasks = [
                self._bars.add_task("", total=total, name=name)
                for name, total in zip(names, steps, strict=True)
            ]

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
            where = f"step {follower.step}/{self._steps[which]}"
            self.say(f"{name}  {where}  {_figures(follower)}  {state}")


def make_console(stderr: bool = False) -> Console:
    """Of the terminal's width; a log is as wide as the table. `stderr` leaves stdout alone."""
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() else WIDTH
    return Console(highlight=False, soft_wrap=True, width=wide, stderr=stderr)


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
    wide = len(comparison.runs) > _MOST_COLUMNS
    console.print(_rows(comparison) if wide else _columns(comparison), soft_wrap=False)
    for sentence in comparison.verdict:
        console.print(Text(sentence, style="bold"), soft_wrap=False)


def _columns(comparison: Comparison) -> Table:
    """A column for each run; for two, one more with what is compared."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    runs = len(comparison.runs)
    lines = expanded(comparison.table, runs)
    table.add_column("", no_wrap=True)
    for which, name in enumerate(comparison.names):
        heading = Text(name, style=COLOURS[which % len(COLOURS)])
        table.add_column(heading, justify="right", overflow="fold")
    if runs == 2:
        table.add_column("")
    columns = [aligned([cell(line, which) for line in lines]) for which in range(runs)]
    for line, *cells in zip(lines, *columns, strict=True):
        extra = [Text(*line.compared[:1])] if runs == 2 else []
        table.add_row(Text(line.quantity), *map(Text, cells), *extra)
    return table


def _rows(comparison: Comparison) -> Table:
    """A row for each run, with the figures that matter most."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold", max_width=30)
    headings = ("loss", "apart", "tokens/s", "ratio", "interval", "MiB", "first step, s")
    chosen = [_overview(comparison, which) for which in range(len(comparison.runs))]
    columns = [aligned(list(cells)) for cells in zip(*chosen, strict=True)]
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, *cells in zip(comparison.names, *columns, strict=True):
        table.add_row(Text(name), *map(Text, cells))
    return table


def _overview(comparison: Comparison, which: int) -> list[str]:
    """One run's cells of `_rows`."""
    run, curves = comparison.runs[which], comparison.curves(which)
    speed, ratio = comparison.speed(which), comparison.ratio(which)
    memory = (run.record.get("memory_mib") or {}).get("largest")
    figures = ((run.final_loss, 4), (memory, None), (run.record.get("first_step_seconds"), None))
    loss, mib, first = (cell(Line("", (value,), (), places), 0) for value, places in figures)
    apart = f"{curves.largest:.1e}" if curves and which else ""
    tokens = digits(speed[0]) if speed else "–"
    compared = ["", ""]
    if ratio and which:
        compared = [f"{ratio[0]:.2f}", f"{ratio[1].low:.2f}–{ratio[1].high:.2f}"]
    return [loss, apart, tokens, *compared, mib, first]
