"""Ranks fail together, with one message."""

import pytest

from horovod_lm.agreement import agree, agreed, explain, together
from horovod_lm.errors import CollectiveFailed, RunFailed, UserError
from tests.helpers import on_ranks


def raised(results):
    return [(type(e), str(e), e.shown_by_me) for e in results]


def test_nothing_is_raised_where_no_rank_has_an_error():
    assert on_ranks(3, lambda communicator: agree(communicator, None)) == [None] * 3


def test_an_error_of_one_rank_is_raised_on_all_and_shown_by_that_one():
    def work(communicator):
        agree(communicator, UserError("no text") if communicator.rank == 1 else None)

    expected = [(UserError, "rank 1: no text", rank == 1) for rank in range(3)]
    assert raised(on_ranks(3, work)) == expected


def test_the_lowest_failing_rank_speaks_for_different_errors():
    def work(communicator):
        error = OSError(28, "No space left on device", "/data/x")
        agree(communicator, [None, error, UserError("no text")][communicator.rank])

    message = "rank 1: /data/x: no space left on device"
    assert raised(on_ranks(3, work)) == [(RunFailed, message, rank == 1) for rank in range(3)]


def test_an_error_that_all_share_has_no_rank_in_it():
    def work(communicator):
        agree(communicator, RunFailed("drifted"))

    assert raised(on_ranks(2, work)) == [
        (RunFailed, "drifted", True),
        (RunFailed, "drifted", False),
    ]


def test_work_of_each_rank_is_agreed_on_at_its_end():
    done = []

    def work(communicator):
        with agreed(communicator):
            done.append(communicator.rank)
            if communicator.rank == 0:
                raise KeyError("tokens")
        done.append("not reached")

    results = on_ranks(2, work)
    assert raised(results) == [(RunFailed, "rank 0: KeyError: 'tokens'", r == 0) for r in (0, 1)]
    assert sorted(done) == [0, 1]
    assert isinstance(results[0].__cause__, KeyError)


def test_a_broken_collective_asks_nobody():
    """The others are gone: another collective would wait for good."""

    def work(communicator):
        if communicator.rank == 1:
            with agreed(communicator):
                raise CollectiveFailed("rank 0 has ended")

    none, error = on_ranks(2, work)
    assert none is None and type(error) is CollectiveFailed


def test_errors_in_plain_words():
    known = UserError("no text")
    assert explain(known) is known
    assert str(explain(OSError(28, "No space left on device"))) == "no space left on device"
    assert str(explain(ZeroDivisionError("by zero"))) == "ZeroDivisionError: by zero"


@pytest.mark.parametrize("shower", [0, 1])
def test_one_rank_shows_what_all_raise(shower):
    def work(communicator):
        return together(RunFailed("x"), communicator, shower).shown_by_me

    assert on_ranks(2, work) == [shower == 0, shower == 1]
