"""Ranks compare digests of all that they should share (threads stand for ranks)."""

import numpy as np
import pytest

from horovod_lm.backend import EngineState
from horovod_lm.drift import compare_replicas
from horovod_lm.errors import RunFailed
from tests.helpers import on_ranks

NAMES = ("embeddings.tokens", "decoder.0.attention.query.kernel", "decoder.norm.scale")


def state() -> EngineState:
    rng = np.random.default_rng(3)

    def table() -> dict[str, np.ndarray]:
        return {name: rng.standard_normal((4, 3)).astype(np.float32) for name in NAMES}

    return EngineState(table(), {"first": table(), "second": table()}, updates=7)


def compare(ranks, damage=None, scaler=None, step=9):
    def one(communicator):
        mine = state()
        if damage:
            damage(communicator.rank, mine)
        scales = scaler(communicator.rank) if scaler else {"scale": 4.0}
        compare_replicas(communicator, mine, scales, step)
        return communicator.calls

    return on_ranks(ranks, one)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equal_replicas_cost_one_allgather_of_32_bytes(ranks):
    for calls in compare(ranks):
        assert calls == [("allgather", 32)]


def damage_weight(rank, mine):
    if rank == 2:
        mine.weights["decoder.norm.scale"][1, 1] = np.nextafter(
            mine.weights["decoder.norm.scale"][1, 1], np.float32(9)
        )
        mine.moments["first"]["embeddings.tokens"][0, 0] += 1


def damage_sign_of_zero(rank, mine):
    mine.weights["embeddings.tokens"][:] = -0.0 if rank == 2 else 0.0


def damage_moment(rank, mine):
    if rank == 2:
        mine.moments["second"]["embeddings.tokens"][0, 0] += 1


def damage_updates(rank, mine):
    mine.updates += rank == 2


def damage_shape(rank, mine):
    if rank == 2:
        mine.weights["embeddings.tokens"] = mine.weights["embeddings.tokens"].reshape(3, 4)


def lose_a_moment(rank, mine):
    if rank == 2:
        mine.moments = {}


@pytest.mark.parametrize(
    ("damage", "first", "parts"),
    [
        (damage_weight, "weight decoder.norm.scale", 2),
        (damage_sign_of_zero, "weight embeddings.tokens", 1),
        (damage_moment, "second moment of embeddings.tokens", 1),
        (damage_updates, "updates", 1),
        (damage_shape, "weight embeddings.tokens", 1),
        (lose_a_moment, "first moment of decoder.0.attention.query.kernel", 6),
    ],
)
def test_a_difference_names_the_first_part_and_the_rank(damage, first, parts):
    errors = compare(4, damage)
    assert {type(error) for error in errors} == {RunFailed}
    assert len({str(error) for error in errors}) == 1, "every rank says the same"
    message = str(errors[0])
    assert f"at step 9: {first} on rank 2 is not that of ranks 0, 1, 3;" in message
    assert f"in all, {parts} of 12 parts differ" in message


def test_the_scaler_is_compared_too():
    errors = compare(2, scaler=lambda rank: {"scale": 4.0 / (1 + rank), "skipped": 0})
    assert "loss scaler's scale on rank 1 is not that of rank 0;" in str(errors[0])


def test_whole_and_real_counts_of_the_scaler_are_the_same_number():
    # A checkpoint gives the counts back as floats; the rank that wrote it has integers.
    for result in compare(2, scaler=lambda rank: {"skipped": 3.0 if rank else 3}):
        assert result == [("allgather", 32)]


def test_with_two_ranks_the_other_one_is_named():
    def damage(rank, mine):
        mine.weights["embeddings.tokens"] += rank

    assert "weight embeddings.tokens on rank 1 is not that of rank 0;" in str(compare(2, damage)[1])


def test_steps_that_differ_are_found():
    def one(communicator):
        compare_replicas(communicator, state(), {}, step=5 + communicator.rank)

    assert all("step on rank 1" in str(error) for error in on_ranks(2, one))
