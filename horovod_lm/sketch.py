"""Sketches of weights: a few numbers a layer from which the distance of two models is estimated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from horovod_lm.randomness import philox

SIZE = 64  # numbers a layer
# A squared norm is estimated without bias, with a standard deviation of at most sqrt(2 / SIZE) of
# it, so the norm with half of that: 9%.
ERROR = math.sqrt(2 / SIZE) / 2
_CHUNK = 1 << 16  # elements at a time, so that nothing as large as the weights is made


def layer_of(name: str) -> str:
    """The layer of a parameter: `embeddings`, `decoder.0`, `decoder.norm`, `pooler`, `heads`, …"""
    first, _, rest = name.partition(".")
    stack = first in ("encoder", "decoder")
    return f"{first}.{rest.partition('.')[0]}" if stack else first


def sketch(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A count sketch (Charikar, Chen and Farach-Colton, 2002) of each layer, fp64 of shape
    (SIZE,): every weight is added, with a random sign, to a random one of SIZE sums.

    Signs and places come from the parameter's name alone, so the difference of two sketches is the
    sketch of the difference, and its norm estimates that of the difference; see `ERROR`. It is a
    linear map, so what two models share cancels.
    """
    found: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        flat, generator = weight.reshape(-1), philox(0, f"sketch/{name}")
        sums = np.zeros(2 * SIZE)
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            raw = generator.random_raw(-(-part.size // 8)).astype("<u8").view(np.uint8)
            places = raw[: part.size] % (2 * SIZE)
            sums += np.bincount(places, weights=part, minlength=2 * SIZE)
        layer = layer_of(name)
        found[layer] = found.get(layer, 0.0) + sums[:SIZE] - sums[SIZE:]
    return found


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    """The estimated norm of the difference of two layers, from their sketches."""
    return math.dist(first, second)
