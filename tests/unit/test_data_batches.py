import threading
import time

import numpy as np
import pytest

from horovod_lm.data.batches import Batches, share, validation_batches
from horovod_lm.data.feeds import FILLER, Feed
from horovod_lm.data.layout import Single
from horovod_lm.data.sampler import Sampler
from horovod_lm.data.shards import Tokens, TokenWriter
from horovod_lm.objectives import Corpus
from horovod_lm.objectives.causal_lm import CausalLM
from horovod_lm.objectives.registry import causal_windows

CONTEXT = 8
LENGTH = 333  # 42 windows, the last one of 4 targets
SPLITS = [(1, None), (1, 3), (2, None), (2, 2), (4, None), (4, 1), (3, 2), (16, None), (1, 100)]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A stream of 1, 2, 3 …, so that each token tells its place, and 0 only comes from filling."""
    folder = tmp_path_factory.mktemp("tokens")
    with TokenWriter(folder, "train", 1000, shard_tokens=100) as writer:
        writer.write([(np.arange(1, LENGTH + 1, dtype=np.int32), True)])
    return Tokens(folder, writer.finish())


def feeds(tokens, batch, seed, objective=None):
    objective = objective or CausalLM(Corpus("", tokens), CONTEXT)
    return [Feed([objective], [Single(objective, (CONTEXT,))], [1.0], seed=seed, rows=batch)]


def make(tokens, ranks, micro, *, batch=11, seed=3, objective=None):
    return [
        Batches(
            feeds(tokens, batch, seed, objective),
            micro_batch_size=micro,
            rank=rank,
            ranks=ranks,
        )
        for rank in range(ranks)
    ]


def assemble(batches, step, batch=11):
    """The global batch from all ranks: arrays in the order of rows, without the filling."""
    rows = {}
    for rank_batch in (one[step] for one in batches):
        for micro in rank_batch.micros:
            (loss,) = micro.losses
            for i, row in enumerate(micro.rows.tolist()):
                assert row not in rows
                rows[row] = micro.inputs["tokens"][i], loss.targets[i], loss.weights[i]
    assert all(row in rows for row in range(batch))
    for row, (inputs, targets, weights) in rows.items():
        if row >= batch:
            assert not inputs.any() and not targets.any() and not weights.any()
    return [np.stack([rows[row][i] for row in range(batch)]) for i in range(3)]


def test_windows_are_the_tokens_and_their_successors(tokens):
    (feed,) = feeds(tokens, 42, seed=3)
    assert len(feed.objectives[0].lengths) == 42
    (part,) = feed.evenly(0)
    kinds = {kind.name: kind for kind in feed.losses}
    micro = part.micro_batch([0, 41, FILLER, 5], np.arange(4), kinds, {"lm": 20.0}, {"lm": 1.0})
    (loss,) = micro.losses
    assert micro.inputs["tokens"].tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [329, 330, 331, 332, 0, 0, 0, 0],
        [0] * 8,
        [41, 42, 43, 44, 45, 46, 47, 48],
    ]
    assert loss.targets[1].tolist() == [330, 331, 332, 333, 0, 0, 0, 0]
    assert loss.weights.sum(axis=1).tolist() == [8, 4, 0, 8]
    assert (loss.name, loss.head, loss.normaliser, loss.factor) == ("lm", "lm", 20.0, 1.0)
    assert micro.inputs["tokens"].dtype == loss.targets.dtype == np.int32
    assert loss.weights.dtype == np.float32
    assert part.sums() == {"lm": LENGTH - 1}
    assert (loss.positions, loss.smoothing, loss.z_loss) == (None, 0.0, 0.0)
    assert list(micro.inputs) == ["tokens"]


def test_every_token_but_the_first_is_one_target(tokens):
    batches = make(tokens, 1, None, batch=42)
    (micro,) = batches[0][0].micros
    (loss,) = micro.losses
    targets = loss.targets[loss.weights > 0]
    assert np.array_equal(np.sort(targets), np.arange(2, LENGTH + 1))
    assert batches[0][0].targets == LENGTH - 1


@pytest.mark.parametrize("length, windows", [(9, 1), (10, 2), (17, 2), (18, 3), (2, 1)])
def test_the_number_of_windows(tmp_path, length, windows):
    with TokenWriter(tmp_path, "train", 1000) as writer:
        writer.write([(np.ones(length, dtype=np.int32), True)])
    tokens = Tokens(tmp_path, writer.finish())
    (part,) = causal_windows(tokens, CONTEXT, 1, seed=0)[0].evenly(0)
    assert len(part) == windows
    assert part.sums() == {"lm": length - 1}
    assert (part.real(), part.computed()) == (length - 1, windows * CONTEXT)


@pytest.mark.parametrize("ranks, micro", SPLITS)
@pytest.mark.parametrize("batch", [11, 3, 50])
def test_all_ranks_and_micro_batches_see_the_same_global_batches(tokens, ranks, micro, batch):
    reference = make(tokens, 1, None, batch=batch)
    batches = make(tokens, ranks, micro, batch=batch)
    for step in (0, 1, 7, 1000):
        expected = assemble(reference, step, batch)
        for given, wanted in zip(assemble(batches, step, batch), expected, strict=True):
            assert np.array_equal(given, wanted)
        windows = (expected[0][:, 0] - 1) // CONTEXT
        places = np.arange(step * batch, (step + 1) * batch)
        assert np.array_equal(windows, Sampler(42, 3).take(places)[1])


@pytest.mark.parametrize("ranks, micro", SPLITS)
def test_shapes_are_equal_and_the_normaliser_is_the_global_batch_s(tokens, ranks, micro):
    batches = make(tokens, ranks, micro)
    shapes, seen = set(), set()
    for step in range(8):
        total = 0.0
        for one in (rank[step] for rank in batches):
            shapes.add((len(one.micros), *one.micros[0].inputs["tokens"].shape))
            for part in one.micros:
                (loss,) = part.losses
                assert part.rows.dtype == np.int64
                assert part.inputs["tokens"].shape == loss.targets.shape == loss.weights.shape
                total += float(loss.weights.sum())
                seen.add((step, loss.normaliser, one.targets))
        assert (step, total, int(total)) in seen
    assert len(shapes) == 1 and len(seen) == 8
    ((micros, rows, length),) = shapes
    assert length == CONTEXT and rows <= (micro or 11)
    assert micros * rows >= -(-11 // ranks)


def test_rows_are_dealt_evenly_and_in_order():
    assert [list(share(5, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4]]
    assert [len(share(2, rank, 4)) for rank in range(4)] == [1, 1, 0, 0]
    assert list(share(6, 1, 2)) == [3, 4, 5]


def test_micro_batches_are_as_equal_as_they_can_be(tokens):
    (one,) = make(tokens, 1, 8, batch=9)
    assert [len(micro.rows) for micro in one[0].micros] == [5, 5]
    (one,) = make(tokens, 1, 100, batch=9)
    assert [len(micro.rows) for micro in one[0].micros] == [9]


def test_a_batch_smaller_than_the_ranks(tokens):
    batches = make(tokens, 4, None, batch=2)
    weights = [rank[0].micros[0].losses[0].weights.sum() for rank in batches]
    assert weights[0] and weights[1] and weights[2:] == [0, 0]
    assert len({rank[0].targets for rank in batches}) == 1


def test_ahead_gives_the_same_batches_from_any_step(tokens):
    (one,) = make(tokens, 1, None)
    with one.ahead(5) as stream:
        for step in range(5, 30):
            given, expected = next(stream), one[step]
            assert given.targets == expected.targets
            tokens_given = given.micros[0].inputs["tokens"]
            assert np.array_equal(tokens_given, expected.micros[0].inputs["tokens"])


class Failing(CausalLM):
    """Fails at its third micro-batch, as a disk might."""

    made = 0

    def example(self, *arguments):
        self.made += 1
        if self.made == 3 * 11:
            raise OSError("the disk went away")
        return super().example(*arguments)


def test_an_exception_in_the_thread_comes_out_of_next(tokens):
    (one,) = make(tokens, 1, None, objective=Failing(Corpus("", tokens), CONTEXT))
    with one.ahead(0) as stream:
        next(stream)
        next(stream)
        with pytest.raises(OSError, match="the disk went away"):
            next(stream)


class Counting(CausalLM):
    made = 0

    def example(self, *arguments):
        self.made += 1
        return super().example(*arguments)


def test_few_batches_wait_and_leaving_ends_the_thread_at_once(tokens):
    before = threading.active_count()
    objective = Counting(Corpus("", tokens), CONTEXT)
    (one,) = make(tokens, 1, None, objective=objective)
    with one.ahead(0) as stream:
        next(stream)
        time.sleep(0.05)
        assert 11 <= objective.made <= 3 * 11
        assert threading.active_count() == before + 1
        start = time.monotonic()
    assert time.monotonic() - start < 1
    assert threading.active_count() == before


def test_a_body_that_fails_or_never_reads_also_ends_the_thread(tokens):
    before = threading.active_count()
    (one,) = make(tokens, 1, None)
    with one.ahead(0):
        pass
    with pytest.raises(KeyboardInterrupt), one.ahead(0) as stream:
        next(stream)
        raise KeyboardInterrupt
    assert threading.active_count() == before


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("windows", [0, 1, 10, 42, 1000])
def test_validation_is_shared_without_gap_or_overlap(tokens, ranks, windows):
    count = min(windows or 42, 42)
    rows, total = [], 0.0
    for rank in range(ranks):
        for micro in validation_batches(
            feeds(tokens, 1, 0), rows=4, windows=windows, rank=rank, ranks=ranks
        ):
            (loss,) = micro.losses
            assert loss.targets.shape == micro.inputs["tokens"].shape == (4, CONTEXT)
            assert len(set(micro.rows.tolist())) == 4
            real = loss.weights.any(axis=1)
            # Ranks come one after the other here, and so do their rows.
            assert np.array_equal(micro.rows[real], len(rows) + np.arange(real.sum()))
            rows += ((micro.inputs["tokens"][real, 0] - 1) // CONTEXT).tolist()
            total += float(loss.weights.sum())
            normaliser = loss.normaliser
    assert len(rows) == len(set(rows)) == count
    assert rows == sorted(rows) == [i * 42 // count for i in range(count)]
    assert total == normaliser


def test_a_batch_is_made_in_well_under_a_millisecond(tmp_path):
    with TokenWriter(tmp_path, "train", 8192) as writer:
        ids = np.random.default_rng(0).integers(0, 8192, 1_000_000, dtype=np.int32)
        writer.write([(ids, True)])
    tokens = Tokens(tmp_path, writer.finish())
    one = Batches(
        causal_windows(tokens, 256, 16, seed=0),
        micro_batch_size=None,
        rank=0,
        ranks=1,
    )
    times = []
    for step in range(200):
        start = time.perf_counter()
        one[step]
        times.append(time.perf_counter() - start)
    # The quietest of many, since other work may run beside the tests.
    assert min(times) < 1e-3
