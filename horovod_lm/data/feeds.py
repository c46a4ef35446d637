"""The rows of global batches: which examples they hold, and the arrays that are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from horovod_lm.backend import Loss, MicroBatch
from horovod_lm.data.layout import Buckets, Layout, Rows
from horovod_lm.data.mixing import Mixer
from horovod_lm.objectives import Example, LossKind, Objective

FILLER = -1  # the number of a row without content, whose weights are 0


def kinds_of(feeds: Sequence[Feed]) -> dict[str, LossKind]:
    """The losses of a run by name, in order."""
    return {kind.name: kind for feed in feeds for kind in feed.losses}


@dataclass(frozen=True)
class Part:
    """Some rows of a feed: `sources`, `epochs` and the examples of `rows`, (M,) each."""

    feed: Feed
    rows: Rows
    sources: np.ndarray
    epochs: np.ndarray

    def __len__(self) -> int:
        return len(self.rows.bounds) - 1

    def sums(self) -> dict[str, float]:
        """By loss name, the weight sum of all targets, known before they are made."""
        totals = {kind.name: 0.0 for kind in self.feed.losses}
        for objective, mine in self._by_source():
            counts = objective.counts(self.rows.examples[mine], self.epochs[mine])
            for name, values in counts.items():
                totals[name] += float(values.sum())
        return totals

    def real(self) -> int:
        """Tokens that are not padding, of all streams."""
        return sum(
            int(objective.real(self.rows.examples[mine], self.epochs[mine]).sum())
            for objective, mine in self._by_source()
        )

    def computed(self) -> int:
        """Tokens of all rows, padding included."""
        return len(self) * sum(self.rows.shape)

    def _by_source(self) -> list[tuple[Objective, np.ndarray]]:
        pairs = enumerate(self.feed.objectives)
        found = [(objective, np.flatnonzero(self.sources == index)) for index, objective in pairs]
        return [(objective, mine) for objective, mine in found if mine.size]

    def micro_batch(
        self,
        rows: Sequence[int],
        numbers: np.ndarray,
        kinds: Mapping[str, LossKind],
        normalisers: Mapping[str, float],
        factors: Mapping[str, float],
    ) -> MicroBatch:
        """The arrays of `rows`, where `FILLER` is a row of weight 0; `numbers` (B,) int64 are their
        indices in the global batch. It has every loss of the run, in the order of `kinds`: those of
        other objectives with one place of weight 0 a row."""
        arrays = _Arrays(self.feed, self.rows, len(rows))
        for place, row in enumerate(rows):
            if row != FILLER:
                start, stop = self.rows.bounds[row : row + 2].tolist()
                for index in range(start, stop):
                    objective = self.feed.objectives[self.sources[index]]
                    example = objective.example(
                        int(self.rows.examples[index]), int(self.epochs[index])
                    )
                    arrays.add(place, example)
        losses = tuple(
            arrays.loss(kind, normalisers[name] or 1.0, factors[name])
            for name, kind in kinds.items()
        )
        return MicroBatch(arrays.inputs, numbers, losses)


class Feed:
    """One objective in one or more corpora, and its rows at every step.

    `rows` is how many it gives to a global batch; None: what the layout says.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        layouts: Sequence[Layout],
        shares: Sequence[float],
        *,
        seed: int,
        rows: int | None,
    ) -> None:
        self.objectives, self.layouts, self.count = list(objectives), list(layouts), rows
        self.mixer = Mixer([layout.units for layout in layouts], shares, seed)
        first = objectives[0]
        self.losses, self.streams, self.extras = first.losses, first.streams, first.extras
        self.packed = layouts[0].packed
        self.padded = tuple(map(any, zip(*(layout.padded for layout in layouts), strict=True)))
        self.places = max(layout.places for layout in layouts)
        self.masks = self._masks()

    def _masks(self) -> tuple[str, ...]:
        """The streams whose `blocks` the model needs: padding behind a causal token is not seen
        anyway, which spares decoders a mask."""
        if self.packed:
            return self.streams
        both_sides = self.objectives[0].both_sides
        pairs = zip(self.streams, self.padded, strict=True)
        return tuple(name for name, padded in pairs if padded and name in both_sides)

    def part(self, step: int) -> Part:
        """The rows of a step: a function of the seed and `step` alone."""
        count = self.count or 1
        sources, epochs, units = self.mixer.take(np.arange(step * count, (step + 1) * count))
        if self.count is None:
            rows = self.layouts[int(sources[0])].rows(units, epochs)
            per_row = np.zeros(len(rows.bounds) - 1, dtype=np.int64)
            return Part(self, rows, sources[per_row], epochs[per_row])
        bounds = np.zeros(count + 1, dtype=np.int64)
        parts = []
        for index, layout in enumerate(self.layouts):
            mine = np.flatnonzero(sources == index)
            parts.append(layout.rows(units[mine], epochs[mine]))
            bounds[mine + 1] = np.diff(parts[-1].bounds)
        bounds = np.cumsum(bounds)
        examples = np.empty(bounds[-1], dtype=np.int64)
        for index, found in enumerate(parts):
            mine = np.flatnonzero(sources == index)
            lengths = np.diff(found.bounds)
            places = np.arange(len(found.examples)) + np.repeat(
                bounds[mine] - found.bounds[:-1], lengths
            )
            examples[places] = found.examples
        row = np.repeat(np.arange(count), np.diff(bounds))
        rows = Rows(examples, bounds, self.layouts[0].shape, self.places)
        return Part(self, rows, sources[row], epochs[row])

    def evenly(self, windows: int) -> list[Part]:
        """`windows` rows spread evenly over each corpus (0, or more than there are: all), in parts
        of one shape."""
        found = []
        for index, layout in enumerate(self.layouts):
            if isinstance(layout, Buckets):
                groups = layout.evenly(windows)
            else:
                count = min(windows or layout.units, layout.units)
                units = np.arange(count, dtype=np.int64) * layout.units // count
                groups = [layout.rows(units, np.zeros_like(units))]
            for rows in groups:
                source = np.full(len(rows.examples), index)
                found.append(Part(self, rows, source, np.zeros_like(source)))
        return found


