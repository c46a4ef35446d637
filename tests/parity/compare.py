"""How far two sets of tensors are apart, by the words of the project's design."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b| in fp64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return _ratio(float(np.linalg.norm(a - b)), float(np.linalg.norm(b)))


def _ratio(distance: float, norm: float) -> float:
    """Infinite where something is not a number, which `max` would pass over in a list."""
    if distance == 0:
        return 0.0
    return distance / norm if norm > 0 and math.isfinite(distance) else math.inf


def differences(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, float]:
    """By name; a tensor of `b` whose norm is under 1e-6 of the whole is judged against the
    whole."""
    assert list(a) == list(b)
    norms = {name: float(np.linalg.norm(array.astype(np.float64))) for name, array in b.items()}
    whole = float(np.linalg.norm(list(norms.values())))
    result = {}
    for name, array in a.items():
        distance = np.linalg.norm(array.astype(np.float64) - b[name].astype(np.float64))
        norm = whole if norms[name] < 1e-6 * whole else norms[name]
        result[name] = _ratio(float(distance), norm)
    return result


FIGURES: dict[str, float] = {}  # the largest difference seen under each title, for the summary


def within(title: str, value: float, limit: float) -> None:
    """Fail if `value` is over `limit`; the largest value under a title is printed at the end."""
    FIGURES[title] = max(FIGURES.get(title, 0.0), value)
    assert value <= limit, f"{title}: {value:.2e} is over {limit:.0e}"
