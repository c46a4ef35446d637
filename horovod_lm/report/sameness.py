"""The charts that ask whether the runs train the same: losses, gradients, seeds, weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from horovod_lm.report.curves import MARGIN
from horovod_lm.report.drawing import (
    FLOOR,
    INK,
    POINTS,
    Chart,
    colour,
    draw_interval,
    finish,
    label_ends,
    line_style,
    log_scale,
    make_axes,
    make_rows,
    marker,
    thin,
)
from horovod_lm.report.results import Comparison
from horovod_lm.report.table import count
from horovod_lm.report.weights import WHOLE
from horovod_lm.sketch import ERROR, SIZE

# Widths and opacities of the lines of layers, by depth.
_WIDTHS, _OPACITIES = (0.9, 1.6), (0.45, 1.0)
_DOTS = 400  # of a chart of dots, which take more room than lines


def chart_of_losses(comparison: Comparison) -> Chart | None:
    """Loss by step."""
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
            axes.plot(*zip(*points, strict=True), marker(i), color=colour(i), fillstyle="none")
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


def chart_of_differences(comparison: Comparison) -> Chart | None:
    """Difference of the losses by step."""
    found = {i: c for i in comparison.others if (c := comparison.curves(i, comparison.against(i)))}
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
    firsts = dict.fromkeys(comparison.names[comparison.against(i)] for i in found)
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


def chart_of_seeds(comparison: Comparison) -> Chart | None:
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
    figure, axes = make_rows(comparison.names, list(tests), "difference of the final losses, nats")
    for row, (i, test) in enumerate(tests.items()):
        draw_interval(axes, row, test.mean, test.interval, apart[i], i)
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


def chart_of_norms(comparison: Comparison) -> Chart | None:
    """Gradient norm by step."""
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


def chart_of_scales(comparison: Comparison) -> Chart | None:
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


def chart_of_weights(comparison: Comparison, which: int) -> Chart | None:
    """The drift of one run's weights from the baseline's, by layer."""
    first = comparison.against(which)
    drift = comparison.drift(which)
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
        dot = "." if there.sum() == 1 else ""
        axes.plot(np.array(steps)[there], found[there], marker=dot, **look, **more)


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
