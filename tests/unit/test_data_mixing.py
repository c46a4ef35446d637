import numpy as np
import pytest

from horovod_lm.data.mixing import CYCLE, Mixer, proportions
from horovod_lm.data.sampler import Sampler


@pytest.mark.parametrize(("temperature", "shares"), [(1, [0.1, 0.9]), (2, [0.25, 0.75])])
def test_shares_by_temperature(temperature, shares):
    assert proportions([100, 900], temperature) == pytest.approx(shares)


def test_a_high_temperature_makes_shares_equal():
    assert proportions([1, 10, 1e9], 1e9) == pytest.approx([1 / 3] * 3)


def test_one_source_is_what_the_sampler_gives():
    mixer, sampler = Mixer([42], [1.0], 3), Sampler(42, 3)
    for step in (0, 1, 7, 1000):
        places = np.arange(step * 11, (step + 1) * 11)
        sources, epochs, units = mixer.take(places)
        assert np.array_equal(units, sampler.take(places)[1]) and not sources.any()
        assert np.array_equal(epochs, places // 42)


def test_sources_get_their_shares_and_each_deals_its_units_in_turn():
    mixer = Mixer([50, 300], [0.2, 0.8], 5)
    assert mixer.counts.sum() == CYCLE
    assert mixer.counts / CYCLE == pytest.approx([0.2, 0.8], abs=1e-4)
    places = np.arange(2 * CYCLE)
    sources, epochs, units = mixer.take(places)
    for source, count in enumerate([50, 300]):
        mine = sources == source
        assert mine.sum() == 2 * mixer.counts[source]
        # Every unit once in an epoch, though places are spread over the cycle.
        dealt = epochs[mine] * count + units[mine]
        assert len(np.unique(dealt)) == mine.sum()
        assert dealt.max() < -(-mine.sum() // count) * count
    # Any stretch has about its share: 3 standard deviations of 1000 draws without replacement.
    stretches = sources[: CYCLE // 1000 * 1000].reshape(-1, 1000).mean(axis=1)
    assert np.abs(stretches - 0.8).max() < 5 * 0.0127


def test_a_place_is_found_at_once():
    mixer = Mixer([50, 300, 7], [1, 5, 0.001], 5)
    whole = mixer.take(np.arange(5000))
    part = mixer.take(np.arange(4000, 4100))
    for given, expected in zip(part, whole, strict=True):
        assert np.array_equal(given, expected[4000:4100])
    assert mixer.counts.min() >= 1
    far = mixer.take(np.array([10**15]))
    assert 0 <= far[2][0] < 300


def test_golden_values():
    # Integer arithmetic: the same on every machine, or old runs can't be resumed.
    sources, epochs, units = Mixer([10, 20], [0.5, 0.5], 1).take(np.arange(6))
    assert (sources.tolist(), epochs.tolist(), units.tolist()) == GOLDEN


GOLDEN = ([1, 1, 1, 0, 0, 1], [1530, 250, 1100, 477, 2003, 899], [2, 14, 1, 7, 9, 14])
