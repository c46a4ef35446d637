import math
from collections import Counter

import numpy as np
import pytest

from horovod_lm.data.sampler import Sampler


def rows(windows, size, seed, step=0):
    """The windows of the batch of `size` places after `step` others."""
    return Sampler(windows, seed).take(np.arange(step * size, (step + 1) * size))[1]


def stream(windows, size, seed, count):
    """The first `count` windows of the endless order, batch by batch."""
    steps = -(-count // size)
    return np.concatenate([rows(windows, size, seed, step) for step in range(steps)])[:count]


@pytest.mark.parametrize("windows", [1, 2, 3, 5, 16, 17, 100, 4409, 65536])
def test_each_epoch_is_a_permutation(windows):
    order = stream(windows, max(1, windows // 3), 4, 3 * windows)
    for epoch in range(3):
        part = order[epoch * windows : (epoch + 1) * windows]
        assert np.array_equal(np.sort(part), np.arange(windows))


def test_golden_values():
    # Integer arithmetic only: the same on every machine, for ever, or old runs can't be resumed.
    assert rows(10, 4, 1).tolist() == [7, 3, 2, 5]
    assert rows(10, 4, 1, 2).tolist() == [9, 1, 7, 0]
    far = rows(1_000_003, 8, 2**63 - 1, 12_345_678)
    assert far.tolist() == [897898, 786257, 609707, 973539, 867372, 95599, 774527, 476763]
    assert far.dtype == np.int64


def test_the_order_does_not_depend_on_the_batch_size():
    orders = [stream(101, size, 9, 300) for size in (1, 7, 16, 250)]
    for order in orders[1:]:
        assert np.array_equal(order, orders[0])


def test_epochs_and_seeds_have_orders_of_their_own():
    windows = 1000
    orders = [rows(windows, windows, seed, epoch) for seed in (0, 1, 2**62) for epoch in (0, 1, 2)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            # Two independent permutations have one place in common on average.
            assert (a == b).sum() < 10


def test_places_look_uniform():
    # Chi-square of the first window over seeds and over epochs: mean 49, standard deviation 9.9.
    for draws in (
        [rows(50, 1, seed)[0] for seed in range(5000)],
        [rows(50, 50, 3, epoch)[0] for epoch in range(5000)],
    ):
        counts = np.bincount(draws, minlength=50)
        assert ((counts - 100) ** 2 / 100).sum() < 49 + 4 * 9.9


def test_neighbours_are_not_related():
    windows = 10_000
    order = rows(windows, windows, 5)
    for lag in (1, 2, 100):  # 100 is the side of the square that the network works on
        correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
        assert abs(correlation) < 4 / math.sqrt(windows)
    assert (np.diff(order) == 1).sum() < 10


def test_every_small_order_occurs():
    orders = Counter(tuple(rows(4, 4, seed)) for seed in range(2400))
    assert len(orders) == 24
    assert min(orders.values()) > 50


def test_fewer_windows_than_a_batch_repeat():
    order = rows(3, 8, 1)
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2]
