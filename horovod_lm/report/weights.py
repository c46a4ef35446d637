"""How far the weights of two runs have drifted apart, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from horovod_lm.parity.places import layer
from horovod_lm.report.runs import Run
from horovod_lm.sketch import distance

WHOLE = "all layers"


@dataclass(frozen=True)
class Drift:
    """Estimates of ‖a - b‖ / ‖b - start of b‖ of each layer, by steps; see `horovod_lm.sketch`.
    1 means as far from each other as training has moved them, 0 bit for bit the same."""

    steps: list[int]
    layers: dict[str, list[float]]


def weight_drift(run: Run, baseline: Run) -> Drift | None:
    """The drift of a run's weights from the baseline's; None where sketches are missing or the
    models have other parameters."""
    shapes = [{p.name: p.shape for p in r.config.model.parameters} for r in (run, baseline)]
    mine, theirs = ({row["step"]: row["sketch"] for row in r.weights} for r in (run, baseline))
    start = theirs.get(0)
    if start is None or shapes[0] != shapes[1]:
        return None
    steps: list[int] = []
    layers: dict[str, list[float]] = {name: [] for name in (*map(layer, start), WHOLE)}
    for step in sorted(mine.keys() & theirs.keys()):
        apart = {name: distance(mine[step][name], theirs[step][name]) for name in start}
        moved = {name: distance(theirs[step][name], start[name]) for name in start}
        if not all(moved.values()):  # nothing was updated yet
            continue
        steps.append(step)
        for name in start:
            layers[layer(name)].append(apart[name] / moved[name])
        layers[WHOLE].append(math.hypot(*apart.values()) / math.hypot(*moved.values()))
    return Drift(steps, layers) if steps else None
