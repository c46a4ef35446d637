"""Learning-rate schedules, in plain fp64 Python."""

from __future__ import annotations

import math

from horovod_lm.config import Optimizer, Schedule


def learning_rate(updates: int, optimizer: Optimizer, schedule: Schedule, steps: int) -> float:
    """The learning rate of update number `updates` (0 is the first).

    Warm-up is linear: peak / warmup at update 0, the peak at update warmup - 1. From update
    `warmup` to `end` (`schedule.updates`, or `steps`), with t from 0 to 1 and f `final_fraction`:

    - cosine: peak x (f + (1 - f) (1 + cos(pi t)) / 2) (Loshchilov and Hutter, 2017, one cycle);
    - linear: peak x (1 - (1 - f) t);

    both stay at peak x f afterwards. Without an end: `inverse_sqrt` is peak x
    sqrt(warmup / updates), warmup at least 1 (Vaswani et al., 2017, section 5.3), `constant` the
    peak.
    """
    peak, warmup = optimizer.learning_rate, schedule.warmup
    if updates < warmup:
        return peak * (updates + 1) / warmup
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        start = max(warmup, 1)
        return peak * math.sqrt(start / max(updates, start))
    end = schedule.updates or steps
    progress = 1.0 if updates >= end else (updates - warmup) / (end - warmup)
    if schedule.name == "linear":
        above = 1.0 - progress
    else:
        above = (1.0 + math.cos(math.pi * progress)) / 2.0
    final = schedule.final_fraction
    return peak * (final + (1.0 - final) * above)
