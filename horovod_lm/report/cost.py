"""The charts of what the runs cost: speed, the time of a step by part and by kind, memory."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain

from horovod_lm.report.drawing import (
    INK,
    Chart,
    colour,
    draw_interval,
    finish,
    label_ends,
    line_style,
    make_axes,
    make_rows,
    marker,
)
from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import PARTS
from horovod_lm.report.table import PART_WORDS, count, digits
from horovod_lm.report.verdict import kind_ms

_HATCHES = (None, "//", "\\\\", "--", "xx", "||")  # of bars, for print without colours


def chart_of_ratios(comparison: Comparison) -> Chart | None:
    """Speed / the baseline's: every round, and the interval."""
    found = {i: ratio for i in comparison.others if (ratio := comparison.ratio(i))}
    if not found:
        return None
    first = comparison.names[0]
    figure, axes = make_rows(comparison.names, list(found), f"speed / speed of {first}")
    ratios = {i: [r.speeds[i] / r.speeds[0] for r in comparison.rounds] for i in found}
    for row, (i, (median, interval)) in enumerate(found.items()):
        draw_interval(axes, row, median, interval, ratios[i], i)
    axes.axvline(1, color=INK, linewidth=0.8)
    level = 100 * next(iter(found.values()))[1].level
    return finish(
        figure,
        "ratios",
        "Which one is faster?",
        f"Tokens per second / those of {first} in the same round: a dot for each of "
        f"{count(len(comparison.rounds), 'round')}, their median, and its {level:.0f}% interval. "
        f"The line is at equal speed.",
        x="round",
        y=f"speed / speed of {first}",
        values=[r.number + 1 for r in comparison.rounds],
        series={comparison.names[i]: values for i, values in ratios.items()},
        scaled=False,
    )


def chart_of_rounds(comparison: Comparison) -> Chart | None:
    """Speed by round."""
    rounds = comparison.rounds
    if not rounds:
        return None
    numbers = [r.number + 1 for r in rounds]
    figure, axes = make_axes("round", "tokens per second")
    speeds = [[r.speeds[i] for r in rounds] for i in range(len(comparison.runs))]
    for i, values in enumerate(speeds):
        dashes = line_style(i, len(speeds)).get("linestyle", "-")
        axes.plot(numbers, values, marker(i), color=colour(i), linewidth=1.5, linestyle=dashes)
        if (found := comparison.speed(i)) is not None:
            axes.axhspan(found[1].low, found[1].high, color=colour(i), alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.1 * max(map(max, speeds)))
    label_ends(
        axes,
        [
            (n, s[-1], colour(i))
            for i, (n, s) in enumerate(zip(comparison.names, speeds, strict=True))
        ],
    )
    return finish(
        figure,
        "rounds",
        "Did the speeds hold from round to round?",
        "Of all ranks together. All take turns within a round, so a machine that drifts slows all. "
        "Bands: intervals of the medians.",
        x="round",
        y="tokens per second",
        values=numbers,
        series=dict(zip(comparison.names, speeds, strict=True)),
    )


def chart_of_speeds(comparison: Comparison) -> Chart | None:
    """Of runs that did not take turns: each run's own speed."""
    found = {i: s for i in range(len(comparison.runs)) if (s := comparison.speed(i))}
    if comparison.rounds or not found:
        return None
    figure, axes = make_rows(comparison.names, list(found), "tokens per second")
    for row, (i, (median, interval)) in enumerate(found.items()):
        draw_interval(axes, row, median, interval, (), i)
    axes.set_xlim(0, 1.1 * max(interval.high for _, interval in found.values()))
    level = 100 * next(iter(found.values()))[1].level
    return finish(
        figure,
        "speeds",
        "How fast was each run, in its own time?",
        f"Median over stretches of the run, and its {level:.0f}% interval. The runs did not take "
        f"turns on the machine, so this does not say which one is faster.",
        x="run",
        y="tokens per second",
        values=[comparison.names[i] for i in found],
        series={
            "median": [median for median, _ in found.values()],
            "low": [interval.low for _, interval in found.values()],
            "high": [interval.high for _, interval in found.values()],
        },
        scaled=False,
    )


