"""How examples become rows: one a row, packed, or rows of about equal length.

A layout deals in units, which a sampler permutes: a row, or for buckets a whole batch of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from horovod_lm.data.packing import Packing, pack
from horovod_lm.data.sampler import Sampler
from horovod_lm.objectives import Objective
from horovod_lm.randomness import Keys

_GRADES = 256  # of lengths, that buckets are cut between


@dataclass(frozen=True)
class Rows:
    """Rows of examples: row r has `examples[bounds[r] : bounds[r + 1]]`. A row is `shape` tokens
    long in each stream, and has `places` for the targets of a sparse loss."""

    examples: np.ndarray
    bounds: np.ndarray
    shape: tuple[int, ...]
    places: int = 0


class Layout(Protocol):
    """Units from 0 to `units` - 1; `packed`: rows may hold several examples; `padded`: for each
    stream, whether some rows have padding."""

    units: int
    packed: bool
    padded: tuple[bool, ...]
    shape: tuple[int, ...]
    places: int

    def rows(self, units: np.ndarray, epochs: np.ndarray) -> Rows:
        """The rows of `units` (U,)."""


class Single:
    """One example a row."""

    packed = False

    def __init__(self, objective: Objective, shape: tuple[int, ...]) -> None:
        self.units = len(objective.lengths)
        self.shape = shape
        self.places = 0 if objective.places is None else int(objective.places.max())
        self.padded = tuple((objective.lengths.min(axis=0) < np.array(shape)).tolist())

    def rows(self, units: np.ndarray, epochs: np.ndarray) -> Rows:
        return Rows(units, np.arange(len(units) + 1), self.shape, self.places)


class Packed:
    """Rows filled with examples, the same in every epoch: since examples of a row do not see each
    other, it does not matter who shares one."""

    packed = True

    def __init__(self, objective: Objective, shape: tuple[int, ...]) -> None:
        self.packing: Packing = pack(objective.lengths, shape)
        self.units = len(self.packing)
        self.shape = shape
        self.places = 0
        if objective.places is not None:
            sums = np.add.reduceat(objective.places[self.packing.order], self.packing.bounds[:-1])
            self.places = int(sums.max())
        self.padded = (True,) * len(shape)

    def rows(self, units: np.ndarray, epochs: np.ndarray) -> Rows:
        starts, stops = self.packing.bounds[units], self.packing.bounds[units + 1]
        bounds = np.concatenate([[0], np.cumsum(stops - starts)])
        places = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], stops - starts)
        return Rows(self.packing.order[places], bounds, self.shape, self.places)


def least_padding(counts: np.ndarray, buckets: int) -> list[int]:
    """The largest length of each of at most `buckets` buckets, rising, so that the sum over all
    examples of the largest length of their bucket is least; `counts[n]` are those of length n."""
    grades = len(counts)
    before = np.concatenate([[0], np.cumsum(counts)])[:, None]
    # Of one bucket with the lengths from i to j - 1.
    costs = (before.T - before) * np.maximum(np.arange(grades + 1) - 1, 0)
    costs = np.where(np.arange(grades + 1)[:, None] < np.arange(grades + 1), costs, 2**62)
    best, choices = costs[0], []
    for _ in range(min(buckets, grades) - 1):
        sums = np.minimum(best, 2**61)[:, None] + costs
        choices.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    edges = [grades]
    for choice in reversed(choices):
        edges.append(int(choice[edges[-1]]))
    return sorted({edge - 1 for edge in edges if edge > 0})


class Buckets:
    """Examples of about the same length together: at most `count` buckets, cut so that all have the
    least padding. The rows of a bucket are as long as its longest example, and those of a batch as
    many as `tokens` allow. A unit is a batch; in each epoch a bucket deals its examples in another
    order, and its last batch may have fewer rows."""

    packed = False

    def __init__(
        self, objective: Objective, shape: tuple[int, ...], *, tokens: int, count: int, seed: int
    ) -> None:
        lengths = objective.lengths
        share = (lengths / np.array(shape)).max(axis=1)
        grade = np.ceil(share * _GRADES).astype(np.int64)
        counts = np.bincount(grade, minlength=_GRADES + 1)
        bucket = np.searchsorted(least_padding(counts, count), grade)
        order = np.argsort(bucket, kind="stable")
        edges = np.searchsorted(bucket[order], np.arange(count + 1))
        self._members = [
            order[start:stop] for start, stop in pairwise(edges.tolist()) if stop > start
        ]
        self.shapes = [tuple(lengths[part].max(axis=0).tolist()) for part in self._members]
        self._places = [
            0 if objective.places is None else int(objective.places[part].max())
            for part in self._members
        ]
        self._sizes = [max(1, tokens // sum(size)) for size in self.shapes]
        batches = [
            -(-len(part) // size) for part, size in zip(self._members, self._sizes, strict=True)
        ]
        self._first = np.concatenate([[0], np.cumsum(batches)])
        self._samplers = [
            Sampler(len(part), int(Keys(seed, "bucket")(index)[0]))
            for index, part in enumerate(self._members)
        ]
        self.units = int(self._first[-1])
        self.shape, self.places = shape, max(self._places)
        self.padded = tuple(
            any(
                int(lengths[part, stream].min()) < size[stream]
                for part, size in zip(self._members, self.shapes, strict=True)
            )
            for stream in range(len(shape))
        )

    def rows(self, units: np.ndarray, epochs: np.ndarray) -> Rows:
        """`units` is one number."""
        ((unit,), (epoch,)) = units.tolist(), epochs.tolist()
        index = int(np.searchsorted(self._first, unit, side="right")) - 1
        members, size = self._members[index], self._sizes[index]
        start = (unit - int(self._first[index])) * size
        places = np.arange(start, min(start + size, len(members))) + epoch * len(members)
        examples = members[self._samplers[index].take(places)[1]]
        bounds = np.arange(len(examples) + 1)
        return Rows(examples, bounds, self.shapes[index], self._places[index])

    def evenly(self, count: int) -> list[Rows]:
        """About `count` examples spread over all, in their order, by bucket."""
        total = sum(map(len, self._members))
        count = min(count or total, total)
        found = []
        for index, members in enumerate(self._members):
            share = max(1, count * len(members) // total)
            chosen = np.sort(members)[np.arange(share) * len(members) // share]
            bounds = np.arange(share + 1)
            found.append(Rows(chosen, bounds, self.shapes[index], self._places[index]))
        return found
