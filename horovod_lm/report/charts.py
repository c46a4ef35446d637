"""The charts of a comparison's page: each answers one question, which is its title."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from horovod_lm.report.curves import MARGIN
from horovod_lm.report.drawing import (
    FLOOR,
    INK,
    MARKERS,
    POINTS,
    Chart,
    colour,
    finish,
    label_ends,
    line_style,
    log_scale,
    make_axes,
    style,
    thin,
)
from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import PARTS
from horovod_lm.report.table import PART_WORDS, count, digits
from horovod_lm.report.weights import WHOLE, weight_drift
from horovod_lm.sketch import ERROR, SIZE
from horovod_lm.statistics import Interval

# Widths and opacities of the lines of layers, by depth.
_WIDTHS, _OPACITIES = (0.9, 1.6), (0.45, 1.0)
_HATCHES = (None, "//", "\\\\", "--", "xx", "||")  # of bars, for print without colours
_DOTS = 400  # of a chart of dots, which take more room than lines


def charts(comparison: Comparison) -> list[Chart]:
    """All charts that the runs have figures for."""
    makers: list[Callable[[Comparison], Chart | None]] = [
        _losses, _apart, _seeds, _norms, _scales,
    ]  # fmt: skip
    speed: list[Callable[[Comparison], Chart | None]] = [
        _ratios, _rounds, _speeds, _parts, _kinds, _memory,
    ]  # fmt: skip
    with style():
        found = [make(comparison) for make in makers]
        found += [_weights(comparison, which) for which in comparison.others]
        found += [make(comparison) for make in speed]
    return [chart for chart in found if chart is not None]


# The same training?


def _losses(comparison: Comparison) -> Chart | None:
    losses = [run.losses for run in comparison.runs]
    steps, values = _by_step(losses)
    if not steps:
        return None
    figure, axes = make_axes("step", "loss, nats per token")
    _draw_lines(axes, steps, values)
    ends = _ends(comparison, values)
    for i, run in enumerate(comparison.runs):
        points = [(e["step"], e["loss"]) for e in run.evaluations if e["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), _marker(i), color=colour(i), fillstyle="none")
    entropy = comparison.runs[0].record.get("unigram_entropy")
    if entropy:
        axes.axhline(entropy, color=INK, linewidth=0.8, linestyle=":")
        ends.append(("unigram entropy", entropy, INK))
    label_ends(axes, ends)
    return finish(
        figure,
        "losses",
        "Do the losses coincide?",
        f"Training loss of every step{_layers_of_lines(comparison)} Hollow marks: loss on the "
        f"validation documents.",
        x="step",
        y="loss, nats per token",
        values=steps,
        series=dict(zip(comparison.names, values, strict=True)),
    )


def _apart(comparison: Comparison) -> Chart | None:
    found = {
        i: c for i in comparison.others if (c := comparison.curves(i, _against(comparison, i)))
    }
    steps, values = _by_step(
        [dict(zip(c.steps, c.differences, strict=True)) for c in found.values()], _DOTS
    )
    if not steps:
        return None
    figure, axes = make_axes("step", "|difference|, nats")
    ends = []
    for i, differences in zip(found, values, strict=True):
        # Dots: equal losses, at the floor, stand between others, and a line would be all spikes.
        paint = INK if len(comparison.runs) == 2 else colour(i)
        size = 4 if len(steps) < 400 else 2.5
        axes.plot(steps, np.maximum(differences, FLOOR), ".", color=paint, markersize=size)
        if len(comparison.runs) > 2:
            ends.append((comparison.names[i], _end(np.maximum(differences, FLOOR)), paint))
    if any(comparison.judged(i) for i in found):
        axes.axhline(MARGIN, color=INK, linewidth=0.8, linestyle=":")
        ends.append(("margin", MARGIN, INK))
    log_scale(axes)
    label_ends(axes, ends)
    farthest = "; ".join(
        f"{comparison.names[i]}, {c.largest:.1e} nats at step {c.at}" for i, c in found.items()
    )
    firsts = dict.fromkeys(comparison.names[_against(comparison, i)] for i in found)
    whose = f"that of {next(iter(firsts))}"
    if len(firsts) > 1:
        whose = f"those of the first run that is meant to train the same ({', '.join(firsts)})"
    return finish(
        figure,
        "apart",
        "How far apart are they?",
        f"Difference of the training losses to {whose}. At the farthest: {farthest}. Differences "
        f"below {FLOOR:.0e} are drawn at it.",
        x="step",
        y="|difference|, nats",
        values=steps,
        series={comparison.names[i]: v for i, v in zip(found, values, strict=True)},
    )


def _seeds(comparison: Comparison) -> Chart | None:
    """The differences of the final losses over the seeds, with the equivalence interval."""
    tests = {i: test for i in comparison.others if (test := comparison.equivalence(i))}
    if not tests:
        return None
    apart = {
        i: [
            b - a
            for runs in comparison.seeds
            if (a := runs[0].final_loss) is not None and (b := runs[i].final_loss) is not None
        ]
        for i in tests
    }
    margin = comparison.margin
    figure, axes = _rows(comparison, list(tests), "difference of the final losses, nats")
    for row, (i, test) in enumerate(tests.items()):
        _interval(axes, row, test.mean, test.interval, apart[i], i)
    for side in (-margin, margin):
        axes.axvline(side, color=INK, linewidth=0.8, linestyle=":")
    axes.axvline(0, color=INK, linewidth=0.8)
    level = 100 * next(iter(tests.values())).interval.level
    return finish(
        figure,
        "seeds",
        "Do they end at the same loss, whatever the seed?",
        f"Final loss − that of {comparison.names[0]} with the same seed: a dot for each of "
        f"{len(comparison.seeds)} seeds, their mean, and its {level:.0f}% interval. They are the "
        f"same where the interval lies within the dotted margin of ±{margin:g} nats.",
        x="seed",
        y="difference of the final losses, nats",
        values=list(range(1, len(comparison.seeds) + 1)),
        series={comparison.names[i]: found for i, found in apart.items()},
        scaled=False,
    )


def _norms(comparison: Comparison) -> Chart | None:
    norms = [
        {r["step"]: r["norm"] for r in run.steps if r["norm"] is not None}
        for run in comparison.runs
    ]
    steps, values = _by_step(norms)
    if not steps:
        return None
    figure, axes = make_axes("step", "gradient norm")
    _draw_lines(axes, steps, values)
    known = np.concatenate(values)
    known = known[~np.isnan(known)]
    if known.min() > 0 and known.max() > 10 * known.min():
        log_scale(axes)
    else:
        axes.set_ylim(0, 1.05 * known.max())
    label_ends(axes, _ends(comparison, values))
    return finish(
        figure,
        "norms",
        "Do the gradients coincide?",
        f"Global norm of the gradient, unscaled and before clipping{_layers_of_lines(comparison)}",
        x="step",
        y="gradient norm",
        values=steps,
        series=dict(zip(comparison.names, values, strict=True)),
    )


def _scales(comparison: Comparison) -> Chart | None:
    """The loss scale of the runs in fp16, with the steps that they skipped."""
    runs = {i: r for i, r in enumerate(comparison.runs) if r.steps and r.steps[0]["loss_scale"]}
    if not runs:
        return None
    steps, values = _by_step(
        [{r["step"]: r["loss_scale"] for r in run.steps} for run in runs.values()]
    )
    skipped = {i: [r["step"] for r in run.steps if r["overflow"]] for i, run in runs.items()}
    figure, axes = make_axes("step", "loss scale")
    _draw_lines(axes, steps, values, list(runs), drawstyle="steps-post")
    ends = _ends(comparison, values, list(runs))
    for i, run in runs.items():
        points = [(r["step"], r["loss_scale"]) for r in run.steps if r["overflow"]]
        if points:
            mark = "x" if i == min(runs) else "+"
            axes.plot(*zip(*points, strict=True), mark, color=colour(i), markersize=7)
    log_scale(axes, base=2)
    label_ends(axes, ends)
    told = "; ".join(
        f"{comparison.names[i]}, {count(len(found), 'step')}" for i, found in skipped.items()
    )
    series = {comparison.names[i]: v for i, v in zip(runs, values, strict=True)}
    for i, found in skipped.items():
        series[f"{comparison.names[i]}, skipped"] = np.isin(steps, found).astype(float)
    return finish(
        figure,
        "scales",
        "Which steps were skipped?",
        f"Loss scale of every step; crosses mark the steps whose gradient overflowed, which are "
        f"skipped: {told}.",
        x="step",
        y="loss scale",
        values=steps,
        series=series,
    )


def _weights(comparison: Comparison, which: int) -> Chart | None:
    """The drift of one run's weights from the baseline's, by layer."""
    first = _against(comparison, which)
    drift = weight_drift(comparison.runs[which], comparison.runs[first])
    if drift is None:
        return None
    kept = thin([np.array(values) for values in drift.layers.values()])
    steps = [drift.steps[i] for i in kept]
    layers = {n: np.maximum(np.array(v)[kept], FLOOR) for n, v in drift.layers.items()}
    figure, axes = make_axes("step", "‖difference‖ / ‖movement‖")
    blocks = [name for name in layers if "block" in name]
    ends = []
    for name, values in layers.items():
        kwargs: dict[str, Any] = {"linewidth": 1.4, "linestyle": (0, (1, 1.4))}
        if name == WHOLE:
            kwargs = {"linewidth": 4, "alpha": 0.35}
        elif name in blocks:
            depth = blocks.index(name) / max(1, len(blocks) - 1)
            kwargs = {
                key: low + depth * (high - low)
                for key, (low, high) in {"linewidth": _WIDTHS, "alpha": _OPACITIES}.items()
            }
        elif name == "embeddings":
            kwargs = {"linewidth": 1.4, "linestyle": (0, (5, 2))}
        axes.plot(
            steps, values, color=colour(which), marker="." if len(steps) < 3 else "", **kwargs
        )
        if name not in blocks[1:-1]:
            ends.append((name, float(values[-1]), colour(which)))
    log_scale(axes)
    label_ends(axes, ends)
    pair = f"{comparison.names[which]} and {comparison.names[first]}"
    many = len(comparison.runs) > 2
    return finish(
        figure,
        f"weights{which}",
        f"Do the weights of {pair} drift apart?" if many else "Do the weights drift apart?",
        f"Norm of the difference of the weights of {pair}, divided by how far those of "
        f"{comparison.names[first]} have moved since their start: at 1 they are as far apart as "
        f"training has taken them. The deeper the block, the stronger its line. Each norm is "
        f"estimated from {SIZE} sums, to within about {100 * ERROR:.0f}%.",
        x="step",
        y="‖difference‖ / ‖movement‖",
        values=steps,
        series=layers,
    )


# Which is faster?


def _ratios(comparison: Comparison) -> Chart | None:
    found = {i: ratio for i in comparison.others if (ratio := comparison.ratio(i))}
    if not found:
        return None
    first = comparison.names[0]
    figure, axes = _rows(comparison, list(found), f"speed / speed of {first}")
    ratios = {i: [r.speeds[i] / r.speeds[0] for r in comparison.rounds] for i in found}
    for row, (i, (median, interval)) in enumerate(found.items()):
        _interval(axes, row, median, interval, ratios[i], i)
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


def _rounds(comparison: Comparison) -> Chart | None:
    rounds = comparison.rounds
    if not rounds:
        return None
    numbers = [r.number + 1 for r in rounds]
    figure, axes = make_axes("round", "tokens per second")
    speeds = [[r.speeds[i] for r in rounds] for i in range(len(comparison.runs))]
    for i, values in enumerate(speeds):
        dashes = line_style(i, len(speeds)).get("linestyle", "-")
        axes.plot(numbers, values, _marker(i), color=colour(i), linewidth=1.5, linestyle=dashes)
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


def _speeds(comparison: Comparison) -> Chart | None:
    """Of runs that did not take turns: each run's own speed."""
    found = {i: s for i in range(len(comparison.runs)) if (s := comparison.speed(i))}
    if comparison.rounds or not found:
        return None
    figure, axes = _rows(comparison, list(found), "tokens per second")
    for row, (i, (median, interval)) in enumerate(found.items()):
        _interval(axes, row, median, interval, (), i)
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