def chart_of_parts(comparison: Comparison) -> Chart | None:
    """Time of a step by part."""
    means = {i: part for i, part in enumerate(comparison.parts) if part}
    if not means:
        return None
    groups = {
        "whole step": [sum(part.values()) for part in means.values()],
        **{PART_WORDS.get(n, n): [part[n] for part in means.values()] for n in PARTS},
    }
    return _bars(
        comparison,
        list(means),
        groups,
        "parts",
        "Where does a step’s time go?",
        "Mean of the steps that were timed with synchronisation, every tenth. The parts add up to "
        "the whole step; reduce has the wait for the slowest rank in it.",
        "ms of a step",
    )


def chart_of_kinds(comparison: Comparison) -> Chart | None:
    """Time of a step by kind of operation, from the profiles."""
    profiles = {i: profile for i, profile in enumerate(comparison.profiles) if profile}
    if not profiles:
        return None
    kinds = dict.fromkeys(chain.from_iterable(p["kinds"] for p in profiles.values()))
    groups = {kind: [kind_ms(profile, kind) for profile in profiles.values()] for kind in kinds}
    spans = "; ".join(
        f"{comparison.names[i]}, steps {p['steps'][0]} to {p['steps'][1]}"
        for i, p in profiles.items()
    )
    return _bars(
        comparison,
        list(profiles),
        groups,
        "kinds",
        "Which operations take the time?",
        f"Time of a step by kind of operation, from the frameworks’ own profilers ({spans}). A "
        f"profile slows a step, so these times are for comparing kinds, not for speed.",
        "ms of a step",
    )


def chart_of_memory(comparison: Comparison) -> Chart | None:
    """Peak memory."""
    found = {i: m for i, run in enumerate(comparison.runs) if (m := run.record.get("memory_mib"))}
    if not found:
        return None
    groups = {"largest rank": [m["largest"] for m in found.values()]}
    if any(m["sum"] != m["largest"] for m in found.values()):
        groups["all ranks"] = [m["sum"] for m in found.values()]
    return _bars(
        comparison,
        list(found),
        groups,
        "memory",
        "How much memory does it take?",
        "Peak of resident memory by the end of the run. In the sum, memory that ranks share counts "
        "for each of them.",
        "MiB",
    )


def _bars(
    comparison: Comparison,
    which: Sequence[int],
    groups: Mapping[str, Sequence[float]],
    identity: str,
    title: str,
    note: str,
    unit: str,
) -> Chart:
    """Bars of some runs in groups, with their values; the first group names the runs."""
    runs = len(which)
    figure, axes = make_axes(
        unit, "", height=0.75 + len(groups) * (0.14 + 0.185 * runs), whole=False
    )
    height = 0.84 / runs
    largest = max(map(max, groups.values()))
    for place, i in enumerate(which):
        values = [group[place] for group in groups.values()]
        places = [row + (place - (runs - 1) / 2) * height for row in range(len(groups))]
        bars = axes.barh(
            places,
            values,
            0.9 * height,
            color=colour(i),
            hatch=_HATCHES[place % len(_HATCHES)],
        )
        axes.bar_label(bars, [digits(v) for v in values], padding=3, fontsize=10)
        # The name goes where the row has most room: beside the group's longest bar.
        row = max(range(len(groups)), key=lambda r: max(list(groups.values())[r]))
        axes.annotate(
            comparison.names[i],
            (values[row], places[row]),
            (10 + 6.2 * len(digits(values[row])), 0),
            textcoords="offset points",
            va="center",
            color=colour(i),
            fontsize=11,
        )
    axes.set_yticks(range(len(groups)), ["\n".join(textwrap.wrap(g, 20)) for g in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.02 * largest)
    return finish(
        figure,
        identity,
        title,
        note,
        x="",
        y=unit,
        values=list(groups),
        series={
            comparison.names[i]: [group[place] for group in groups.values()]
            for place, i in enumerate(which)
        },
        scaled=False,
    )
