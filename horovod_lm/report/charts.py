"""The charts of the comparison page, as SVG whose colours follow the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from horovod_lm.report.curves import MARGIN
from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import PARTS, mean_parts
from horovod_lm.report.table import PART_WORDS, digits

# Okabe and Ito's blue and vermillion: told apart by colour-blind eyes and, by lightness, in print.
COLOURS = ("#0072b2", "#d55e00")
_INK, _FAINT, _PAPER = "#010101", "#020202", "#030303"  # stand-ins that `_themed` replaces
_THEME = {
    COLOURS[0]: "var(--first, #0072b2)",
    COLOURS[1]: "var(--second, #d55e00)",
    _INK: "var(--ink, #222222)",
    _FAINT: "var(--faint, #cccccc)",
    _PAPER: "var(--paper, #ffffff)",
}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and needs no font in the page
    "svg.hashsalt": "horovod_lm",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "hatch.color": _PAPER,
    "hatch.linewidth": 1.2,
}
_SIZE = (5.4, 3.3)  # inches of 72 units: about as many pixels as a phone is wide
_POINTS = 800  # of a thinned curve
_FLOOR = 1e-8  # the log axis has no zero


@dataclass(frozen=True)
class Chart:
    """One question and its picture. `hover` says where which values are, for the page's script:
    `axes` are left, top, right, bottom as shares of the picture."""

    identity: str
    title: str
    svg: str
    note: str
    hover: dict[str, Any] | None = None


def charts(comparison: Comparison) -> list[Chart]:
    """All charts that the runs have figures for."""
    makers: list[Callable[[Comparison], Chart | None]] = [_losses, _apart, _rounds, _parts]
    with matplotlib.rc_context(_STYLE):
        return [chart for make in makers if (chart := make(comparison)) is not None]


def thin(steps: Sequence[int], series: Sequence[Sequence[float]], points: int) -> list[int]:
    """Indices of about `points` steps that keep every visible peak: the lowest and the highest of
    each series in each of equally wide bins, and both ends."""
    count = len(steps)
    if count <= points:
        return list(range(count))
    bins = max(1, points // (2 * len(series)))
    kept = {0, count - 1}
    for number in range(bins):
        inside = range(count * number // bins, count * (number + 1) // bins)
        for values in series:
            kept |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
    return sorted(kept)


def _losses(comparison: Comparison) -> Chart | None:
    curves = comparison.curves(1)
    if curves is None:
        return None
    all_losses = [[run.losses[s] for s in curves.steps] for run in comparison.runs]
    kept = thin(curves.steps, all_losses, _POINTS)
    steps = [curves.steps[i] for i in kept]
    losses = [[values[i] for i in kept] for values in all_losses]
    figure, axes = _axes("step", "loss, nats per token")
    axes.plot(steps, losses[0], color=COLOURS[0], linewidth=4, alpha=0.45)
    axes.plot(steps, losses[1], color=COLOURS[1], linewidth=1.3, dashes=(4, 2))
    ends = [(comparison.names[i], losses[i][-1], COLOURS[i]) for i in (0, 1)]
    for i, run in enumerate(comparison.runs):
        points = [(e["step"], e["loss"]) for e in run.evaluations if e["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "os"[i], color=COLOURS[i], fillstyle="none")
    entropy = comparison.runs[0].record.get("unigram_entropy")
    if entropy:
        axes.axhline(entropy, color=_INK, linewidth=0.8, linestyle=":")
        ends.append(("unigram entropy", entropy, _INK))
    _label_ends(axes, ends)
    words = f"Loss of {comparison.names[0]} and {comparison.names[1]} by step"
    svg = _svg(figure, "losses", words)
    hover = _hover(axes, "step", steps, dict(zip(comparison.names, losses, strict=True)))
    return Chart(
        "losses",
        "Do the losses coincide?",
        svg,
        f"Training loss of every step: {comparison.names[0]} broad, {comparison.names[1]} dashed "
        f"on top of it. Circles and squares: loss on the validation documents.",
        hover,
    )


def _apart(comparison: Comparison) -> Chart | None:
    curves = comparison.curves(1)
    if curves is None:
        return None
    kept = thin(curves.steps, [curves.differences], _POINTS // 2)
    steps = [curves.steps[i] for i in kept]
    differences = [curves.differences[i] for i in kept]
    thinned = ""
    if len(kept) < len(curves.steps):
        thinned = " Of a run this long, the least and the most of each stretch are drawn."
    figure, axes = _axes("step", "|difference|, nats")
    # Dots: equal losses, at the floor, stand between others, and a line would be all spikes.
    axes.semilogy(steps, [max(d, _FLOOR) for d in differences], ".", color=_INK, markersize=4)
    ends = []
    if comparison.same is not None:
        axes.axhline(MARGIN, color=_INK, linewidth=0.8, linestyle=":")
        ends.append(("margin", MARGIN, _INK))
    _label_ends(axes, ends)
    return Chart(
        "apart",
        "How far apart are they?",
        _svg(
            figure, "apart", "Absolute difference of the two losses by step, on a logarithmic axis"
        ),
        f"Farthest apart at step {curves.at}: {curves.largest:.1e} nats. Differences below "
        f"{_FLOOR:.0e} are drawn at it.{thinned}",
        _hover(axes, "step", steps, {"difference": differences}),
    )


def _rounds(comparison: Comparison) -> Chart | None:
    rounds = comparison.rounds
    if not rounds:
        return None
    numbers = [r.number + 1 for r in rounds]
    figure, axes = _axes("round", "tokens per second")
    speeds = [[r.speeds[i] for r in rounds] for i in (0, 1)]
    for i in (0, 1):
        axes.plot(numbers, speeds[i], "os"[i] + "-", color=COLOURS[i], linewidth=1.5)
        axes.lines[-1].set_linestyle("-" if i == 0 else "--")
    axes.set_ylim(0, 1.1 * max(map(max, speeds)))
    _label_ends(axes, [(comparison.names[i], speeds[i][-1], COLOURS[i]) for i in (0, 1)])
    return Chart(
        "rounds",
        "Which one is faster, round by round?",
        _svg(figure, "rounds", "Tokens per second of both backends in each round"),
        "Of all ranks together. The two take turns within a round, so a machine that drifts "
        "slows both.",
        _hover(axes, "round", numbers, dict(zip(comparison.names, speeds, strict=True))),
    )


def _parts(comparison: Comparison) -> Chart | None:
    means = [mean_parts(rows) for rows in comparison.counted]
    if means[0] is None or means[1] is None:
        return None
    figure, axes = _axes("ms of a step", "")
    names = ["whole step", *PARTS]
    for i, parts in enumerate((means[0], means[1])):
        values = [sum(parts.values()), *(parts[name] for name in PARTS)]
        places = [row + (0.2 if i else -0.2) for row in range(len(names))]
        bars = axes.barh(places, values, 0.36, color=COLOURS[i], hatch="//" if i else None)
        axes.bar_label(bars, [digits(v) for v in values], padding=3, fontsize=9)
        axes.annotate(
            comparison.names[i],
            (values[0], places[0]),
            (34, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[i],
        )
    axes.set_yticks(range(len(names)), [PART_WORDS.get(name, name) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.5 * max(sum(m.values()) for m in means if m))
    return Chart(
        "parts",
        "Where does a step’s time go?",
        _svg(figure, "parts", "Milliseconds of a step by part, for both backends"),
        "Mean of the steps that were timed with synchronisation, every tenth. The parts add up to "
        "the whole step; reduce has the wait for the slowest rank in it.",
    )


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure, axes


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write each series' name at its right end, moved apart where they would overlap."""
    axes.margins(x=0.02)
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    places = [
        axes.transAxes.inverted().transform(axes.transData.transform((0, y)))[1] for _, y, _ in ends
    ]
    order = sorted(range(len(ends)), key=places.__getitem__)
    gap, previous = 0.075, -1.0
    for index in order:
        previous = max(places[index], previous + gap)
        text, _, colour = ends[index]
        axes.annotate(
            text, (1.01, previous), xycoords="axes fraction", va="center", color=colour, fontsize=10
        )
    axes.set_ylim(low, high)


def _hover(
    axes: Axes, word: str, x: Sequence[int], series: dict[str, Sequence[float]]
) -> dict[str, Any]:
    """Where the values are in a figure that has been drawn: drawing lays it out."""
    box, limits = axes.get_position(), axes.get_xlim()
    return {
        "word": word,
        "axes": [round(v, 4) for v in (box.x0, 1 - box.y1, box.x1, 1 - box.y0)],
        "limits": [round(float(v), 3) for v in limits],
        "x": list(x),
        "series": {
            name: [float(f"{value:.6g}") for value in values] for name, values in series.items()
        },
    }


def _svg(figure: Figure, identity: str, description: str) -> str:
    """The figure as an `<svg>` element that scales, takes the page's colours, and has identities
    of its own, since several stand in one page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(
        r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{description}"', text
    )
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{identity}-", text)
    for stand_in, colour in _THEME.items():
        text = re.sub(stand_in, colour, text, flags=re.IGNORECASE)
    return text
