"""A watchdog bites where a collective waits too long, and nowhere else."""

import threading
import time

import pytest

from horovod_lm.watchdog import Watchdog
from tests.helpers import on_ranks


class Bitten:
    def __init__(self):
        self.event, self.said = threading.Event(), None

    def __call__(self, message, exit_code):
        self.said = message, exit_code
        self.event.set()


@pytest.fixture
def bitten():
    return Bitten()


class Slow:
    """A communicator one of whose calls takes long."""

    rank = 3

    def barrier(self, seconds=0.0):
        time.sleep(seconds)
        return "done"


def test_a_call_that_waits_too_long_is_reported(bitten):
    communicator = Watchdog(0.1, bitten, tick=0.02).communicator(Slow())
    assert communicator.rank == 3
    assert communicator.barrier(0.5) == "done"
    assert bitten.said == (
        "a collective failed, since another rank does not answer; waited for 0.1 seconds",
        1,
    )


def test_short_calls_and_long_work_between_them_are_not(bitten):
    communicator = Watchdog(0.1, bitten, tick=0.02).communicator(Slow())
    for _ in range(20):
        communicator.barrier(0.01)
    time.sleep(0.3)
    assert not bitten.event.is_set()


def test_a_limit_holds_inside_and_the_old_one_after(bitten):
    watchdog = Watchdog(5.0, bitten, tick=0.02)
    communicator = watchdog.communicator(Slow())
    with watchdog.limit(0.1, "they talk past each other", 2):
        communicator.barrier(0.01)
    communicator.barrier(0.3)
    assert not bitten.event.is_set()
    with watchdog.limit(0.1, "they talk past each other", 2):
        communicator.barrier(0.3)
    assert bitten.said == ("they talk past each other; waited for 0.1 seconds", 2)


def test_an_error_of_a_call_comes_through(bitten):
    communicator = Watchdog(0.1, bitten, tick=0.02).communicator(Slow())
    with pytest.raises(TypeError):
        communicator.barrier("long")
    time.sleep(0.3)
    assert not bitten.event.is_set()


def test_a_watched_communicator_is_a_communicator(bitten):
    def work(inner):
        communicator = Watchdog(5.0, bitten).communicator(inner)
        return communicator.allgather(bytes([communicator.rank])), communicator.size

    assert on_ranks(2, work) == [([b"\0", b"\1"], 2)] * 2
