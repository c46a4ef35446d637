"""One rank's part of the global batches, cut into micro-batches, prepared ahead in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from horovod_lm.backend import MicroBatch
from horovod_lm.data.feeds import FILLER, Feed, Part, kinds_of
from horovod_lm.objectives import LossKind

_AHEAD = 2  # batches that wait in memory while one is trained on

Factors = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class RankBatch:
    """One rank's micro-batches of a global batch.

    Of the whole global batch: `targets` is the number of target tokens (the weight sum over the
    language model's head; of other heads' where there is none), `sums` the weight sum of each
    loss, `real` and `computed` are its tokens without and with padding. `factors` are the losses'
    weights at this step.
    """

    micros: list[MicroBatch]
    targets: int
    real: int = 0
    computed: int = 0
    factors: Mapping[str, float] = field(default_factory=dict)
    sums: Mapping[str, float] = field(default_factory=dict)


def share(count: int, rank: int, ranks: int) -> range:
    """The part of `count` things that `rank` gets when they are dealt in order, as evenly as can
    be: the first `count % ranks` ranks have one more."""
    size, more = divmod(count, ranks)
    start = rank * size + min(rank, more)
    return range(start, start + size + (rank < more))


def cut(global_batch_size: int, micro_batch_size: int | None, ranks: int) -> tuple[int, int]:
    """How many micro-batches each rank makes of its part, and their rows: as few as split the
    largest rank's part into equal micro-batches of at most `micro_batch_size`."""
    largest = len(share(global_batch_size, 0, ranks))
    micros = -(-largest // min(micro_batch_size or largest, largest))
    return micros, -(-largest // micros)


class Batches:
    """The training batches of one rank.

    The global batches depend on the feeds' seed and on the step alone, not on `ranks` or
    `micro_batch_size`. Of a feed, every micro-batch of every rank has the same number of rows, that
    of `cut`; rows without content have weight 0 and indices past the global batch. Rows of buckets
    are shorter, and there are more of them: `micro_batch_size` counts rows of full length.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        *,
        micro_batch_size: int | None,
        rank: int,
        ranks: int,
        factors: Factors | None = None,
    ) -> None:
        self._feeds, self._micro = list(feeds), micro_batch_size
        self._rank, self._ranks = rank, ranks
        self._kinds = kinds_of(feeds)
        self._factors = factors or (lambda step: dict.fromkeys(self._kinds, 1.0))

    def __getitem__(self, step: int) -> RankBatch:
        """The batch of `step`, from 0; reads only this rank's rows."""
        parts = [feed.part(step) for feed in self._feeds]
        sums = total_sums(parts, self._kinds)
        factors = self._factors(step)
        total = sum(map(len, parts))
        first, fillers = 0, total
        micros = []
        for part in parts:
            count = len(part)
            number, rows = cut(count, self._micro_rows(part), self._ranks)
            mine, slots = share(count, self._rank, self._ranks), np.arange(number * rows)
            real = slots < len(mine)
            wanted = np.where(real, mine.start + slots, FILLER).reshape(number, rows)
            beyond = fillers + self._rank * slots.size + slots
            numbers = np.where(real, first + mine.start + slots, beyond).reshape(number, rows)
            micros += [
                part.micro_batch(some, at, self._kinds, sums, factors)
                for some, at in zip(wanted.tolist(), numbers, strict=True)
            ]
            first += count
            fillers += self._ranks * slots.size
        return RankBatch(
            micros,
            targets_of(sums, self._kinds),
            sum(part.real() for part in parts),
            sum(part.computed() for part in parts),
            factors,
            sums,
        )

    def _micro_rows(self, part: Part) -> int | None:
        if self._micro is None or part.feed.count is not None:
            return self._micro
        full = max(sum(layout.shape) for layout in part.feed.layouts)
        return max(1, self._micro * full // sum(part.rows.shape))

    @contextmanager
    def ahead(self, start: int) -> Iterator[Iterator[RankBatch]]:
        """An endless iterator over the batches from `start`, prepared in a thread. An exception
        there comes out of `next`; leaving the context ends the thread at once."""
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        try:
            yield self._stream(pool, start)
        finally:
            pool.shutdown(cancel_futures=True)

    def _stream(self, pool: ThreadPoolExecutor, step: int) -> Iterator[RankBatch]:
        waiting: deque[Future[RankBatch]] = deque()
        while True:
            while len(waiting) < _AHEAD:
                waiting.append(pool.submit(self.__getitem__, step))
                step += 1
            yield waiting.popleft().result()


def total_sums(parts: Sequence[Part], kinds: Mapping[str, LossKind]) -> dict[str, float]:
    """By loss name, the weight sum over all `parts`, in the order of `kinds`."""
    sums = dict.fromkeys(kinds, 0.0)
    for part in parts:
        for name, value in part.sums().items():
            sums[name] += value
    return sums


def targets_of(sums: Mapping[str, float], kinds: Mapping[str, LossKind]) -> int:
    """Target tokens: those of the language model's head, or if it has no loss, of the others."""
    tokens = [value for name, value in sums.items() if kinds[name].head == "lm"]
    return int(sum(tokens or sums.values()))


def validation_batches(
    feeds: Sequence[Feed], *, rows: int, windows: int, rank: int, ranks: int
) -> Iterator[MicroBatch]:
    """One rank's share of `windows` rows of each feed's corpora, spread evenly over them (0, or
    more than there are: all), in micro-batches of `rows` rows, the last one filled with rows of
    weight 0.

    Ranks may have different numbers of micro-batches, none included. The normaliser is the weight
    sum over all ranks.
    """
    kinds = kinds_of(feeds)
    parts = [part for feed in feeds for part in feed.evenly(windows)]
    sums = total_sums(parts, kinds)
    factors = dict.fromkeys(kinds, 1.0)
    total = sum(map(len, parts))
    first = 0
    for part in parts:
        mine = share(len(part), rank, ranks)
        for start in range(mine.start, mine.stop, rows):
            some = np.arange(start, start + rows)
            real = some < mine.stop
            wanted = np.where(real, some, FILLER).tolist()
            numbers = np.where(real, first + some, total + first + rows + some)
            yield part.micro_batch(wanted, numbers, kinds, sums, factors)
        first += len(part)
