"""The shared dropout masks pass for independent coin tosses, and poor ones do not.

Each statistic is a sum of products of centred mask elements, m - (1 - rate), which for independent
elements has mean 0 and a known variance, so its z is standard normal. A battery of n statistics
passes if no |z| is larger than the limit that n normal numbers keep in all but one of a thousand
batteries (Bonferroni). Keys are fixed: it always ends in the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import pytest

from horovod_lm.randomness import dropout_words, keep_mask, mix, threshold, words
from horovod_lm.spec import ModelSpec

KEYS = [(1, 7), (1, 8), (1, 9), (2, 7)]  # (seed, step)
BATCH, LENGTH = 8, 64
SPEC = ModelSpec(vocabulary=300, context=LENGTH, width=128, layers=2, heads=4)
LEVEL = 1e-3


def drawn_words(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Row words (keys, sites, B, L) and column words (keys, sites, columns) of the residual stream
    or of attention, where each head of each layer counts as a site."""
    drawn = [
        dropout_words(SPEC, *key, np.arange(BATCH), {"decoder": LENGTH})["decoder"] for key in KEYS
    ]
    rows = np.stack([getattr(d, f"{kind}_rows") for d in drawn])
    columns = np.stack([getattr(d, f"{kind}_columns") for d in drawn])
    if kind == "attention":
        rows = np.moveaxis(rows, 3, 2).reshape(len(KEYS), -1, BATCH, LENGTH)
        columns = np.repeat(columns, SPEC.heads, axis=1)
    return rows, columns


def masks_of(rows: np.ndarray, columns: np.ndarray, rate: float) -> np.ndarray:
    """(keys, sites, B, L, columns)."""
    pairs = zip(rows.reshape(-1, BATCH, LENGTH), np.concatenate(columns), strict=True)
    masks = np.stack([keep_mask(*pair, rate) for pair in pairs])
    return masks.reshape(*rows.shape, columns.shape[-1])


def shifted(x: np.ndarray, *offsets: tuple[int, int, int]) -> list[np.ndarray]:
    """Views of x (…, B, L, columns) that lie by these offsets from each other."""
    lows, highs = (tuple(f(o) for o in zip(*offsets, strict=True)) for f in (min, max))
    return [
        x[
            ...,
            *(
                slice(o - a, n + o - b)
                for o, a, b, n in zip(offset, lows, highs, x.shape[-3:], strict=True)
            ),
        ]
        for offset in offsets
    ]


def battery(masks: np.ndarray, rate: float) -> Iterator[tuple[str, float]]:
    """Names and z of statistics of masks (keys, sites, B, L, columns)."""
    m, variance = masks - (1 - rate), rate * (1 - rate)

    def z(*factors: np.ndarray) -> float:
        product = math.prod(factors)
        return float(product.sum()) / math.sqrt(variance ** len(factors) * product.size)

    yield "keep rate", z(m)
    for key, site in np.ndindex(m.shape[:2]):
        yield f"keep rate, key {key}, site {site}", z(m[key, site])
    # No batch row, position or column keeps more than its share.
    for axis, name in enumerate(("batch rows", "positions", "columns"), 2):
        sums = m.sum(tuple({2, 3, 4} - {axis})) / math.sqrt(variance * m[0, 0].size / m.shape[axis])
        yield f"spread over {name}", ((sums**2).sum() - sums.size) / math.sqrt(2 * sums.size)

    here = (0, 0, 0)
    near = [o for o in itertools.product(range(2), range(-2, 3), range(-2, 3)) if o > here]
    far = [(0, 0, 2**i) for i in range(2, 6)] + [(0, 2**i, 0) for i in range(2, 6)]
    far += [(2, 0, 0), (4, 0, 0)] + [(0, 2**i, 2**i) for i in range(2, 6)]
    for offset in near + far:
        yield f"pairs {offset} apart", z(*shifted(m, here, offset))
    places = np.random.default_rng(3)
    for _ in range(40):
        a, b = (tuple((places.integers(-3, 4, 3) * (1, 2, 2)).tolist()) for _ in range(2))
        if len({here, a, b}) == 3:
            yield f"triples {a} and {b} apart", z(*shifted(m, here, a, b))
    for a, b in itertools.product((1, 2, 3, 8, 32), repeat=2):
        yield f"{a} x {b} rectangles", z(*shifted(m, here, (0, a, 0), (0, 0, b), (0, a, b)))

    # Between keys, and between sites: the same places, and places beside each other.
    rows = m.reshape(*m.shape[:2], -1, m.shape[-1])
    overlap = {"rows": _overlaps(rows), "columns": _overlaps(rows.swapaxes(2, 3))}
    beside = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, -1), (0, -1, 0), (-1, 0, 0)]
    for axis, name in enumerate(("keys", "sites")):
        parts = np.moveaxis(m, axis, 0)
        for a, b in itertools.combinations(range(len(parts)), 2):
            yield f"pairs, {name} {a} {b}", z(parts[a], parts[b])
            for offset in beside:
                one, two = shifted(parts[a], here, offset)[0], shifted(parts[b], here, offset)[1]
                yield f"pairs {offset} apart, {name} {a} {b}", z(one, two)
        for a, b, c in itertools.islice(itertools.combinations(range(len(parts)), 3), 20):
            yield f"triples, {name} {a} {b} {c}", z(parts[a], parts[b], parts[c])
        # Words that serve two masks: how far two rows overlap in one tells it of the other.
        for kind, overlaps in overlap.items():
            together = overlaps.sum(axis) ** 2 - (overlaps**2).sum(axis)
            value = together.sum() / math.sqrt((together**2).sum())
            yield f"overlaps of {kind}, {name}", float(value)


