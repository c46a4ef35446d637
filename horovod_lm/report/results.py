"""What two runs say side by side: curves, rounds of speed, the table and the verdict in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from horovod_lm.config import Config
from horovod_lm.report.runs import (
    PARTS,
    Row,
    Run,
    Slice,
    mean_parts,
    tokens_per_second,
    whole_steps,
)

CURVE_MARGIN = 1e-4  # nats; what rounding may do to two fp32 loss curves
# Training amplifies rounding differences step by step, so the margin is for the first steps only.
CURVE_STEPS = 200
LEAST_ROUNDS = 3
_NAMES = {"torch": "PyTorch", "tensorflow": "TensorFlow"}
PART_WORDS = {"forward_backward": "forward and backward", "reduce": "reduce (with waiting)"}


def display_name(backend: str) -> str:
    """How a backend is called in front of people."""
    return _NAMES.get(backend, backend)


@dataclass(frozen=True)
class Round:
    """Tokens per second of both backends in one round, and first / second."""

    number: int
    speeds: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.speeds[0] / self.speeds[1]


@dataclass(frozen=True)
class Line:
    """A row of the table: a value for each backend (text where it is no plain number).

    `decimals` is None for three significant digits.
    """

    quantity: str
    values: tuple[float | str | None, float | str | None]
    compared: str = ""
    decimals: int | None = None


@dataclass(frozen=True)
class Curves:
    """How far two loss curves are apart, over the steps that both have; nats."""

    steps: list[int]
    differences: list[float]

    @property
    def largest(self) -> float:
        return max(self.differences)

    @property
    def at(self) -> int:
        """The step of the largest difference."""
        return self.steps[self.differences.index(self.largest)]

    @property
    def early(self) -> float:
        """The largest difference of the first `CURVE_STEPS` steps."""
        pairs = zip(self.steps, self.differences, strict=True)
        return max((d for s, d in pairs if s <= CURVE_STEPS), default=self.largest)


class Comparison:
    """Two finished runs of the same config and the slices in which each was awake."""

    def __init__(
        self,
        config: Config,
        runs: tuple[Run, Run],
        slices: Sequence[Slice],
        warnings: Sequence[str] = (),
    ) -> None:
        self.config, self.runs, self.slices = config, runs, list(slices)
        self.warnings = list(warnings)
        self.names = (display_name(runs[0].backend), display_name(runs[1].backend))

    @cached_property
    def curves(self) -> Curves | None:
        """The loss curves' difference; None if no step has both losses."""
        a, b = self.runs[0].losses, self.runs[1].losses
        steps = sorted(a.keys() & b.keys())
        return Curves(steps, [abs(a[s] - b[s]) for s in steps]) if steps else None

    @cached_property
    def counted(self) -> tuple[list[Row], list[Row]]:
        """The step rows of each run that lie wholly in one of its slices."""
        return self._rows(0), self._rows(1)

    def _rows(self, which: int, number: int | None = None) -> list[Row]:
        run = self.runs[which]
        mine = [s for s in self.slices if s.backend == run.backend]
        return [
            row for s in mine if number is None or s.round == number for row in whole_steps(run, s)
        ]

    @cached_property
    def rounds(self) -> list[Round]:
        """The rounds in which both backends have whole steps."""
        found = []
        for number in sorted({s.round for s in self.slices}):
            first = tokens_per_second(self._rows(0, number))
            second = tokens_per_second(self._rows(1, number))
            if first and second:
                found.append(Round(number, (first, second)))
        return found

    @property
    def faster(self) -> int | None:
        """Which of the two was faster in every round, of at least three; None if neither was."""
        ratios = [r.ratio for r in self.rounds]
        if len(ratios) < LEAST_ROUNDS:
            return None
        if min(ratios) > 1:
            return 0
        return 1 if max(ratios) < 1 else None

    @property
    def same(self) -> bool | None:
        """Whether the curves are within the margin; None where none is set (bf16, fp16)."""
        if self.config.train.precision != "fp32":
            return None
        return self.curves is not None and self.curves.early <= CURVE_MARGIN

    @property
    def verdict(self) -> list[str]:
        """What was found, in sentences: the model, the scaler where there is one, the speed."""
        sentences = [self._about_curves()]
        if self.config.train.precision == "fp16":
            sentences.append(self._about_scaler())
        return [*sentences, self._about_speed()]

    def _about_curves(self) -> str:
        curves, precision = self.curves, self.config.train.precision
        if curves is None:
            return "No step has a finite loss in both backends, so the curves can't be compared."
        last = curves.steps[-1]
        extent = f"by up to {curves.largest:.1e} nats over {last} steps"
        if last > CURVE_STEPS and curves.early < curves.largest:
            early = f"by up to {curves.early:.1e} nats over the first {CURVE_STEPS} steps"
            extent = f"{early} and {curves.largest:.1e} over all {last}"
        if self.same is None:
            return (
                f"In {precision} the loss curves differ {extent}; each framework rounds in its "
                f"own way there, so no margin is set."
            )
        if self.same:
            return f"The two backends train the same model: their loss curves differ {extent}."
        pairs = zip(curves.steps, curves.differences, strict=True)
        first = next(step for step, difference in pairs if difference > CURVE_MARGIN)
        return (
            f"The two backends differ: their loss curves are apart {extent}, more than the "
            f"{CURVE_MARGIN:.0e} nats of rounding, for the first time at step {first}."
        )

    def _about_scaler(self) -> str:
        skipped = [[r["step"] for r in run.steps if r["overflow"]] for run in self.runs]
        if skipped[0] == skipped[1]:
            return f"Both skipped the same {_count(len(skipped[0]), 'step')} for overflows."
        step = min(set(skipped[0]) ^ set(skipped[1]))
        return f"They did not skip the same steps: step {step} overflowed in one of them only."

    def _about_speed(self) -> str:
        ratios = [r.ratio for r in self.rounds]
        if len(ratios) < LEAST_ROUNDS:
            return (
                f"Speeds were not compared: that takes {LEAST_ROUNDS} alternating rounds, and the "
                f"runs were long enough for {len(ratios)}."
            )
        if self.faster is None:
            listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            return (
                f"No speed difference shown: {self.names[0]} ran at {listed} times the speed of "
                f"{self.names[1]} in {len(ratios)} rounds."
            )
        gains = sorted(ratio if self.faster == 0 else 1 / ratio for ratio in ratios)
        return (
            f"{self.names[self.faster]} was faster in every one of {len(ratios)} rounds, by "
            f"{gains[0]:.2f} to {gains[-1]:.2f} times."
        )

    @cached_property
    def table(self) -> list[Line]:
        """The rows of the table, in the words that terminal and page share."""
        return [*self._loss_lines(), *self._speed_lines(), *self._cost_lines()]

    def _pair(self, get: Any) -> tuple[Any, Any]:
        return get(self.runs[0]), get(self.runs[1])

    def _loss_lines(self) -> list[Line]:
        loss = self._pair(lambda run: run.steps[-1]["loss"] if run.steps else None)
        validation = self._pair(lambda run: run.record.get("validation_loss"))
        entropy = self.runs[0].record.get("unigram_entropy")
        share = tuple(v / entropy if v is not None and entropy else None for v in validation)
        lines = [
            Line("loss of the last step, nats", loss, _difference(loss), 4),
            Line("validation loss, nats per token", validation, _difference(validation), 4),
            Line("  share of the unigram entropy", (share[0], share[1]), "", 3),
        ]
        if self.curves is not None:
            text = f"≤ {self.curves.largest:.1e} apart"
            lines.insert(1, Line("loss curves", ("", ""), text))
        return lines

    def _speed_lines(self) -> list[Line]:
        speeds = [[r.speeds[i] for r in self.rounds] for i in (0, 1)]
        if not self.rounds:
            return [Line("tokens per second", (None, None), "no rounds")]
        medians = statistics.median(speeds[0]), statistics.median(speeds[1])
        spans = [f"{digits(min(s))}–{digits(max(s))}" for s in speeds]
        ratios = [r.ratio for r in self.rounds]
        ratio = statistics.median(ratios)
        many = _count(len(self.rounds), "round")
        return [
            Line(f"tokens/s, median of {many}", medians, f"median ratio {ratio:.2f}"),
            Line(
                "  lowest–highest round",
                (spans[0], spans[1]),
                f"ratio {min(ratios):.2f}–{max(ratios):.2f}",
            ),
        ]

    def _cost_lines(self) -> list[Line]:
        memory = self._pair(lambda run: run.record.get("memory_mib") or {})
        lines = []
        for key, words in (
            ("largest", "memory of the largest rank, MiB"),
            ("sum", "  of all ranks"),
        ):
            values = memory[0].get(key), memory[1].get(key)
            lines.append(Line(words, values, _ratio(values)))
        parts = mean_parts(self.counted[0]), mean_parts(self.counted[1])
        if parts[0] and parts[1]:
            sums = sum(parts[0].values()), sum(parts[1].values())
            lines.append(Line("time of a step, ms", sums, _ratio(sums)))
            for name in PARTS:
                words = f"  {PART_WORDS.get(name, name)}"
                lines.append(Line(words, (parts[0][name], parts[1][name])))
        first = self._pair(lambda run: run.record.get("first_step_seconds"))
        lines.append(Line("first step, with compilation, s", first))
        return lines

    def as_json(self) -> dict[str, Any]:
        """The whole of it as plain values, for `report.json`."""
        curves = self.curves
        return {
            "schema": 1,
            "state": "finished",
            "name": self.config.name,
            "verdict": self.verdict,
            "same": self.same,
            "faster": None if self.faster is None else self.runs[self.faster].backend,
            "curves": curves
            and {
                "margin": CURVE_MARGIN,
                "margin_steps": CURVE_STEPS,
                "largest": curves.largest,
                "at": curves.at,
                "early": curves.early,
            },
            "rounds": [
                {
                    "number": r.number,
                    "ratio": r.ratio,
                    "tokens_per_second": self._by_backend(r.speeds),
                }
                for r in self.rounds
            ],
            "table": [
                {
                    "quantity": line.quantity.strip(),
                    "values": self._by_backend(line.values),
                    "compared": line.compared,
                }
                for line in self.table
            ],
            "slices": [asdict(s) for s in self.slices],
            "warnings": self.warnings,
            "config": self.config.model_dump(mode="json"),
            "runs": self._by_backend((self.runs[0].record, self.runs[1].record)),
        }

    def _by_backend(self, pair: tuple[Any, Any]) -> dict[str, Any]:
        return {self.runs[0].backend: pair[0], self.runs[1].backend: pair[1]}


def cell(line: Line, which: int) -> str:
    """A value of the table as text, without alignment."""
    value = line.values[which]
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return digits(value) if line.decimals is None else f"{value:,.{line.decimals}f}"


def aligned(cells: Sequence[str], figure: str = " ", point: str = " ") -> list[str]:
    """Cells padded on the right so that, set flush right, their decimal points stand below each
    other. `figure` and `point` are spaces as wide as a digit and as a point."""
    tails = [len(text.partition(".")[2]) if _is_number(text) else 0 for text in cells]
    widest = max(tails, default=0)
    return [
        text + (point if tail == 0 and widest else "") + figure * (widest - tail)
        for text, tail in zip(cells, tails, strict=True)
    ]


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "", 1).isdigit()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def digits(value: float) -> str:
    """A value with three significant digits, or all of those before the point."""
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(places, 0), 5)}f}"


def _difference(values: tuple[float | None, float | None]) -> str:
    if values[0] is None or values[1] is None:
        return ""
    apart = abs(values[0] - values[1])
    return f"difference {apart:.1e}" if apart else "equal"


def _ratio(values: tuple[float | None, float | None]) -> str:
    return f"ratio {values[0] / values[1]:.2f}" if values[0] and values[1] else ""
