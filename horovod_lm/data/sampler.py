"""In which order windows come: a function of the seed and the place alone."""

from __future__ import annotations

import math

import numpy as np

from horovod_lm.randomness import mix

_ROUNDS = 8


class Sampler:
    """Every epoch goes through all windows once, in an order keyed by (seed, epoch); epochs follow
    one another without end.

    The order is a format-preserving permutation, so it takes no memory and any place in it is
    found at once: a Feistel network over pairs (i, j), 0 <= i < a, 0 <= j < b, with a b barely
    above the number of windows, by additions modulo a and b (Black and Rogaway, 2002); numbers
    that fall outside go round again ("cycle walking"). All of it is arithmetic on integers of 64
    bits, the same everywhere.
    """

    def __init__(self, windows: int, seed: int) -> None:
        self.windows, self.seed = windows, seed
        side = math.isqrt(windows - 1) + 1  # the ceiling of the root
        self._sides = np.uint64(side), np.uint64(-(-windows // side))

    def take(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the window numbers, from 0 to windows - 1, at `places` (…,) of the endless
        order, int64."""
        epochs, places = np.divmod(places.astype(np.uint64), np.uint64(self.windows))
        # An array, since NumPy warns where a single number wraps.
        seeds = np.full(1, self.seed, dtype=np.uint64)
        keys = mix(mix(seeds + np.uint64(1)) + epochs)
        result = self._permute(places, keys)
        outside = np.flatnonzero(result >= self.windows)
        while outside.size:
            result[outside] = self._permute(result[outside], keys[outside])
            outside = outside[result[outside] >= self.windows]
        return epochs.astype(np.int64), result.astype(np.int64)

    def _permute(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        a, b = self._sides
        left, right = np.divmod(places, b)
        for number in range(0, _ROUNDS, 2):
            left = (left + _word(keys, number, right) % a) % a
            right = (right + _word(keys, number + 1, left) % b) % b
        return left * b + right


def _word(keys: np.ndarray, number: int, half: np.ndarray) -> np.ndarray:
    # A half is under 2^32, so that the round's number has the bits above it to itself.
    return mix(keys + mix(half + np.uint64((number + 1) << 32)))
