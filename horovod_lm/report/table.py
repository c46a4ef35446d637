"""The table of a comparison: its rows, and how their values are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from horovod_lm.report.runs import PARTS, Row, Run

if TYPE_CHECKING:
    from horovod_lm.report.results import Comparison

_WORDS = {"ratio": "ratio to the first", "difference": "difference to the first"}
PART_WORDS = {"forward_backward": "forward and backward", "reduce": "reduce (with waiting)"}


@dataclass(frozen=True)
class Line:
    """A row of the table: a value for each run (text where it is no plain number), and what is
    said of each run but the first against the first.

    `decimals` is None for three significant digits. `minor`: what is compared is left out where it
    would need a row of its own.
    """

    quantity: str
    values: tuple[float | str | None, ...]
    compared: tuple[str, ...] = ()
    decimals: int | None = None
    minor: bool = False


def make_table(comparison: Comparison) -> list[Line]:
    """The rows for all runs."""
    return [
        *_loss_lines(comparison),
        *_speed_lines(comparison),
        *_part_lines(comparison),
        *_kind_lines(comparison),
        *_cost_lines(comparison),
    ]


def expanded(lines: Sequence[Line], runs: int) -> list[Line]:
    """The rows as they are for two runs. For more of them there is no room at the end of a row:
    what is compared stands in a row of its own below it."""
    if runs <= 2:
        return list(lines)
    found = []
    for line in lines:
        found.append(replace(line, compared=()))
        if any(line.compared) and not line.minor:
            word = next((w for w in _WORDS if any(w in text for text in line.compared)), "")
            texts = [text.removeprefix(f"{word} ") for text in line.compared]
            found.append(Line(f"  {_WORDS.get(word, 'against the first')}", ("", *texts)))
    return found


def _loss_lines(comparison: Comparison) -> list[Line]:
    loss = _all(comparison, lambda run: run.steps[-1]["loss"] if run.steps else None)
    validation = _all(comparison, lambda run: run.record.get("validation_loss"))
    shares = _all(comparison, _share)
    lines = [Line("loss of the last step, nats", loss, _differences(loss), 4)]
    lines += _named_lines(comparison, lambda run: run.steps)
    curves = [comparison.curves(which) for which in comparison.others]
    if any(curves):
        texts = [_apart(found.largest) if found else "–" for found in curves]
        lines.append(Line("loss curves, largest difference", ("", *texts)))
    lines += [
        Line("validation loss, nats per token", validation, _differences(validation), 4),
        *_named_lines(comparison, lambda run: run.evaluations),
        Line("  share of the unigram entropy", shares, (), 3),
        *_accuracy_lines(comparison),
    ]
    if len(comparison.seeds) > 1:
        lines += _seeds_lines(comparison)
    return lines


def _named_lines(comparison: Comparison, rows: Callable[[Run], list[Row]]) -> list[Line]:
    """Each loss of the last of `rows`, where there are several."""
    last = [(rows(run) or [{}])[-1].get("losses") or {} for run in comparison.runs]
    names = dict.fromkeys(name for losses in last for name in losses)
    if len(names) < 2:
        return []
    lines = []
    for name in names:
        values = tuple(losses.get(name) for losses in last)
        lines.append(Line(f"  {name}", values, _differences(values), 4))
    return lines


def _accuracy_lines(comparison: Comparison) -> list[Line]:
    """The share of targets that the last evaluation had first, of each of several losses or of one
    over sequences: of tokens alone the loss says more."""
    last = [(run.evaluations or [{}])[-1] for run in comparison.runs]
    names = dict.fromkeys(name for row in last for name in row.get("accuracies") or {})
    if len(names) < 2 and any(row.get("perplexities") for row in last):
        return []
    lines = []
    for name in names:
        values = tuple((row.get("accuracies") or {}).get(name) for row in last)
        lines.append(Line(f"  accuracy of {name}", values, _differences(values), 3))
    return lines


def _apart(largest: float) -> str:
    return f"{largest:.1e}" if largest else "equal"


def _share(run: Run) -> float | None:
    """Validation loss / unigram entropy."""
    validation, entropy = (run.record.get(k) for k in ("validation_loss", "unigram_entropy"))
    return validation / entropy if validation is not None and entropy else None


def _seeds_lines(comparison: Comparison) -> list[Line]:
    means: list[float | None] = []
    for which in range(len(comparison.runs)):
        finals = [runs[which].final_loss for runs in comparison.seeds]
        known = [loss for loss in finals if loss is not None]
        means.append(sum(known) / len(known) if len(known) == len(finals) else None)
    tests = [comparison.equivalence(which) for which in comparison.others]
    lines = [
        Line(
            f"final loss, mean of {len(comparison.seeds)} seeds",
            tuple(means),
            tuple("–" if test is None else f"difference {test.mean:+.1e}" for test in tests),
            4,
        )
    ]
    if known_tests := [test for test in tests if test is not None]:
        level = 100 * known_tests[0].interval.level
        spans = [
            "–" if t is None else f"{t.interval.low:+.1e} to {t.interval.high:+.1e}" for t in tests
        ]
        words = f"  {level:.0f}% interval of the difference"
        lines.append(Line(words, ("",) * len(comparison.runs), tuple(spans)))
    return lines


def _speed_lines(comparison: Comparison) -> list[Line]:
    runs = range(len(comparison.runs))
    if not comparison.rounds:
        return [Line("tokens per second", (None,) * len(runs), ("no rounds",) * (len(runs) - 1))]
    speeds = [found for i in runs if (found := comparison.speed(i))]
    ratios = [found for i in comparison.others if (found := comparison.ratio(i))]
    level = f"{100 * speeds[0][1].level:.0f}%"
    spans = [f"{digits(interval.low)}–{digits(interval.high)}" for _, interval in speeds]
    return [
        Line(
            f"tokens/s, median of {count(len(comparison.rounds), 'round')}",
            tuple(median for median, _ in speeds),
            tuple(f"ratio {median:.2f}" for median, _ in ratios),
        ),
        Line(
            f"  {level} interval",
            tuple(spans),
            tuple(f"{interval.low:.2f}–{interval.high:.2f}" for _, interval in ratios),
        ),
    ]


def _part_lines(comparison: Comparison) -> list[Line]:
    parts = comparison.parts
    if not any(parts):
        return []
    sums = tuple(sum(part.values()) if part else None for part in parts)
    lines = [Line("time of a step, ms", sums, _ratios(sums))]
    for name in PARTS:
        values = tuple(part[name] if part else None for part in parts)
        lines.append(Line(f"  {PART_WORDS.get(name, name)}", values))
    return lines


def _kind_lines(comparison: Comparison) -> list[Line]:
    """Time of a step by kind of operation, from the profiles of those runs that have one."""
    profiles = comparison.profiles
    if not any(profiles):
        return []
    whole = tuple(profile["step_ms"] if profile else None for profile in profiles)
    lines = [Line("step in the profile, ms", whole, _gaps(whole))]
    kinds = dict.fromkeys(kind for profile in profiles if profile for kind in profile["kinds"])
    for kind in kinds:
        found = [profile["kinds"].get(kind) if profile else None for profile in profiles]
        values = tuple(entry["ms"] if entry else None for entry in found)
        lines.append(Line(f"  {kind}", values, _gaps(values), minor=True))
        shares = [entry.get("ceiling_share") if entry else None for entry in found]
        if any(share is not None for share in shares):
            texts = tuple("–" if share is None else f"{100 * share:.0f}%" for share in shares)
            lines.append(Line("    share of the ceiling", texts))
    return lines


def _cost_lines(comparison: Comparison) -> list[Line]:
    memory = _all(comparison, lambda run: run.record.get("memory_mib") or {})
    lines = []
    for key, words in (("largest", "memory of the largest rank, MiB"), ("sum", "  of all ranks")):
        values = tuple(entry.get(key) for entry in memory)
        lines.append(Line(words, values, _ratios(values), minor=key == "sum"))
    first = _all(comparison, lambda run: run.record.get("first_step_seconds"))
    if comparison.starts:
        together = (f"{digits(comparison.together or 0)} s together",)
        texts = together if len(comparison.runs) == 2 else ()
        lines.append(Line("start to the first step, s", tuple(comparison.starts), texts))
        lines.append(Line("  first step, with compilation, s", first))
    else:
        lines.append(Line("first step, with compilation, s", first))
    return lines


def _all(comparison: Comparison, get: Callable[[Run], Any]) -> tuple[Any, ...]:
    return tuple(get(run) for run in comparison.runs)


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


def count(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def digits(value: float) -> str:
    """A value with three significant digits, or all of those before the point."""
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(places, 0), 5)}f}"


def _differences(values: Sequence[float | None]) -> tuple[str, ...]:
    first = values[0]
    return tuple(
        "" if first is None or v is None else f"difference {abs(v - first):.1e}" if v != first
        else "equal"
        for v in values[1:]
    )  # fmt: skip


def _ratios(values: Sequence[float | None]) -> tuple[str, ...]:
    """Each value / the first."""
    first = values[0]
    return tuple(f"ratio {v / first:.2f}" if v and first else "" for v in values[1:])


def _gaps(values: Sequence[float | None]) -> tuple[str, ...]:
    """Each value - the first, in ms."""
    first = values[0]
    return tuple("" if first is None or v is None else f"{v - first:+.1f} ms" for v in values[1:])