def _overlaps(m: np.ndarray) -> np.ndarray:
    """The inner products of all pairs of rows of each (…, rows, columns): (…, pairs)."""
    one, two = np.triu_indices(m.shape[-2], 1)
    return np.matmul(m, m.swapaxes(-1, -2))[..., one, two]


def failures(masks: np.ndarray, rate: float) -> list[tuple[str, float]]:
    """The statistics beyond the limit, the worst first."""
    values = dict(battery(masks, rate))
    count = len(values)
    values["all z"] = (sum(z**2 for z in values.values()) - count) / math.sqrt(2 * count)
    limit = NormalDist().inv_cdf(1 - LEVEL / (2 * len(values)))
    bad = [(name, round(z, 1)) for name, z in values.items() if not abs(z) <= limit]
    return sorted(bad, key=lambda item: -abs(item[1]))


@pytest.mark.parametrize("kind", ["residual", "attention"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_masks_pass(kind, rate):
    assert not failures(masks_of(*drawn_words(kind), rate), rate)


@pytest.mark.parametrize("kind", ["residual", "attention"])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_the_keep_rate(kind, rate):
    keep = masks_of(*drawn_words(kind), rate)
    assert abs(keep.sum() - (1 - rate) * keep.size) < 4 * math.sqrt(rate * (1 - rate) * keep.size)


# Deliberately poor masks: each fails, by the statistics that are there for its fault.


def _repeated(array: np.ndarray, axis: int) -> np.ndarray:
    return np.repeat(array.take([0], axis), array.shape[axis], axis)


def _index_times_twice(rows, columns, rate):
    """A hash of the element's index and the site's key: multiply, shift-xor, multiply."""
    shape = (*rows.shape, columns.shape[-1])
    keys = (mix(np.arange(1, rows.shape[0] * rows.shape[1] + 1, dtype=np.uint64)) >> 32).astype(
        "u4"
    )
    hashed = np.arange(math.prod(shape[2:]), dtype=np.uint32) + keys[:, None]
    hashed *= np.uint32(0x9E3779B1)
    hashed ^= hashed >> np.uint32(15)
    hashed *= np.uint32(0x85EBCA6B)
    return (hashed.view(np.int32) >= threshold(rate)).reshape(shape)


def _no_multiplication(rows, columns, rate):
    return (rows[..., None] ^ columns[:, :, None, None]) >= threshold(rate)


def _step_added_to_the_position(rows, columns, rate):
    cells = np.arange(BATCH)[:, None] * LENGTH + np.arange(LENGTH)
    sites = range(rows.shape[1])
    rows = [[words((1, site), cells + key) for site in sites] for key in range(len(KEYS))]
    return masks_of(np.array(rows), _repeated(columns, 0), rate)


POOR = {
    "a hash of the index": (_index_times_twice, "pairs"),
    "no multiplication": (_no_multiplication, "rectangles"),
    "columns not mixed": (
        lambda r, c, p: masks_of(r, np.zeros_like(c) + np.arange(c.shape[-1], dtype="i4"), p),
        "pairs",
    ),
    "the step added to the position": (_step_added_to_the_position, "pairs (0, -1, 0) apart, keys"),
    "the same in every batch row": (
        lambda r, c, p: masks_of(_repeated(r, 2), c, p),
        "pairs (1, 0, 0) apart",
    ),
    "the same at every site": (
        lambda r, c, p: masks_of(_repeated(r, 1), _repeated(c, 1), p),
        "pairs, sites",
    ),
    "the same in every step": (
        lambda r, c, p: masks_of(_repeated(r, 0), _repeated(c, 0), p),
        "pairs, keys",
    ),
    "row words used at every site": (
        lambda r, c, p: masks_of(_repeated(r, 1), c, p),
        "overlaps of rows, sites",
    ),
    "row words used in every step": (
        lambda r, c, p: masks_of(_repeated(r, 0), c, p),
        "overlaps of rows, keys",
    ),
    "column words used at every site": (
        lambda r, c, p: masks_of(r, _repeated(c, 1), p),
        "overlaps of columns, sites",
    ),
    "a keep rate of 0.503 for 0.5": (lambda r, c, p: masks_of(r, c, p - 0.003), "keep rate"),
}


@pytest.mark.parametrize("fault", POOR)
def test_poor_masks_fail(fault):
    make, expected = POOR[fault]
    rate = 0.1 if fault == "a hash of the index" else 0.5
    bad = failures(make(*drawn_words("residual"), rate), rate)
    assert any(expected in name for name, _ in bad), bad[:5]


def test_few_rows_have_masks_that_know_of_each_other():
    """A row's mask follows from one word, so that two words that differ in a few bits give masks
    that are alike (or opposite). At the rate where that shows most, of 2.6 million pairs of rows
    fewer than one in 100,000 overlap by more than 6 standard deviations, and the squared overlap
    of all pairs exceeds that of coin tosses by less than 1%."""
    masks = masks_of(*drawn_words("residual"), 0.5)
    m = masks.reshape(*masks.shape[:2], -1, SPEC.width) - 0.5
    overlaps = _overlaps(m) / (0.25 * math.sqrt(SPEC.width))
    assert overlaps.size > 2.6e6
    assert (abs(overlaps) > 6).mean() < 1e-5
    assert abs((overlaps**2).mean() - 1) < 0.01
