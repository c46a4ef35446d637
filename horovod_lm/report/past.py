"""Past runs side by side: any number of run folders, also unfinished ones, and comparisons."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from horovod_lm import statistics
from horovod_lm.errors import UserError
from horovod_lm.report.curves import Curves
from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import (
    REPORT,
    WARM_UP,
    Row,
    Run,
    Slice,
    read_run,
    seed_folder,
    tokens_per_second,
    whole_steps,
)
from horovod_lm.report.schema import VERSION
from horovod_lm.report.table import Line, count, digits
from horovod_lm.run_folder import STATE
from horovod_lm.statistics import Interval

_STRETCHES = 30  # of a run, each with a speed of its own


def open_runs(paths: Sequence[Path]) -> Comparison:
    """The runs of these folders, and those of the comparisons among them. A finished comparison by
    itself is that comparison again. Raises one `UserError` for all folders that can't be read."""
    if len(paths) == 1 and (report := _finished(paths[0])) is not None:
        return _comparison(paths[0], report)
    runs: dict[Path, tuple[Run, list[Slice]]] = {}
    problems = []
    for path in paths:
        try:
            for folder, slices in _folders(path).items():
                runs.setdefault(folder.resolve(), (_as_far_as_it_came(read_run(folder)), slices))
        except UserError as error:
            problems.append(str(error))
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or "its files are damaged"
            problems.append(f"{path} can't be read: {reason.lower()}")
    if problems:
        raise UserError("; ".join(problems))
    found, turns = zip(*runs.values(), strict=True)
    return PastRuns(found, _labels(list(runs)), turns)


def _finished(path: Path) -> dict[str, Any] | None:
    """The report of a finished comparison's folder, None if it is none."""
    try:
        report = json.loads((path / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    finished = report.get("state") == "finished" and report.get("schema") == VERSION
    return report if finished else None


def _comparison(path: Path, report: dict[str, Any]) -> Comparison:
    """A finished comparison from its folder."""
    labels = [variant["label"] for variant in report["variants"]]
    first, *others = (
        [read_run(seed_folder(path, number) / label) for label in labels]
        for number in range(report["seeds"])
    )
    starts = [variant["seconds_to_first_step"] for variant in report["variants"]]
    known = None not in starts
    return Comparison(
        first[0].config,
        first,
        [Slice(**values) for values in report["slices"]],
        report["warnings"],
        labels,
        seeds=others,
        margin=report["margins"]["final_loss"],
        starts=starts if known else (),
        before=report["seconds_to_first_steps"] - sum(starts) if known else 0.0,
    )


def _folders(path: Path) -> dict[Path, list[Slice]]:
    """The run folders that a path stands for, each with the times in which it alone was awake."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give folders that train or compare have written")
    if (path / STATE).exists():
        return {path: []}
    report = _finished(path)
    if report is not None:
        slices = [Slice(**values) for values in report["slices"] if values["seed"] == 0]
        labels = [variant["label"] for variant in report["variants"]]
        return {path / label: [s for s in slices if s.label == label] for label in labels}
    inside = sorted(file.parent for file in path.glob(f"*/{STATE}"))
    if not inside:
        raise UserError(f"{path} has no run in it (no {STATE}, and no folder with one)")
    return {folder: [] for folder in inside}


def _as_far_as_it_came(run: Run) -> Run:
    """A run whose record tells what its metrics do, also where it was never ended in order."""
    run.config  # noqa: B018 - a config that can't be read is told with the other problems
    if run.record["state"] != "finished" and run.steps:
        last = run.steps[-1]
        run.record |= {key: last[key] for key in ("updates", "loss")} | {"steps": last["step"]}
        if run.evaluations:
            run.record["validation_loss"] = run.evaluations[-1]["loss"]
    return run


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' paths without what all of them share."""
    if len(folders) == 1:
        return [folders[0].name]
    shared = os.path.commonpath(folders)
    return [os.path.relpath(folder, shared) for folder in folders]


class PastRuns(Comparison):
    """Runs that did not take turns: each has a speed of its own and none is faster, and curves are
    compared only of those that are meant to be the same.

    `turns` are, of each run that was part of a comparison, the times in which it was awake.
    """

    def __init__(
        self, runs: Sequence[Run], labels: Sequence[str], turns: Sequence[Sequence[Slice]] = ()
    ) -> None:
        super().__init__(runs[0].config, runs, labels=labels)
        self.names = list(labels)  # there may be more differences than a name can hold
        self._turns = turns or [()] * len(runs)
        self.warnings = [text for i in range(len(runs)) if (text := self._unfinished(i))]

    def curves(self, which: int, to: int = 0) -> Curves | None:
        """As of every comparison, but None where the two train something else."""
        return None if self.changed(which, to) else super().curves(which, to)

    @cached_property
    def counted(self) -> list[list[Row]]:
        """The step rows of each run that count."""
        return [
            [row for turn in turns for row in whole_steps(run, turn)]
            or [row for row in run.steps if row["step"] > WARM_UP and not row.get("profiled")]
            for run, turns in zip(self.runs, self._turns, strict=True)
        ]

    def turns(self, which: int) -> Sequence[Slice]:
        """As of every comparison: of the one that the run was part of."""
        return self._turns[which]

    def speed(self, which: int) -> tuple[float, Interval] | None:
        """Median tokens per second over equal stretches of a run, and its bootstrap interval."""
        return self._own_speeds[which]

    @cached_property
    def _own_speeds(self) -> list[tuple[float, Interval] | None]:
        return [_speed(rows) for rows in self.counted]

    def _unfinished(self, which: int) -> str:
        """That a run is not finished, "" if it is."""
        record = self.runs[which].record
        if record["state"] == "finished":
            return ""
        steps = self.runs[which].config.train.steps
        word = {"running": "has not ended in order", "stopped": "was stopped"}
        said = word.get(record["state"], f"has {record['state']}")
        return f"{self.names[which]} {said}: {record['steps']} of its {count(steps, 'step')}."

    @cached_property
    def table(self) -> list[Line]:
        """The rows of the table, with each run's own speed."""
        lines, speeds = super().table, self._own_speeds
        at = next(i for i, line in enumerate(lines) if line.quantity == "tokens per second")
        spans = [f"{digits(s[1].low)}–{digits(s[1].high)}" if s else "–" for s in speeds]
        lines[at : at + 1] = [
            Line("tokens/s, each in its own time", tuple(s[0] if s else None for s in speeds)),
            Line(f"  {100 * statistics.LEVEL:.0f}% interval", tuple(spans)),
        ]
        return lines


def _speed(rows: Sequence[Row]) -> tuple[float, Interval] | None:
    """Median tokens per second of stretches of these rows, and its bootstrap interval."""
    rows = [row for row in rows if row["parts"] is None]
    stretches = min(_STRETCHES, max(1, len(rows) // 10))
    edges = [len(rows) * i // stretches for i in range(stretches + 1)]
    found = [
        rate for begin, end in pairwise(edges) if (rate := tokens_per_second(list(rows[begin:end])))
    ]
    return statistics.median(found) if found else None
