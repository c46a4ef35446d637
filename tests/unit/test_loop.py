"""The loop over an engine in NumPy, with ranks as threads."""

import math
import os
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest

from horovod_lm.backend import INTERRUPT, STOP, EngineSettings, EngineState
from horovod_lm.config import make_config
from horovod_lm.data.batches import Batches
from horovod_lm.errors import CollectiveFailed, RunFailed
from horovod_lm.loop import PARTS, Clock, Run, train_steps
from horovod_lm.loss_scale import LossScaler
from horovod_lm.objectives.registry import causal_windows
from horovod_lm.train import listening, loss_names, make_engine
from tests.helpers import on_ranks
from tests.numpy_backend import TABLE, NumpyEngine

VOCABULARY, CONTEXT = 11, 8


class Stream:
    """Tokens in which each one says much about the next."""

    def __init__(self, length=500):
        noise = np.random.default_rng(0).integers(0, 2, length)
        self._tokens = (np.cumsum(noise + 1) % VOCABULARY).astype(np.int32)

    def __len__(self):
        return len(self._tokens)

    def read(self, start, count):
        return self._tokens[start : start + count]


def make_run(communicator, *, steps=12, micro=None, precision="fp32", scale=None, start=0, batch=6):
    config = make_config(
        {
            "model": {"width": 8, "heads": 1, "context": CONTEXT},
            "train": {
                "steps": steps,
                "global_batch_size": batch,
                "micro_batch_size": micro,
                "precision": precision,
            },
            "loss_scale": scale or {},
        },
        "the test",
    )
    batches = Batches(
        causal_windows(Stream(), CONTEXT, batch, seed=1),
        micro_batch_size=micro,
        rank=communicator.rank,
        ranks=communicator.size,
    )
    scaler = LossScaler(config.loss_scale, precision == "fp16")
    engine = NumpyEngine(communicator, VOCABULARY)
    return Run(config, engine, communicator, batches, scaler, lambda updates: 5.0, step=start)


class Recorder:
    """A hook that notes what it sees."""

    def __init__(self, every=1, do=None):
        self.every, self.do = every, do
        self.steps, self.losses, self.seen = [], [], []

    def __call__(self, run, reduced):
        run.clock.end()
        self.steps.append(run.step)
        self.losses.append(reduced.losses["lm"])
        self.seen.append((run.loss_scale, run.scaler.skipped, run.updates))
        if self.do:
            self.do(run, reduced)


def train_on(ranks, hooks=None, change=None, **options):
    """Train on threads; for each rank its recorder, or its error."""

    def work(communicator):
        run = make_run(communicator, **options)
        if change:
            change(run)
        recorder = Recorder()
        train_steps(run, [recorder, *(hooks(run) if hooks else [])])
        recorder.run = run
        return recorder

    return on_ranks(ranks, work)


@pytest.mark.parametrize(
    ("ranks", "micro", "batch"), [(2, None, 6), (4, 1, 6), (4, None, 6), (1, 4, 6), (4, None, 3)]
)
def test_the_curve_depends_on_neither_ranks_nor_micro_batches(ranks, micro, batch):
    whole = train_on(1, batch=batch)[0]
    assert whole.losses[0] == pytest.approx(math.log(VOCABULARY))
    assert whole.losses[-1] < whole.losses[0] - 0.2
    for recorder in train_on(ranks, micro=micro, batch=batch):
        assert np.abs(np.subtract(recorder.losses, whole.losses)).max() < 1e-12


def test_a_resumed_run_repeats_the_whole_one():
    whole = train_on(1)[0]

    def resume(run):
        first = train_on(1, steps=5)[0]
        run.engine.table = first.run.engine.table.copy()
        run.updates = run.engine.updates = first.run.updates

    again = train_on(1, change=resume, start=5)[0]
    assert again.steps == list(range(6, 13))
    assert again.losses == whole.losses[5:]
    assert (again.run.engine.table == whole.run.engine.table).all()