class _Arrays:
    """The arrays of one micro-batch of `count` rows, filled example by example."""

    def __init__(self, feed: Feed, rows: Rows, count: int) -> None:
        self._feed = feed
        self.inputs: dict[str, np.ndarray] = {}
        shapes = dict(zip(feed.streams, rows.shape, strict=True))
        for name, length in shapes.items():
            self.inputs[name] = np.zeros((count, length), dtype=np.int32)
            prefix = "source_" if name == "source" else ""
            if name in feed.masks:
                self.inputs[f"{prefix}blocks"] = np.zeros((count, length), dtype=np.int32)
            if feed.packed:
                self.inputs[f"{prefix}positions"] = np.zeros((count, length), dtype=np.int32)
        for name in feed.extras:
            self.inputs[name] = np.zeros((count, shapes["tokens"]), dtype=np.int32)
        self._filled = {name: [0] * count for name in feed.streams}
        self._blocks = [0] * count
        self._targets: dict[str, np.ndarray] = {}
        self._weights: dict[str, np.ndarray] = {}
        self._places: dict[str, np.ndarray] = {}
        self._used = [0] * count  # of the places of a sparse loss
        for kind in feed.losses:
            shape: tuple[int, ...] = (count, shapes["tokens"])
            if kind.over == "sequence":
                shape = (count,)
            elif kind.sparse:
                shape = (count, max(1, rows.places))
                self._places[kind.name] = np.zeros(shape, dtype=np.int32)
            self._targets[kind.name] = np.zeros(shape, dtype=np.int32)
            self._weights[kind.name] = np.zeros(shape, dtype=np.float32)

    def add(self, row: int, example: Example) -> None:
        """Put `example` behind what is in `row`."""
        self._blocks[row] += 1
        begin = self._filled["tokens"][row]
        for name in self._feed.streams:
            ids = example.inputs[name]
            start = self._filled[name][row]
            stop = self._filled[name][row] = start + len(ids)
            self.inputs[name][row, start:stop] = ids
            prefix = "source_" if name == "source" else ""
            if name in self._feed.masks:
                self.inputs[f"{prefix}blocks"][row, start:stop] = self._blocks[row]
            if self._feed.packed:
                self.inputs[f"{prefix}positions"][row, start:stop] = np.arange(len(ids))
        for name in self._feed.extras:
            ids = example.inputs[name]
            self.inputs[name][row, begin : begin + len(ids)] = ids
        for kind in self._feed.losses:
            targets = example.targets[kind.name]
            values = targets.values
            place: int | tuple[int, slice]
            if kind.over == "sequence":
                place, values = row, values[0]
            elif kind.sparse:
                start = self._used[row]
                stop = self._used[row] = start + len(values)
                place = row, slice(start, stop)
                self._places[kind.name][place] = begin + targets.places
            else:
                start = begin + int(targets.places)
                place = row, slice(start, start + len(values))
            self._targets[kind.name][place] = values
            self._weights[kind.name][place] = 1

    def loss(self, kind: LossKind, normaliser: float, factor: float) -> Loss:
        """The loss of `kind`; of another objective, one place of weight 0 in each row."""
        positions = self._places.get(kind.name)
        if kind.name in self._targets:
            targets, weights = self._targets[kind.name], self._weights[kind.name]
        else:
            rows = len(self._blocks)
            shape = (rows,) if kind.over == "sequence" else (rows, 1)
            targets, weights = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
            positions = None if kind.over == "sequence" else targets
        return Loss(
            kind.name,
            kind.head,
            targets,
            weights,
            normaliser,
            factor,
            positions,
            kind.smoothing,
            kind.z_loss,
        )
