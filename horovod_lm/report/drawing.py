"""How a chart is drawn: a style, labels at the ends, and an SVG whose colours follow the page."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from horovod_lm.statistics import Interval

# Okabe and Ito's colours, the light ones darkened until they can be read as text: told apart by
# colour-blind eyes, and each with the one that the page shows in the dark.
PALETTE = (
    ("#0072b2", "#56b4e9"),
    ("#c85200", "#f0883e"),
    ("#007a5a", "#35c49a"),
    ("#a04a86", "#e39cc8"),
    ("#7d6200", "#e6c34a"),
    ("#55606c", "#b8c2cc"),
)
INK = "#010101"  # stand-ins that `_themed` replaces
_FAINT, _PAPER = "#020202", "#030303"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.4)), (0, (7, 2, 1, 2)), (0, (2.5, 1.2)))
_MARKERS = "osD^vP"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and needs no font in the page
    "svg.hashsalt": "horovod_lm",
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.bottom": False,  # the grid says where the values are
    "ytick.left": False,
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "hatch.color": _PAPER,
    "hatch.linewidth": 1.2,
}
WIDTH, HEIGHT = 5.4, 3.4  # inches of 72 units: about as many pixels as a phone is wide
POINTS = 600  # of a thinned chart
FLOOR = 1e-9  # a log axis has no zero
_LABEL = 11


@dataclass(frozen=True)
class Chart:
    """One question and its picture. `data` are the values that are drawn, as the page keeps them:
    `x` and `y` (what the axes show), `values` along x, `series` (name -> values, null for none),
    and `plot` (for the page's cursor: `axes`, left, top, right and bottom as shares of the picture,
    and `limits` of x), null where x has no scale."""

    identity: str
    title: str
    svg: str
    note: str
    data: dict[str, Any]


def colour(which: int) -> str:
    """The colour of a run."""
    return PALETTE[which % len(PALETTE)][0]


def marker(which: int) -> str:
    """The mark of a run."""
    return _MARKERS[which % len(_MARKERS)]


def line_style(which: int, count: int) -> dict[str, Any]:
    """The first of several lines that may coincide is broad and pale; the others lie dashed on top
    of it, each with dashes of its own."""
    if which == 0 and count > 1:
        return {"color": colour(0), "linewidth": 4, "alpha": 0.45}
    dashes = _DASHES[1 + (which - 1) % (len(_DASHES) - 1)] if count > 1 else _DASHES[0]
    return {"color": colour(which), "linewidth": 1.5, "linestyle": dashes}


@contextmanager
def style() -> Iterator[None]:
    """Everything is drawn inside of it."""
    with matplotlib.rc_context(_STYLE):
        yield


def make_axes(x: str, y: str, height: float = HEIGHT, whole: bool = True) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, and what they show; `whole`: x counts something."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    # The page's font may be taller than the one that the layout is made with.
    figure.get_layout_engine().set(h_pad=6 / 72)  # type: ignore[union-attr, call-arg]
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(5 if whole else 4, integer=whole))
    axes.margins(x=0.02)
    if "second" in (x.split() + y.split()):  # speeds are in thousands
        (axes.yaxis if "second" in y else axes.xaxis).set_major_formatter("{x:,.0f}")
    return figure, axes


def make_rows(names: Sequence[str], which: Sequence[int], x: str) -> tuple[Figure, Axes]:
    """Axes with a row for each of some runs."""
    figure, axes = make_axes(x, "", height=1.15 + 0.42 * len(which), whole=False)
    axes.set_yticks(range(len(which)), [_wrapped(names[i]) for i in which])
    for label, i in zip(axes.get_yticklabels(), which, strict=True):
        label.set_color(colour(i))
    axes.set_ylim(len(which) - 0.5, -0.5)
    axes.margins(x=0.06)
    axes.grid(axis="y", visible=False)
    return figure, axes


def _wrapped(name: str) -> str:
    return name.replace(", ", ",\n", 1) if len(name) > 20 else name


def draw_interval(
    axes: Axes, row: int, middle: float, interval: Interval, dots: Sequence[float], which: int
) -> None:
    """A middle value with its interval, and the single values behind it."""
    paint = colour(which)
    axes.plot([interval.low, interval.high], [row, row], color=paint, linewidth=3, alpha=0.5)
    axes.plot(dots, [row + 0.22] * len(dots), ".", color=paint, markersize=5, alpha=0.7)
    axes.plot([middle], [row], marker(which), color=paint, markersize=8)


def log_scale(axes: Axes, base: int = 10) -> None:
    """Make y logarithmic, over whole powers: a part of a decade has no readable ticks."""
    axes.set_yscale("log", base=base)
    low, high = np.log(axes.get_ylim()) / math.log(base)
    axes.set_ylim(float(base) ** np.floor(low), float(base) ** np.ceil(high))
    axes.yaxis.set_major_formatter(lambda y, _: _power(base, round(math.log(y, base))))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _power(base: int, exponent: int) -> str:
    """`10⁻⁴`: one text that can be selected, where matplotlib's own would be letters apart."""
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"{base}{str(exponent).translate(raised)}"