def test_hooks_come_in_their_order_when_every_divides_the_step_and_at_the_end():
    calls = []

    def hooks(run):
        def note(name):
            return lambda run, reduced: calls.append((name, run.step))

        return [
            Recorder(every, note(name)) for name, every in (("a", 5), ("b", 4), ("c", 0), ("d", 5))
        ]

    train_on(1, hooks)
    assert calls == [
        ("b", 4), ("a", 5), ("d", 5), ("b", 8), ("a", 10), ("d", 10),
        ("a", 12), ("b", 12), ("c", 12), ("d", 12),
    ]  # fmt: skip


def overflow_on(rank, steps):
    """A change of a run: `rank` gets an infinite loss scale at `steps`."""

    def change(run):
        if run.communicator.rank == rank:
            plain = run.engine.forward_backward
            run.engine.forward_backward = lambda micro, step, scale: plain(
                micro, step, math.inf if step in steps else scale
            )

    return change


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_overflow_of_one_rank_skips_the_step_on_all():
    rates = []

    def hooks(run):
        return [Recorder(1, lambda run, reduced: rates.append(reduced.tensor))]

    scale = {"initial": 8.0, "growth_interval": 4}
    recorders = train_on(2, hooks, overflow_on(1, {2, 3}), precision="fp16", scale=scale, steps=10)
    expected = [
        (8, 0, 1), (8, 0, 2), (8, 1, 2), (4, 2, 2), (2, 2, 3),
        (2, 2, 4), (2, 2, 5), (2, 2, 6), (4, 2, 7), (4, 2, 8),
    ]  # fmt: skip
    assert recorders[0].seen == recorders[1].seen == expected
    assert recorders[0].run.engine.updates == 8
    assert rates.count(TABLE) == 4  # two steps on two ranks


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("precision", "words"),
    [("fp16", "at its minimum"), ("fp32", "this precision has no loss scale")],
)
def test_an_overflow_that_no_scale_helps_ends_all_ranks_with_one_message(precision, words):
    scale = {"initial": 1.0, "minimum": 1.0}
    errors = train_on(2, None, overflow_on(1, {3}), precision=precision, scale=scale)
    for error in errors:
        assert isinstance(error, RunFailed)
        assert str(error).startswith(f"step 4 (first in {TABLE}, on rank 1): the gradient")
        assert words in str(error)
    assert [error.shown_by_me for error in errors] == [True, False]


@pytest.mark.parametrize("part", ["data", "forward", "update", "hook"])
def test_an_error_of_one_rank_ends_all_at_the_same_step(part):
    def fail(*_):
        raise OSError(5, "Input/output error", "shard")

    def change(run):
        if run.communicator.rank != 1:
            return
        if part == "forward":
            run.engine.forward_backward = fail
        if part == "update":
            run.engine.apply_gradients = fail
        if part == "data":
            batches = run.batches

            class Failing:
                @contextmanager
                def ahead(self, start):
                    with batches.ahead(start) as stream:
                        yield (fail() if step == 4 else batch for step, batch in enumerate(stream))

            run.batches = Failing()

    steps = []

    def hooks(run):
        def last(run, reduced):
            steps.append(run.step)
            if part == "hook" and run.communicator.rank == 1 and run.step == 4:
                fail()

        return [Recorder(1, last)]

    errors = train_on(2, hooks, change)
    assert [str(error) for error in errors] == ["rank 1: shard: input/output error"] * 2
    assert [error.shown_by_me for error in errors] == [False, True]
    done = {"data": 4, "forward": 0, "update": 1, "hook": 4}[part]
    assert sorted(steps) == sorted([*range(1, done + 1)] * 2)


def test_an_error_in_the_last_hook_is_not_lost():
    def hooks(run):
        def fail(run, reduced):
            if run.communicator.rank == 1:
                raise ValueError("too late")

        return [Recorder(0, fail)]

    errors = train_on(2, hooks)
    assert [str(error) for error in errors] == ["rank 1: ValueError: too late"] * 2


def test_a_broken_collective_goes_on_at_once():
    def change(run):
        def fail(status):
            raise CollectiveFailed("rank 1 has ended")

        run.engine.reduce_gradients = fail

    assert type(train_on(1, None, change)[0]) is CollectiveFailed


