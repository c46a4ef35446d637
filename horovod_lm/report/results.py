"""What runs say side by side: curves, rounds of speed, seeds; the verdict, the table, the figures.

The first run is the baseline: each of the others is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from horovod_lm import statistics
from horovod_lm.config import Config
from horovod_lm.report.curves import MARGIN, SEED_MARGIN, Curves
from horovod_lm.report.runs import (
    Row,
    Run,
    Slice,
    mean_parts,
    tokens_per_second,
    whole_profile,
    whole_steps,
)
from horovod_lm.report.table import Line, make_table
from horovod_lm.report.verdict import make_verdict
from horovod_lm.report.weights import Drift, weight_drift
from horovod_lm.statistics import LEAST_ROUNDS, Equivalence, Interval
from horovod_lm.variants import differing_keys, display_names


@dataclass(frozen=True)
class Round:
    """Tokens per second of every run in one round."""

    number: int
    speeds: tuple[float, ...]


class Comparison:
    """Finished runs, side by side.

    `slices` are the times in which each was awake; none for runs of other days, whose speeds can't
    be compared. `seeds` has the runs of further seeds, each in the order of `runs`; `margin` is
    that of their final losses, in nats. `starts` are the seconds from a job's start to its first
    finished step, by run, and `before` those from the command's start to the first job's.
    """

    def __init__(
        self,
        config: Config,
        runs: Sequence[Run],
        slices: Sequence[Slice] = (),
        warnings: Sequence[str] = (),
        labels: Sequence[str] | None = None,
        *,
        seeds: Sequence[Sequence[Run]] = (),
        margin: float = SEED_MARGIN,
        starts: Sequence[float] = (),
        before: float = 0.0,
    ) -> None:
        self.config, self.runs, self.slices = config, list(runs), list(slices)
        self.warnings, self.margin, self.starts = list(warnings), margin, list(starts)
        self.before = before
        self.labels = [run.folder.name for run in runs] if labels is None else list(labels)
        self.seeds = [self.runs, *(list(others) for others in seeds)]
        self._curves: dict[tuple[int, int], Curves | None] = {}
        self._ratios: dict[tuple[int, int], tuple[float, Interval]] = {}
        self.names = _distinct(display_names([run.config for run in runs]), self.labels)

    @property
    def others(self) -> range:
        """Indices of the runs that are compared with the baseline."""
        return range(1, len(self.runs))

    # The same training?

    def curves(self, which: int, to: int = 0) -> Curves | None:
        """The difference of a run's loss curve to that of run `to`; None if no step has both."""
        if (which, to) not in self._curves:
            first, other = self.runs[to].losses, self.runs[which].losses
            steps = sorted(first.keys() & other.keys())
            apart = [abs(first[step] - other[step]) for step in steps]
            self._curves[which, to] = Curves(steps, apart) if steps else None
        return self._curves[which, to]

    def changed(self, which: int, to: int = 0) -> list[str]:
        """Keys by which a run trains something else than run `to`; none where the two are meant
        to be the same."""
        first, other = self.runs[to].config.trajectory, self.runs[which].config.trajectory
        return [key for key in first if first[key] != other.get(key)]

    def twin(self, which: int) -> int:
        """The first run that is meant to train the same as a run; itself if it is the first."""
        return next(i for i in range(which + 1) if not self.changed(which, i))

    def against(self, which: int) -> int:
        """The run that a run's curve and weights are compared with: its twin before it, or else
        the baseline."""
        twin = self.twin(which)
        return 0 if twin == which else twin

    def drift(self, which: int) -> Drift | None:
        """How far a run's weights have drifted from those of the run it is compared with; None
        in the baseline, and where their sketches are missing or do not fit."""
        return self._drifts[which]

    @cached_property
    def _drifts(self) -> list[Drift | None]:
        pairs = [(self.runs[which], self.runs[self.against(which)]) for which in self.others]
        return [None, *(weight_drift(run, first) for run, first in pairs)]

    def judged(self, which: int) -> bool:
        """Whether a run's curve is held against the margin: in fp32 and fp64, where a run before it
        is meant to be the same and draws the same dropout masks."""
        twin = self.twin(which)
        first, other = self.runs[twin].config, self.runs[which].config
        exact = other.train.precision in ("fp32", "fp64")
        return twin != which and exact and _same_masks(first, other)

    def same_curve(self, which: int) -> bool | None:
        """Whether a run's curve is within the margin of its twin's; None where none is set."""
        if not self.judged(which):
            return None
        curves = self.curves(which, self.twin(which))
        return curves is not None and curves.early <= MARGIN

    def equivalence(self, which: int) -> Equivalence | None:
        """Test of the final losses, run - baseline, over the seeds; None for fewer than two."""
        return self._equivalences[which]

    @cached_property
    def _equivalences(self) -> list[Equivalence | None]:
        found: list[Equivalence | None] = []
        for which in range(len(self.runs)):
            pairs = [(runs[0].final_loss, runs[which].final_loss) for runs in self.seeds]
            apart = [b - a for a, b in pairs if a is not None and b is not None]
            whole = len(apart) == len(pairs) >= 2
            found.append(statistics.equivalence(apart, self.margin) if whole else None)
        return found

    @property
    def same(self) -> bool | None:
        """False if a run differs from the baseline by its curve, or is not shown to be equivalent
        over the seeds; True if neither, and one of the two was looked at; else None."""
        found = [self.same_curve(i) for i in self.others]
        tests = [self.equivalence(i) for i in self.others]
        said = [*found, *(test.same for test in tests if test is not None)]
        known = [value for value in said if value is not None]
        return all(known) if known else None

    # Which is faster?

    @cached_property
    def counted(self) -> list[list[Row]]:
        """The step rows of each run, of all seeds, that lie wholly in one of its slices."""
        return [self._rows(which) for which in range(len(self.runs))]

    def turns(self, which: int) -> Sequence[Slice]:
        """The slices of a run, with the first seed."""
        return [s for s in self.slices if s.label == self.labels[which] and s.seed == 0]

    def _rows(self, which: int, number: int | None = None) -> list[Row]:
        mine = [s for s in self.slices if s.label == self.labels[which]]
        return [
            row
            for s in mine
            if number is None or s.round == number
            for row in whole_steps(self.seeds[s.seed][which], s)
        ]

    @cached_property
    def rounds(self) -> list[Round]:
        """The rounds in which every run has whole steps."""
        found = []
        for number in sorted({s.round for s in self.slices}):
            rates = [tokens_per_second(self._rows(i, number)) for i in range(len(self.runs))]
            speeds = tuple(rate for rate in rates if rate)
            if len(speeds) == len(rates):
                found.append(Round(number, speeds))
        return found

    def speed(self, which: int) -> tuple[float, Interval] | None:
        """Median tokens per second of the rounds, and its bootstrap interval."""
        return self._speeds[which] if self.rounds else None

    @cached_property
    def _speeds(self) -> list[tuple[float, Interval]]:
        return [statistics.median(speeds) for speeds in self._by_run]

    @property
    def _by_run(self) -> list[list[float]]:
        return [[r.speeds[i] for r in self.rounds] for i in range(len(self.runs))]

    def ratio(self, which: int, to: int = 0) -> tuple[float, Interval] | None:
        """Median over the rounds of a run's speed / that of run `to`, and its bootstrap interval;
        None without rounds."""
        if self.rounds and (which, to) not in self._ratios:
            self._ratios[which, to] = statistics.ratio(self._by_run[which], self._by_run[to])
        return self._ratios.get((which, to))

    def outpaces(self, which: int, to: int = 0) -> bool | None:
        """Whether a run is faster (True) or slower (False) than run `to`: where the interval of
        their ratio excludes 1, over enough rounds; else None."""
        found = self.ratio(which, to)
        if found is None or len(self.rounds) < LEAST_ROUNDS or not found[1].excludes(1.0):
            return None
        return found[0] > 1

    @property
    def faster(self) -> int | None:
        """The run that is faster than every other; None if there is none."""
        if len(self.runs) < 2 or not self.rounds:
            return None
        medians = [self.ratio(i) or (0.0,) for i in range(len(self.runs))]
        first = max(range(len(medians)), key=lambda i: medians[i][0])
        rest = [i for i in range(len(self.runs)) if i != first]
        return first if all(self.outpaces(first, i) for i in rest) else None

    @property
    def together(self) -> float | None:
        """Seconds from the command to the first step of all runs, were they started one after the
        other with nothing between."""
        return self.before + sum(self.starts) if self.starts else None

    @cached_property
    def parts(self) -> list[dict[str, float] | None]:
        """Mean time of a step of each run by part, in ms."""
        return [mean_parts(rows) for rows in self.counted]

    @cached_property
    def profiles(self) -> list[Row | None]:
        """The profile of each run that has one; without those in whose steps it slept."""
        return [whole_profile(run, self.turns(which)) for which, run in enumerate(self.runs)]

    # What is shown

    @property
    def verdict(self) -> list[str]:
        """What was found, in sentences."""
        return make_verdict(self)

    @cached_property
    def table(self) -> list[Line]:
        """The rows of the table, in the words that terminal and page share."""
        return make_table(self)

    def as_json(self) -> dict[str, Any]:
        """The whole of it as plain values, for `report.json`; see `horovod_lm.report.schema`."""
        from horovod_lm.report.schema import make_report

        return make_report(self).model_dump(mode="json")


def _distinct(names: list[str], labels: Sequence[str]) -> list[str]:
    """Names of which no two are alike: where they are, the label says which."""
    return [
        f"{name} ({label})" if names.count(name) > 1 else name
        for name, label in zip(names, labels, strict=True)
    ]


def _same_masks(first: Config, other: Config) -> bool:
    """Whether dropout draws the same masks: those of a framework's own generator depend on it, on
    the number of ranks and on the micro-batches."""
    model = first.model
    if first.train.dropout_generator == "shared" or not (model.dropout or model.attention_dropout):
        return True
    keys = ("launch.backend", "launch.ranks", "train.micro_batch_size")
    return not set(keys) & set(differing_keys([first, other]))
