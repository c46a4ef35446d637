import math
from collections import Counter

import numpy as np
import pytest

from horovod_lm.data.sampler import Sampler


def stream(sampler, count):
    """The first `count` windows of the endless order."""
    steps = -(-count // sampler.batch_size)
    return np.concatenate([sampler.rows(step) for step in range(steps)])[:count]


@pytest.mark.parametrize("windows", [1, 2, 3, 5, 16, 17, 100, 4409, 65536])
def test_each_epoch_is_a_permutation(windows):
    order = stream(Sampler(windows, max(1, windows // 3), seed=4), 3 * windows)
    for epoch in range(3):
        part = order[epoch * windows : (epoch + 1) * windows]
        assert np.array_equal(np.sort(part), np.arange(windows))


def test_golden_values():
    # Integer arithmetic only: the same on every machine, for ever, or old runs can't be resumed.
    assert Sampler(10, 4, 1).rows(0).tolist() == [7, 3, 2, 5]
    assert Sampler(10, 4, 1).rows(2).tolist() == [9, 1, 7, 0]
    far = Sampler(1_000_003, 8, 2**63 - 1).rows(12_345_678)
    assert far.tolist() == [897898, 786257, 609707, 973539, 867372, 95599, 774527, 476763]
    assert far.dtype == np.int64


def test_the_order_does_not_depend_on_the_batch_size():
    orders = [stream(Sampler(101, size, seed=9), 300) for size in (1, 7, 16, 250)]
    for order in orders[1:]:
        assert np.array_equal(order, orders[0])


def test_epochs_and_seeds_have_orders_of_their_own():
    windows = 1000
    orders = [
        Sampler(windows, windows, seed).rows(epoch) for seed in (0, 1, 2**62) for epoch in (0, 1, 2)
    ]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            # Two independent permutations have one place in common on average.
            assert (a == b).sum() < 10


def test_places_look_uniform():
    # Chi-square of the first window over seeds and over epochs: mean 49, standard deviation 9.9.
    for draws in (
        [Sampler(50, 1, seed).rows(0)[0] for seed in range(5000)],
        [Sampler(50, 50, 3).rows(epoch)[0] for epoch in range(5000)],
    ):
        counts = np.bincount(draws, minlength=50)
        assert ((counts - 100) ** 2 / 100).sum() < 49 + 4 * 9.9


def test_neighbours_are_not_related():
    windows = 10_000
    order = Sampler(windows, windows, 5).rows(0)
    for lag in (1, 2, 100):  # 100 is the side of the square that the network works on
        correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
        assert abs(correlation) < 4 / math.sqrt(windows)
    assert (np.diff(order) == 1).sum() < 10


def test_every_small_order_occurs():
    orders = Counter(tuple(Sampler(4, 4, seed).rows(0)) for seed in range(2400))
    assert len(orders) == 24
    assert min(orders.values()) > 50


def test_fewer_windows_than_a_batch_repeat():
    rows = Sampler(3, 8, 1).rows(0)
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]
