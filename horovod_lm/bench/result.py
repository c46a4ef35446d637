"""What a benchmark found: rows and ratios, as tables for a terminal and as JSON for a program."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horovod_lm.errors import RunFailed
from horovod_lm.installed import version_of
from horovod_lm.run_folder import machine
from horovod_lm.statistics import Interval
from horovod_lm.topology import usable_cores

SCHEMA = 1
_PACKAGES = ("torch", "tensorflow", "keras", "horovod", "numpy", "transformers", "keras-hub")


@dataclass(frozen=True)
class Column:
    """A column of the table of rows: the key in a row, and the words above it with the unit.

    `digits` are significant ones; None shows integers whole and text as it is. `share` shows a
    fraction as a percentage.
    """

    key: str
    title: str
    digits: int | None = 3
    share: bool = False

    def show(self, value: Any) -> str:
        """A value as it stands in the table."""
        if value is None:
            return "–"
        if isinstance(value, Interval):
            return interval_text(value, self.digits or 3)
        if self.share:
            return f"{value:.0%}"
        if isinstance(value, float) and self.digits is not None:
            return significant(value, self.digits)
        return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass(frozen=True)
class Ratio:
    """One figure that the benchmark is for: `value` with its interval (None where there is none,
    as for a single measurement). `aim` is what it should reach at least, or at most with
    `at_most`; None: no aim. `where` tells which of several settings it is of."""

    name: str
    value: float
    interval: Interval | None = None
    aim: float | None = None
    at_most: bool = False
    where: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the value reaches the aim; None without one."""
        if self.aim is None:
            return None
        return self.value <= self.aim if self.at_most else self.value >= self.aim


@dataclass(frozen=True)
class Table:
    """A table of strings: `numbers` has `r` or `l` for each column."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: str


@dataclass
class BenchResult:
    """The result of one benchmark.

    `bench`: its name; `settings`: what was measured and how (rounds, seconds, model, …); `rows`:
    one mapping for each thing measured, whose keys `columns` show in the table; `ratios`: the
    figures it is for; `notes`: sentences that a reader of the figures must know; `group_by`: keys
    of rows and ratios that have a table for each of their values.
    """

    bench: str
    title: str
    columns: Sequence[Column]
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    group_by: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """See docs/bench.md for the schema."""
        return {
            "schema": SCHEMA,
            "bench": self.bench,
            "settings": self.settings,
            "machine": {**machine(), "usable_cores": usable_cores(), "load": os.getloadavg()[0]},
            "versions": versions(),
            "rows": [{key: _plain(value) for key, value in row.items()} for row in self.rows],
            "ratios": [
                {
                    "name": item.name,
                    **item.where,
                    "ratio": item.value,
                    "interval": _plain(item.interval),
                    "aim": item.aim,
                    "reached": item.reached,
                }
                for item in self.ratios
            ],
            "notes": self.notes,
        }

    @property
    def tables(self) -> list[Table]:
        """The rows, and the ratios, of each group, for `horovod_lm.cli.table.show`."""
        groups = list(dict.fromkeys(self._group(row) for row in self.rows))
        groups += [g for r in self.ratios if (g := self._group(r.where)) not in groups]
        return [table for group in groups for table in self._tables_of(group)]

    def _group(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(values.get(key) for key in self.group_by)

    def _tables_of(self, group: tuple[Any, ...]) -> list[Table]:
        named = zip(self.group_by, group, strict=True)
        of = ", ".join(f"{key} {value}" for key, value in named if value is not None)
        tables = []
        shown = [column for column in self.columns if column.key not in self.group_by]
        rows = [row for row in self.rows if self._group(row) == group]
        if rows:
            text = [all(isinstance(r.get(c.key), str | None) for r in rows) for c in shown]
            cells = [[column.show(row.get(column.key)) for column in shown] for row in rows]
            numbers = "".join("l" if is_text else "r" for is_text in text)
            title = f"{self.title}: {of}" if of else self.title
            tables.append(Table(title, [c.title for c in shown], cells, numbers))
        ratios = [item for item in self.ratios if self._group(item.where) == group]
        if ratios:
            keys = dict.fromkeys(key for item in ratios for key in item.where)
            where = [key for key in keys if key not in self.group_by]
            lines = [
                [*(str(item.where.get(key, "–")) for key in where), *_line(item)] for item in ratios
            ]
            heads = [*where, "figure", "value", "95% interval", "aim", "reached"]
            title = "Ratios of paired rounds" + (f": {of}" if of else "")
            tables.append(Table(title, heads, lines, "l" * (len(where) + 1) + "rrrl"))
        return tables

    def write(self, path: Path) -> None:
        """Write the JSON. Raises `RunFailed` if it can't be."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.text + "\n", encoding="utf-8")
        except OSError as error:
            raise RunFailed(f"the figures can't be written to {path}: {error.strerror}") from None

    @property
    def text(self) -> str:
        """The JSON as text."""
        return json.dumps(self.as_json(), indent=1, ensure_ascii=False)


def interval_text(interval: Interval | None, digits: int = 3) -> str:
    """`1.02 – 1.07`."""
    if interval is None:
        return "–"
    return f"{significant(interval.low, digits)} – {significant(interval.high, digits)}"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, thousands separated, never in exponents."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, places)}f}"


def _line(item: Ratio) -> list[str]:
    reached = {None: "–", True: "yes", False: "no"}[item.reached]
    sign = "≤" if item.at_most else "≥"
    aim = "–" if item.aim is None else f"{sign} {item.aim:g}"
    return [item.name, significant(item.value), interval_text(item.interval), aim, reached]


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return {"low": value.low, "high": value.high, "level": value.level}
    return value


def versions() -> dict[str, str]:
    """Of this project, of Python and of what takes part and is installed."""
    from horovod_lm import __version__

    found = {name: version_of(name) for name in _PACKAGES}
    known = {name: version for name, version in found.items() if version}
    return {"horovod_lm": __version__, "python": platform.python_version(), **known}
