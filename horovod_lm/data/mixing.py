"""Which corpus each row of the global batches comes from, and which row of it: a function of the
seed and the place alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from horovod_lm.data.sampler import Sampler
from horovod_lm.randomness import Keys

CYCLE = 2**16  # places within which every corpus gets its exact share


def proportions(sizes: Sequence[float], temperature: float) -> np.ndarray:
    """Shares p_i ~ n_i^(1/T) of corpora of `sizes` n_i, (sources,) fp64: by size at T = 1, equal as
    T grows (Conneau et al., 2020; Raffel et al., 2020, section 3.5.2)."""
    logs = np.log(np.asarray(sizes, dtype=np.float64)) / temperature
    powers = np.exp(logs - logs.max())
    return powers / powers.sum()


class Mixer:
    """Places 0, 1, 2, … go to sources, and each source deals its units from a permutation of its
    own, epoch after epoch.

    In every cycle of `CYCLE` places a source gets the same number of them, its share rounded by
    largest remainders and at least one, in an order keyed by the seed: so a place is found at once,
    without a walk through those before it. One source alone is what `Sampler` gives.
    """

    def __init__(self, units: Sequence[int], shares: Sequence[float], seed: int) -> None:
        self._samplers = [
            Sampler(count, seed if not index else int(Keys(seed, "source")(index)[0]))
            for index, count in enumerate(units)
        ]
        self.counts = dealt(CYCLE, shares)
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._slots = Sampler(CYCLE, int(Keys(seed, "sources")()[0]))

    def take(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sources, epochs and units at `places` (…,), int64."""
        if len(self._samplers) == 1:
            return np.zeros(places.shape, dtype=np.int64), *self._samplers[0].take(places)
        cycles, slots = self._slots.take(places)
        sources = np.searchsorted(self._starts, slots, side="right") - 1
        own = cycles * self.counts[sources] + slots - self._starts[sources]
        epochs, units = np.empty_like(slots), np.empty_like(slots)
        for index, sampler in enumerate(self._samplers):
            mine = sources == index
            epochs[mine], units[mine] = sampler.take(own[mine])
        return sources, epochs, units


def dealt(count: int, shares: Sequence[float] | np.ndarray) -> np.ndarray:
    """`count` things dealt in proportion to `shares`, at least 1 each, by largest remainders:
    (shares,) int64."""
    weights = np.asarray(shares, dtype=np.float64)
    rest = count - len(weights)
    # Rounded, so that the last bit of a logarithm, which differs between processors, has no say.
    exact = np.round(rest * weights / weights.sum(), 6)
    counts = np.floor(exact).astype(np.int64)
    missing = rest - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts + 1
