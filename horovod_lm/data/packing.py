"""How a stream is cut into pieces, and how pieces fill rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from horovod_lm.data.stream import TokenStream

_OPEN_STATES = 1024  # rows of how many different rooms wait for a piece


@dataclass(frozen=True)
class Pieces:
    """Where pieces of a stream start and how many tokens they have, (N,) int64 each; `documents`
    (N,) are the numbers of their documents, None where a piece may hold parts of several."""

    starts: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts)


def document_lengths(tokens: TokenStream) -> np.ndarray:
    """The number of tokens of each document, the end-of-text token included, (documents,) int64."""
    return np.diff(np.asarray(tokens.documents, dtype=np.int64), append=len(tokens))


def document_pieces(tokens: TokenStream, room: int, *, ends: bool, least: int = 1) -> Pieces:
    """Every document, cut where it has more than `room` tokens; of what is left behind the last cut
    less than `least` tokens are left out. `ends`: with the end-of-text token."""
    lengths = document_lengths(tokens) - (not ends)
    full, rest = np.divmod(lengths, room)
    counts = full + (rest >= least)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.asarray(tokens.documents, dtype=np.int64)[documents] + number * room
    return Pieces(starts, np.minimum(room, lengths[documents] - number * room), documents)


def windows(length: int, room: int, *, partial: bool) -> Pieces:
    """Pieces of `room` tokens without regard to documents, of a stream of `length`; `partial`: with
    the shorter last one."""
    count = -(-length // room) if partial else length // room
    starts = np.arange(count, dtype=np.int64) * room
    return Pieces(starts, np.minimum(room, length - starts))


def ends_within(tokens: TokenStream, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many documents end within each piece (…,): so many end-of-text tokens are in it."""
    # A document ends where the next one starts, so that the ends in [start, stop) are the starts
    # in (start, stop].
    begins, total = tokens.documents, len(tokens)
    stops = starts + lengths
    found = np.searchsorted(begins, stops, side="right") - np.searchsorted(
        begins, starts, side="right"
    )
    return found + (stops >= total)


@dataclass(frozen=True)
class Packing:
    """Rows of pieces: row r holds the pieces `order[bounds[r] : bounds[r + 1]]`."""

    order: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1


def pack(lengths: np.ndarray, room: tuple[int, ...]) -> Packing:
    """Deal pieces into rows of `room`: the longest first, each into the row that it leaves the
    least room in (best fit decreasing; over the histogram of lengths, as Krell et al., 2021).

    `lengths` (N, D) are those of a piece in each of D streams, `room` what a row has in each; no
    piece may be larger. The result depends on `lengths` and `room` alone.
    """
    kinds, inverse = np.unique(lengths, axis=0, return_inverse=True)
    of_kind = np.argsort(inverse.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(inverse.ravel(), minlength=len(kinds)))
    shape = np.asarray(room, dtype=np.int64)
    rows = np.empty(len(lengths), dtype=np.int64)
    largest = np.argsort(-(kinds / shape).max(axis=1), kind="stable")
    opened = 0
    open_rows: dict[tuple[int, ...], list[np.ndarray]] = {}
    for kind in largest.tolist():
        size = kinds[kind]
        waiting = of_kind[(ends[kind - 1] if kind else 0) : ends[kind]]
        while len(waiting):
            state = _tightest(open_rows, size, shape)
            if state is None:
                # As many rows as hold them all, were they alone.
                each = int((shape // np.maximum(size, 1)).min())
                count = -(-len(waiting) // each)
                open_rows.setdefault(tuple(room), []).append(np.arange(opened, opened + count))
                opened += count
                continue
            group = open_rows[state].pop()
            if not open_rows[state]:
                del open_rows[state]
            count = min(len(group), len(waiting))
            rows[waiting[:count]] = group[:count]
            waiting = waiting[count:]
            left = tuple((np.array(state) - size).tolist())
            if min(left) > 0:
                open_rows.setdefault(left, []).append(group[:count])
            if count < len(group):
                open_rows.setdefault(state, []).append(group[count:])
        if len(open_rows) > _OPEN_STATES:
            for state in sorted(open_rows, key=sum)[: len(open_rows) - _OPEN_STATES]:
                del open_rows[state]
    order = np.argsort(rows, kind="stable")
    return Packing(order, np.searchsorted(rows[order], np.arange(opened + 1)))


def _tightest(
    open_rows: dict[tuple[int, ...], list[np.ndarray]], size: np.ndarray, shape: np.ndarray
) -> tuple[int, ...] | None:
    """The room, of those that a piece of `size` fits into, that it leaves the least of."""
    if not open_rows:
        return None
    states = np.array(list(open_rows), dtype=np.int64)
    left = (states - size) / shape
    left[(states < size).any(axis=1)] = np.inf
    best = int(left.sum(axis=1).argmin())
    return tuple(states[best].tolist()) if np.isfinite(left[best]).all() else None
