"""Tables and figures on a terminal (rich) and in a file (plain columns)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

WIDTH = 100


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: str) -> None:
    """Print a table of strings at most 100 columns wide. `numbers` has a letter for each column:
    `r` aligns it to the right, `l` to the left. rich honours NO_COLOR."""
    if sys.stdout.isatty():
        _show_rich(title, columns, rows, numbers)
        return
    click.echo(title)
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, numbers, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())
    click.echo()


def _show_rich(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: str
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = min(WIDTH, console.width)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column, side in zip(columns, numbers, strict=True):
        table.add_column(column, justify="right" if side == "r" else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def size(count: float) -> str:
    """Bytes for a person: `12.3 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def scaled(count: float, unit: str) -> str:
    """A count with a decimal prefix and three significant digits: `71.2 GFLOP`."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 999.5:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:,.0f} E{unit}"
