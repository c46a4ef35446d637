"""One rank's part of the global batches, cut into micro-batches, prepared ahead in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from horovod_lm.backend import MicroBatch
from horovod_lm.data.sampler import Sampler
from horovod_lm.data.shards import Tokens
from horovod_lm.objectives import FILLER, Objective

_AHEAD = 2  # batches that wait in memory while one is trained on


@dataclass(frozen=True)
class RankBatch:
    """One rank's micro-batches of a global batch; `targets` is the number of target tokens (the
    weight sum) of the whole global batch."""

    micros: list[MicroBatch]
    targets: int


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

    The global batches depend on seed and step alone, not on `ranks` or `micro_batch_size`. Every
    micro-batch of every rank has the same number of rows, that of `cut`; rows without content have
    weight 0 and indices past the global batch.
    """

    def __init__(
        self,
        tokens: Tokens,
        objective: Objective,
        *,
        context: int,
        global_batch_size: int,
        micro_batch_size: int | None,
        seed: int,
        rank: int,
        ranks: int,
    ) -> None:
        self._tokens, self._objective, self._context = tokens, objective, context
        self._sampler = Sampler(objective.windows(tokens, context), global_batch_size, seed)
        micros, rows = cut(global_batch_size, micro_batch_size, ranks)
        mine = share(global_batch_size, rank, ranks)
        slots = np.arange(micros * rows)
        filler = global_batch_size + rank * slots.size + slots
        self._rows = np.where(slots < len(mine), mine.start + slots, filler).reshape(micros, rows)
        self._real = (slots < len(mine)).reshape(micros, rows)
        self._mine = np.where(self._real, self._rows, 0)

    def __getitem__(self, step: int) -> RankBatch:
        """The batch of `step`, from 0; reads only this rank's rows."""
        batch = self._sampler.rows(step)
        sums = self._objective.weight_sums(self._tokens, self._context, batch)
        windows = np.where(self._real, batch[self._mine], FILLER)
        micros = [
            self._objective.micro_batch(self._tokens, self._context, part, rows, sums)
            for part, rows in zip(windows, self._rows, strict=True)
        ]
        return RankBatch(micros, int(sum(sums.values())))

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


def validation_batches(
    tokens: Tokens,
    objective: Objective,
    *,
    context: int,
    rows: int,
    windows: int,
    rank: int,
    ranks: int,
) -> Iterator[MicroBatch]:
    """One rank's share of `windows` windows spread evenly over the stream (0, or more than there
    are: all), in micro-batches of `rows` rows, the last one filled with rows of weight 0.

    Ranks may have different numbers of micro-batches, none included. The normaliser is the weight
    sum over all ranks.
    """
    total = objective.windows(tokens, context)
    count = min(windows or total, total)
    chosen = np.arange(count, dtype=np.int64) * total // count
    sums = objective.weight_sums(tokens, context, chosen)
    mine = share(count, rank, ranks)
    for start in range(mine.start, mine.stop, rows):
        part = chosen[start : min(start + rows, mine.stop)]
        filled = np.full(rows, FILLER, dtype=np.int64)
        filled[: len(part)] = part
        indices = np.where(filled == FILLER, total + start + np.arange(rows), filled)
        yield objective.micro_batch(tokens, context, filled, indices, sums)
