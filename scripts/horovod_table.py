#!/usr/bin/env python3
"""Tries Horovod's API on two ranks, as released and with our mends, over MPI and over Gloo, and
writes what came of it into docs/horovod.md.

  python scripts/horovod_table.py run                      every cell that is missing or out of date
  python scripts/horovod_table.py run --only NAME --again  these rows anew
  python scripts/horovod_table.py page                     the table and the list of mends, no runs

`run` keeps each cell in the output file (JSON) as soon as it is known, so that it can be stopped
and started again. A cell is out of date when its probe, the mends or the frameworks have changed.
All of it takes about half an hour on two cores. "Plain" is Horovod's released Python on our build
of its C++, since the release does not build on today's frameworks. The rows are in
horovod_build/probes/.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from horovod_build import ranks
from horovod_build.facts import VERSION, BuildError
from horovod_build.mending import MendError, load_mends, mend_digests
from horovod_build.probes import PROBES, Probe
from horovod_build.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "horovod.md"
PROGRAM = str(ROOT / "scripts" / "horovod_build" / "probes" / "__main__.py")
CELLS = ROOT / "docs" / "horovod-table.json"
# What makes "plain": gloo_rendezvous mends Python too, its C++ alone stays.
UNDONE = {"plain": ("python", "build/gloo_rendezvous"), "ours": ()}
FRAMEWORKS = ("torch", "tensorflow", "tensorflow-cpu", "keras", "openmpi")
REFUSED = "Keras3NotSupported"
TIME_LIMIT = 120.0  # seconds; a job takes 5 to 10, on a busy machine several times as long


@dataclass(frozen=True)
class Cell:
    """How one probe has ended: its outcome, what the first rank that failed said, and how long the
    job took; `of` tells what was tried."""

    outcome: str
    said: str
    seconds: float
    of: str


def main() -> int:
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if options.command == "run":
            run(options)
        else:
            write_page(PAGE, read_cells(options.output))
            print(PAGE)
    except (BuildError, MendError) as error:
        print(f"The table can't be made. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the cells so far are kept.", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="try what is missing or out of date")
    paging = commands.add_parser("page", help="write docs/horovod.md's table and list of mends")
    for command in (running, paging):
        command.add_argument("--output", type=Path, default=CELLS, help="the cells, JSON")
    running.add_argument("--only", action="append", choices=PROBES, help="a row; several times")
    running.add_argument("--column", choices=UNDONE, help="plain or ours alone")
    running.add_argument("--launcher", choices=ranks.LAUNCHERS, help="mpi or gloo alone")
    running.add_argument("--again", action="store_true", help="also cells that are up to date")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Tries each wanted cell and keeps it; says how each has ended."""
    cells = read_cells(options.output)
    wanted = [
        (column, launcher, PROBES[name])
        for column in ([options.column] if options.column else UNDONE)
        for name in (options.only or PROBES)
        for launcher in ([options.launcher] if options.launcher else ranks.LAUNCHERS)
    ]
    digests = {column: digest_of_column(column) for column in UNDONE}
    todo = [
        (column, launcher, probe, of)
        for column, launcher, probe in wanted
        if (of := digest_of_cell(probe, digests[column]))
        != getattr(cells.get((probe.name, column, launcher)), "of", None)
        or options.again
    ]
    progress = Progress()
    progress.stage(f"{len(todo)} of {len(wanted)} cells to try")
    with tempfile.TemporaryDirectory(prefix="horovod-table-") as folder:
        packages: dict[str, Path] = {}
        for number, (column, launcher, probe, of) in enumerate(todo, 1):
            if column not in packages:
                packages[column] = ranks.package(Path(folder, column), UNDONE[column])
            cell = try_cell(probe, launcher, packages[column], Path(folder), of)
            cells[probe.name, column, launcher] = cell
            write_cells(options.output, cells)
            where = f"{column:5} {launcher:4} {probe.name:32}"
            progress.stage(
                f"[{number}/{len(todo)}] {where} {cell.outcome:14} {cell.said[:90]!r}"
                f" {cell.seconds:.0f} s"
            )


def try_cell(probe: Probe, launcher: str, package: Path, folder: Path, of: str) -> Cell:
    """Runs one probe in a job of its own."""
    begun = time.monotonic()
    if probe.of_launcher:
        outcome, said = judge_launcher(probe, launcher, package)
    else:
        place = Path(tempfile.mkdtemp(dir=folder))
        results, output = ranks.run_checks(
            launcher, PROGRAM, [probe.name], place, path=package, seconds=TIME_LIMIT
        )
        raised = [rank.get(probe.name, "") for rank in results]
        outcome, said = judge(raised, output, probe.refusal)
    return Cell(outcome, said, round(time.monotonic() - begun, 1), of)