def thin(series: Sequence[np.ndarray], points: int = POINTS) -> np.ndarray:
    """Indices of at most about `points` places that keep every visible peak: the lowest and the
    highest of each series in each of equally wide bins, and both ends. Without values: nan."""
    count = len(series[0])
    kept = np.arange(count)
    bins = points
    while len(kept) > points:
        bins //= 2
        edges = [count * i // bins for i in range(bins + 1)]
        found = {0, count - 1}
        for values in series:
            for begin, end in pairwise(edges):
                part = values[begin:end]
                if not np.isnan(part).all():
                    found |= {begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))}
        kept = np.array(sorted(found))
        if bins < 8:
            break
    return kept


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write each series' name (name, y, colour) at its right end, moved apart where they would
    overlap."""
    figure = axes.figure
    figure.canvas.draw()
    low, high = axes.get_ylim()
    known = [end for end in ends if np.isfinite(end[1])]
    texts = ["\n".join(textwrap.wrap(name, 20)) or name for name, _, _ in known]
    to_axes = axes.transAxes.inverted()
    line = 1.15 * _LABEL / 72 / (axes.get_position().height * figure.get_figheight())  # type: ignore[union-attr]
    sizes = [line * (text.count("\n") + 1) for text in texts]
    wanted = [to_axes.transform(axes.transData.transform((0, y)))[1] for _, y, _ in known]
    order = sorted(range(len(known)), key=wanted.__getitem__)
    places: dict[int, float] = {}
    bottom = -0.5
    for index in order:
        places[index] = max(wanted[index], bottom + sizes[index] / 2)
        bottom = places[index] + sizes[index] / 2
    top = 1.05
    for index in reversed(order):
        places[index] = min(places[index], top - sizes[index] / 2)
        top = places[index] - sizes[index] / 2
    for index, place in places.items():
        axes.annotate(
            texts[index],
            (1.015, place),
            xycoords="axes fraction",
            va="center",
            color=known[index][2],
            fontsize=_LABEL,
            linespacing=1.0,
        )
    axes.set_ylim(low, high)


def finish(
    figure: Figure,
    identity: str,
    title: str,
    note: str,
    *,
    x: str,
    y: str,
    values: Sequence[Any],
    series: Mapping[str, Sequence[float] | np.ndarray],
    scaled: bool = True,
) -> Chart:
    """The drawn figure as a chart; `scaled`: its x axis is one of numbers, over which the page may
    move a cursor."""
    svg = _svg(figure, identity, f"{title} {note}")
    axes = figure.axes[0]
    box, limits = axes.get_position(), axes.get_xlim()
    plot = {
        "axes": [round(v, 4) for v in (box.x0, 1 - box.y1, box.x1, 1 - box.y0)],
        "limits": [round(float(v), 3) for v in limits],
    }
    data = {
        "title": title,
        "x": x,
        "y": y,
        "values": [v.item() if isinstance(v, np.generic) else v for v in values],
        "series": {name: [_plain(value) for value in found] for name, found in series.items()},
        "plot": plot if scaled else None,
    }
    return Chart(identity, title, svg, note, data)


def _plain(value: float | None) -> float | None:
    """Six digits are more than can be seen; JSON has no nan."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")


def _svg(figure: Figure, identity: str, description: str) -> str:
    """The figure as an `<svg>` element that scales, takes the page's colours, and has identities
    of its own, since several stand in one page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
    label = re.sub(r'[<>&"]', "", description)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{label}"', text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{identity}-", text)
    return _themed(_shortened(text))


def _shortened(text: str) -> str:
    """The same picture in a third of the bytes."""
    # A hundredth of a unit is less than a pixel.
    text = re.sub(r'\b(?:d|x|y)="[^"]*"', _shortened_numbers, text)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", text)
    text = re.sub(r"font-family: [^;]*;", "font-family: sans-serif;", text)
    # The marks of a line have one style.
    same = re.compile(r'<g( clip-path="[^"]*")?>\s*((?:<use [^>]* style="([^"]*)"/>\s*){2,})</g>')
    text = same.sub(_shared_style, text)
    return re.sub(r"\n\s*", "\n", text)


def _shortened_numbers(match: re.Match[str]) -> str:
    text = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", match[0])
    return re.sub(r" ?\n", "", re.sub(r"([MLCQ]) ", r"\1", text))


def _shared_style(match: re.Match[str]) -> str:
    clip, marks, look = match.groups()
    styles = re.findall(r' style="([^"]*)"', marks)
    if set(styles) != {look}:
        return match[0]
    bare = re.sub(r' style="[^"]*"', "", marks)
    return f'<g{clip or ""} style="{look}">{bare}</g>'


def _themed(text: str) -> str:
    """Colours become those of the page, or stay what they are where the SVG stands alone."""
    theme = {INK: "var(--ink, #222222)", _FAINT: "var(--faint, #cccccc)"}
    theme |= {_PAPER: "var(--paper, #ffffff)"}
    theme |= {light: f"var(--run{i}, {light})" for i, (light, _) in enumerate(PALETTE)}
    for stand_in, page in theme.items():
        text = re.sub(stand_in, page, text, flags=re.IGNORECASE)
    return text