def _parts(comparison: Comparison) -> Chart | None:
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


def _kinds(comparison: Comparison) -> Chart | None:
    profiles = {i: run.profile for i, run in enumerate(comparison.runs) if run.profile}
    if not profiles:
        return None
    kinds = dict.fromkeys(chain.from_iterable(p["kinds"] for p in profiles.values()))
    groups = {
        kind: [p["kinds"].get(kind, {"ms": 0.0})["ms"] for p in profiles.values()] for kind in kinds
    }
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


def _memory(comparison: Comparison) -> Chart | None:
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


# What several charts share


def _against(comparison: Comparison, which: int) -> int:
    """The run that a run is compared with: the first that is meant to train the same, and the
    baseline where there is none."""
    twin = comparison.twin(which)
    return 0 if twin == which else twin


def _by_step(
    found: Sequence[Mapping[int, float]], points: int = POINTS
) -> tuple[list[int], list[np.ndarray]]:
    """All steps of any run and each run's values at them (nan for none), thinned."""
    steps = sorted(set(chain.from_iterable(found)))
    if not steps:
        return [], []
    values = [np.array([f.get(step, math.nan) for step in steps], np.float64) for f in found]
    kept = thin(values, points)
    return [steps[i] for i in kept], [v[kept] for v in values]