def judge(raised: list[str | None], output: str, refusal: str = "") -> tuple[str, str]:
    """The outcome of a job, and what was said, from what the probe raised on each rank (None: it
    passed, "": it did not end) and what is in an error that refuses it."""
    if output.startswith("hang"):
        return "hang", next((said for said in raised if said), "")
    if all(said is None for said in raised):
        return "right", ""
    failures = [said for said in raised if said]
    for said in failures:
        if said.startswith("AssertionError: "):
            return "silently wrong", said.removeprefix("AssertionError: ")
    for said in failures:
        if REFUSED in said or (refusal and refusal in said):
            return "refused", said
    # Below a ruled line mpirun says that a rank has ended; above it is why.
    return "error", failures[0] if failures else output.split("-----")[0][-300:]


def judge_launcher(probe: Probe, launcher: str, package: Path) -> tuple[str, str]:
    try:
        probe.run(launcher, package)
    except AssertionError as error:
        return "wrong", str(error)
    except subprocess.TimeoutExpired:
        return "hang", ""
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"
    return "right", ""


# ----------------------------------------------------------------------------------------- cells


def digest_of_column(column: str) -> str:
    """Changes with what the column's package is made of; what changes in our C++ does not make
    plain Horovod another one."""
    return _digest([VERSION, mend_digests() if column == "ours" else {}, versions()])


def digest_of_cell(probe: Probe, column: str) -> str:
    return _digest([column, inspect.getsource(probe.run)])


def _digest(thing: object) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    found = {}
    for name in FRAMEWORKS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def read_cells(file: Path) -> dict[tuple[str, str, str], Cell]:
    """The cells kept in `file`, by probe, column and launcher; of probes that there still are."""
    if not file.exists():
        return {}
    kept = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return {
        (name, column, launcher): Cell(**cell)
        for name, columns in kept.items()
        for column, launchers in columns.items()
        for launcher, cell in launchers.items()
        if name in PROBES
    }


def write_cells(file: Path, cells: dict[tuple[str, str, str], Cell]) -> None:
    kept: dict[str, dict[str, dict[str, dict]]] = {name: {} for name in PROBES}
    for (name, column, launcher), cell in cells.items():
        # Folders of this machine say nothing elsewhere.
        said = re.sub(r"(?<!\w)/(?:[\w.+~-]+/)+", "", cell.said)[-300:]
        kept[name].setdefault(column, {})[launcher] = {**vars(cell), "said": said}
    text = json.dumps({"versions": versions(), "cells": kept}, indent=1) + "\n"
    draft = file.with_name(f".{file.name}-{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)


# ------------------------------------------------------------------------------------------ page


def write_page(page: Path, cells: dict[tuple[str, str, str], Cell]) -> None:
    """Puts the table and the list of mends between their marks in `page`."""
    text = page.read_text(encoding="utf-8")
    for mark, lines in (("table", table(cells)), ("mends", list_of_mends())):
        begin, end = (
            f"<!-- {mark}: scripts/horovod_table.py page -->\n",
            f"<!-- end of {mark} -->\n",
        )
        before, rest = text.split(begin)
        text = before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    page.write_text(text, encoding="utf-8")


def table(cells: dict[tuple[str, str, str], Cell]) -> list[str]:
    """The rows as Markdown, a table for each area; a cell that was not tried has a dash."""
    lines: list[str] = []
    area = None
    for name, probe in PROBES.items():
        if probe.area != area:
            area = probe.area
            lines += [
                "",
                f"| {area} | plain, MPI | plain, Gloo | ours, MPI | ours, Gloo |",
                "| --- | --- | --- | --- | --- |",
            ]
        found = [
            getattr(cells.get((name, column, launcher)), "outcome", "-")
            for column in UNDONE
            for launcher in ranks.LAUNCHERS
        ]
        lines.append(f"| {probe.title} | {' | '.join(found)} |")
    counted = [summary(cells, column) for column in UNDONE]
    return [*counted, *lines, ""]


def summary(cells: dict[tuple[str, str, str], Cell], column: str) -> str:
    """How many cells of a column ended in which way, the most frequent first."""
    outcomes = [cell.outcome for (_, of, _), cell in cells.items() if of == column]
    counted = sorted({o: outcomes.count(o) for o in outcomes}.items(), key=lambda pair: -pair[1])
    said = ", ".join(f"{number} {outcome}" for outcome, number in counted) or "not tried"
    return f"- {column}, {len(outcomes)} of {2 * len(PROBES)} cells tried: {said}"


def list_of_mends() -> list[str]:
    """A line for each mend: its file and the first sentence of its docstring."""
    return [f"- `{mend.name}`: {mend.summary}" for mend in load_mends()]


if __name__ == "__main__":
    sys.exit(main())
