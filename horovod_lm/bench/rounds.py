"""Contestants measured in turns, so that a machine's drift hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from horovod_lm.statistics import Interval, bootstrap, ratio


@dataclass(frozen=True)
class Sample:
    """What one turn did: `units` (tokens, bytes, operations, …) in `seconds`."""

    seconds: float
    units: float

    @property
    def rate(self) -> float:
        """Units a second."""
        return self.units / self.seconds


class Contestant(Protocol):
    """Something whose rate is measured. Between its turns it must cost no CPU time."""

    label: str

    def run(self, seconds: float) -> Sample:
        """Work for about that long, warm, and say how much was done in what time."""


@dataclass
class Repeated:
    """A contestant in this process: `function` again and again, each time `units` of work."""

    label: str
    function: Callable[[], object]
    units: float = 1.0

    def run(self, seconds: float) -> Sample:
        """Call it at least once, and until `seconds` have passed."""
        calls, begin = 0, time.perf_counter()
        while True:
            self.function()
            calls += 1
            passed = time.perf_counter() - begin
            if passed >= seconds:
                return Sample(passed, calls * self.units)


@dataclass
class Rounds:
    """The samples of each contestant, one a round, by its label."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def rates(self, label: str) -> list[float]:
        """Units a second in each round."""
        return [sample.rate for sample in self.samples[label]]

    def rate(self, label: str) -> float:
        """The median of the rounds, units a second."""
        return statistics.median(self.rates(label))

    def interval(self, label: str) -> Interval:
        """The bootstrap interval of `rate`."""
        return bootstrap(self.rates(label))

    def ratio(self, first: str, second: str, factor: float = 1.0) -> tuple[float, Interval]:
        """The median of the rounds' paired ratios, factor x rate of first / rate of second, and
        its bootstrap interval."""
        scaled = [factor * rate for rate in self.rates(first)]
        return ratio(scaled, self.rates(second))

    def fastest(self, labels: Sequence[str]) -> str:
        """The label with the highest rate."""
        return max(labels, key=self.rate)


def interleave(
    contestants: Sequence[Contestant],
    rounds: int,
    seconds: float,
    progress: Callable[[str, Sample], None] = lambda label, sample: None,
) -> Rounds:
    """Let each contestant run `seconds` in each of `rounds` rounds, in alternating order (A B,
    B A, …), so that a steady drift favours none. `progress` is called after each turn."""
    result = Rounds({contestant.label: [] for contestant in contestants})
    assert len(result.samples) == len(contestants), "labels must differ"
    for number in range(rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            sample = contestant.run(seconds)
            result.samples[contestant.label].append(sample)
            progress(contestant.label, sample)
    return result