def _draw_lines(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[np.ndarray],
    which: Sequence[int] | None = None,
    **more: Any,
) -> None:
    """A line for each run; a step without a value is bridged."""
    for place, (i, found) in enumerate(zip(which or range(len(values)), values, strict=True)):
        there = ~np.isnan(found)
        look = line_style(place, len(values)) | {"color": colour(i)}
        marker = "." if there.sum() == 1 else ""
        axes.plot(np.array(steps)[there], found[there], marker=marker, **look, **more)


def _end(values: np.ndarray) -> float:
    """The last value that there is."""
    known = values[~np.isnan(values)]
    return float(known[-1]) if known.size else math.nan


def _ends(
    comparison: Comparison, values: Sequence[np.ndarray], which: Sequence[int] | None = None
) -> list[tuple[str, float, str]]:
    return [
        (comparison.names[i], _end(found), colour(i))
        for i, found in zip(which or range(len(values)), values, strict=True)
    ]


def _layers_of_lines(comparison: Comparison) -> str:
    """How lines that coincide can all be seen."""
    names = comparison.names
    if len(names) == 1:
        return "."
    others = f"{names[1]} dashed" if len(names) == 2 else "the others dashed"
    return f": {names[0]} broad, {others} on top of it."


def _marker(which: int) -> str:
    return MARKERS[which % len(MARKERS)]


def _rows(comparison: Comparison, which: Sequence[int], x: str) -> tuple[Any, Axes]:
    """Axes with a row for each of some runs."""
    figure, axes = make_axes(x, "", height=1.15 + 0.42 * len(which), whole=False)
    axes.set_yticks(range(len(which)), [_wrapped(comparison.names[i]) for i in which])
    for label, i in zip(axes.get_yticklabels(), which, strict=True):
        label.set_color(colour(i))
    axes.set_ylim(len(which) - 0.5, -0.5)
    axes.margins(x=0.06)
    axes.grid(axis="y", visible=False)
    return figure, axes


def _wrapped(name: str) -> str:
    return name.replace(", ", ",\n", 1) if len(name) > 20 else name


def _interval(
    axes: Axes, row: int, middle: float, interval: Interval, dots: Sequence[float], which: int
) -> None:
    """A middle value with its interval, and the single values behind it."""
    paint = colour(which)
    axes.plot([interval.low, interval.high], [row, row], color=paint, linewidth=3, alpha=0.5)
    axes.plot(dots, [row + 0.22] * len(dots), ".", color=paint, markersize=5, alpha=0.7)
    axes.plot([middle], [row], _marker(which), color=paint, markersize=8)


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
