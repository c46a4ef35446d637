"""Intervals hold the truth as often as they say, and tests err as seldom as they say."""

import statistics

import numpy as np
import pytest

from horovod_lm.statistics import (
    LEAST_ROUNDS,
    Interval,
    bootstrap,
    equivalence,
    median,
    ratio,
    student_quantile,
)

TRIALS = 400


def coverage(count, draw, truth):
    """Share of trials whose interval of the median holds the true one."""
    held = 0
    for trial in range(TRIALS):
        interval = bootstrap(draw(np.random.default_rng(trial), count).tolist(), resamples=500)
        held += not interval.excludes(truth)
    return held / TRIALS


DRAWS = {
    "normal": (lambda source, count: source.normal(1.0, 0.1, count), 1.0),
    # a machine that is now and then busy: most times near the least, a few far above
    "skewed": (lambda source, count: source.lognormal(0.0, 0.5, count), 1.0),
}


@pytest.mark.parametrize("count", [LEAST_ROUNDS, 7, 8, 12, 25])
@pytest.mark.parametrize("shape", DRAWS)
def test_a_bootstrap_interval_holds_the_true_median_as_often_as_it_says(shape, count):
    draw, truth = DRAWS[shape]
    share = coverage(count, draw, truth)
    assert share > 0.95 - 0.03, share  # 400 trials know a share of 0.95 to 0.011 (one sigma)


def test_fewer_rounds_than_the_least_hold_it_less_often():
    assert 2 * 0.5 ** (LEAST_ROUNDS - 1) > 0.05 >= 2 * 0.5**LEAST_ROUNDS


def test_an_interval_narrows_with_more_values():
    source = np.random.default_rng(1)
    widths = []
    for count in (10, 100, 1000):
        interval = bootstrap(source.normal(0, 1, count).tolist(), resamples=1000)
        widths.append(interval.high - interval.low)
    assert widths == sorted(widths, reverse=True)
    assert widths[2] == pytest.approx(2 * 1.96 * 1.2533 / 1000**0.5, rel=0.15)


def test_of_few_values_no_interval_is_wider_than_their_span():
    assert bootstrap([3.0, 1.0, 2.0]) == Interval(1.0, 3.0, 0.95)
    assert bootstrap([3.0]) == Interval(3.0, 3.0, 0.95)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_the_same_values_give_the_same_interval():
    values = np.random.default_rng(2).normal(0, 1, 30).tolist()
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, statistics.fmean, level=0.5) == bootstrap(
        values, statistics.fmean, level=0.5
    )


def test_other_statistics_and_levels():
    values = np.random.default_rng(3).normal(5, 1, 200).tolist()
    interval = bootstrap(values, statistics.fmean, level=0.9)
    half = 1.645 * statistics.stdev(values) / 200**0.5
    assert interval.low == pytest.approx(statistics.fmean(values) - half, abs=0.02)
    assert interval.high == pytest.approx(statistics.fmean(values) + half, abs=0.02)


def test_a_median_comes_with_its_interval():
    values = [3.0, 1.0, 2.0, 9.0, 2.5, 1.5, 2.2]
    assert median(values) == (2.2, bootstrap(values))


def test_a_ratio_is_the_median_of_the_paired_ratios():
    # each round is twice as slow as the one before; the pairs keep their ratio
    second = [100 / 2**i for i in range(7)]
    ratios = (1.1, 1.2, 1.1, 1.3, 1.1, 1.2, 1.4)
    first = [value * r for value, r in zip(second, ratios, strict=True)]
    middle, interval = ratio(first, second)
    assert middle == pytest.approx(1.2)
    assert interval.low == pytest.approx(1.1) and interval.high == pytest.approx(1.4)
    assert interval.excludes(1.0)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [  # from published tables
        (0.95, 1, 6.313752), (0.95, 2, 2.919986), (0.95, 3, 2.353363), (0.95, 4, 2.131847),
        (0.975, 1, 12.7062), (0.975, 5, 2.570582), (0.975, 6, 2.446912), (0.975, 30, 2.042272),
        (0.995, 10, 3.169273), (0.975, 120, 1.979930),
    ],
)  # fmt: skip
def test_quantiles_of_student_t(probability, freedom, expected):
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-5)


def said_the_same(mean, count, margin=1.0, deviation=0.5, trials=4000):
    source = np.random.default_rng(7)
    drawn = source.normal(mean, deviation, (trials, count)).tolist()
    return sum(equivalence(row, margin).same for row in drawn) / trials


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_a_difference_at_the_margin_is_seldom_called_the_same(count):
    assert said_the_same(1.0, count) < 0.05 + 0.011  # three sigma of 4000 trials
    assert said_the_same(-1.3, count) < 0.05


def test_no_difference_is_called_the_same_with_enough_pairs_alone():
    assert said_the_same(0.0, 2) < 0.3
    assert said_the_same(0.0, 5) > 0.8
    assert said_the_same(0.0, 10) > 0.99


def test_what_an_equivalence_test_says():
    result = equivalence([0.01, 0.03, 0.02], margin=0.05)
    assert result.mean == pytest.approx(0.02)
    half = 2.919986 * 0.01 / 3**0.5
    assert result.interval.low == pytest.approx(0.02 - half, rel=1e-5)
    assert result.interval.level == pytest.approx(0.9)
    assert result.same
    assert not equivalence([0.01, 0.03, 0.02], margin=0.03).same
    with pytest.raises(ValueError, match="at least 2"):
        equivalence([0.01], margin=1.0)