@pytest.mark.parametrize(
    ("signals", "stopped"),
    [({1: STOP}, STOP), ({0: STOP, 1: INTERRUPT}, INTERRUPT), ({1: STOP | INTERRUPT}, 3)],
)
def test_a_signal_on_one_rank_stops_all_after_the_same_step(signals, stopped):
    def hooks(run):
        def come(run, reduced):
            if run.step == 3:
                run.signal = signals.get(run.communicator.rank, 0)

        return [Recorder(1, come), Recorder(0)]

    for recorder in train_on(2, hooks):
        assert recorder.steps == [1, 2, 3, 4]
        assert recorder.run.last and recorder.run.stopped == stopped


def test_signals_become_bits_and_a_second_ctrl_c_ends_at_once():
    run = make_run(*on_ranks(1, lambda communicator: communicator))
    before = signal.getsignal(signal.SIGTERM)
    with listening(run):
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.signal == STOP
        os.kill(os.getpid(), signal.SIGUSR1)
        assert run.signal == STOP
        os.kill(os.getpid(), signal.SIGINT)
        assert run.signal == STOP | INTERRUPT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_parts_of_every_tenth_step_sum_to_its_seconds():
    parts = {}

    def work(communicator):
        run = make_run(communicator, steps=20)

        class Timer:
            every = 1

            def __call__(self, run, reduced):
                with run.clock.pause():
                    time.sleep(0.003)
                seconds = run.clock.end()
                if run.clock.parts is not None:
                    parts[run.step] = seconds, dict(run.clock.parts)

        begin = time.perf_counter()
        train_steps(run, [Timer()])
        return time.perf_counter() - begin

    on_ranks(1, work)
    assert list(parts) == [10, 20]
    for seconds, named in parts.values():
        assert list(named) == [*PARTS, "other"]
        assert all(part >= 0 for part in named.values())
        assert sum(named.values()) == pytest.approx(seconds, rel=1e-9)


def test_a_pause_belongs_to_no_step_and_parts_wait_for_the_device():
    waits = []
    clock = Clock(lambda: waits.append(1))
    clock.begin(timed=True)
    clock.part("data")
    with clock.pause():
        time.sleep(0.05)
    assert clock.end() < 0.04
    assert waits == [1]
    clock.begin(timed=False)
    clock.part("data")
    time.sleep(0.02)
    assert clock.end() >= 0.02 and clock.parts is None and waits == [1]


def test_numpy_engine_is_a_whole_engine():
    """Its gradient equals differences of its loss, so that the tests above mean something."""
    (run,) = on_ranks(1, make_run)
    engine = run.engine
    table = np.random.default_rng(2).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
    micro = run.batches[0].micros[0]

    def loss(values):
        engine.load_state(EngineState({TABLE: values}))
        engine.forward_backward(micro, 0, 1.0)
        return engine.reduce_gradients().losses["lm"]

    loss(table)
    gradient = engine.gradients()[TABLE]
    step = np.zeros_like(table)
    step[3, 4] = 2**-7
    slope = (loss(table + step) - loss(table - step)) / 2**-6
    assert gradient[3, 4] == pytest.approx(slope, rel=1e-3)


def test_an_engine_gets_the_settings_of_its_config():
    """Each of them, set to what is not the default."""
    train = {"precision": "fp64", "seed": 5, "dropout_generator": "native", "recompute": True}
    adam = {"name": "adam", "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3}
    sgd = {"name": "sgd", "momentum": 0.7, "weight_decay": 0.3}
    objectives = [{"name": "causal_lm"}, {"name": "prefix_lm"}]

    class Backend:
        def engine(self, *given):
            return given

    left = vars(EngineSettings()).copy()
    for optimizer in (adam, sgd):
        values = {"train": train, "optimizer": optimizer, "objective": objectives}
        config = make_config(values, "the test")
        spec, settings, communicator = make_engine(config, Backend(), "communicator")
        assert (spec, communicator) == (config.model, "communicator")
        expected = {"loss_names": loss_names(config), **train, **optimizer}
        expected["optimizer"] = expected.pop("name")
        for name, value in expected.items():
            assert getattr(settings, name) == value != getattr(EngineSettings(), name), name
            left.pop(name, None)
    assert not left, "settings that are as they were"
    assert make_engine(config, Backend(), None, "bf16")[1].precision == "bf16"
