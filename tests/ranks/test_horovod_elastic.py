"""Elastic training with Keras 3: what the states keep and send, on two ranks, and whole jobs under
`horovodrun` in which a worker is killed and one is added.

A job's program is this file too. Every step takes one batch, of which each of the workers has an
equal share: whatever the number of workers was, the weights must end as those of one process that
took each batch once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.ranks.mended import (
    BIN,
    LAUNCHERS,
    Jobs,
    end_processes_with,
    environment,
    main,
    package,
    processes_with,
)

MENDS = {
    "python/keras3_elastic": ["keras_states_sync", "built_on_rank_0", "loss_scale", "restores"],
    "python/elastic_tensorflow_state": ["tensorflow_state"],
    "python/elastic_errors": ["other_errors_pass"],
    "python/elastic_attributes": ["attributes"],
    "python/keras_elastic_epochs": ["epochs_counted"],
    "python/keras_elastic_batches": ["batches_counted"],
    "python/elastic_missed_updates": ["told_again"],
    "python/elastic_new_workers": ["slow_start"],
}
AT = 4  # the step at which something happens
ROWS = 12  # of a batch: 1, 2 and 3 workers have equal shares
HOSTS = ("localhost", socket.gethostname(), "127.0.0.1")  # three hosts to horovodrun, all this one


# ---------------------------------------------------------------------------- checks, in each rank


def _model(width: int = 4):
    import keras

    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(width),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
        ]
    )


def _train(model, optimizer, steps: int = 2) -> None:
    """Steps of this rank alone, on data of its own."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    rng = np.random.default_rng(hvd.rank())
    for _ in range(steps):
        with tf.GradientTape() as tape:
            outputs = model(rng.normal(size=(8, 3)).astype("float32"), training=True)
            loss = tf.reduce_mean(tf.cast(outputs, "float32") ** 2)
            scaled = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, [v.value for v in model.trainable_variables])
        optimizer.apply(gradients, model.trainable_variables)


def _values(variables) -> list[np.ndarray]:
    return [np.array(v.numpy()) for v in variables]


def _equal(one, other) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(one, other, strict=True)
    )


def _all_ranks(value) -> list:
    from horovod.tensorflow.functions import allgather_object

    return allgather_object(value, name="of all ranks")


def _assert_equal_to_rank_0(before, after) -> None:
    """`after` is bit by bit what rank 0 had `before`, on every rank, and that differed."""
    had, have = _all_ranks(before), _all_ranks(after)
    assert not _equal(had[0], had[1])
    for values in have:
        assert _equal(values, had[0])


@contextmanager
def _raises(error: type[Exception], words: str) -> Iterator[None]:
    """As pytest.raises, whose failure is no Exception and would end the rank."""
    try:
        yield
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(f"no {error.__name__}: {words}")


def _states() -> list:
    import horovod.keras.elastic
    import horovod.tensorflow.elastic
    import horovod.tensorflow.keras.elastic

    return [
        horovod.keras.elastic.KerasState,
        horovod.tensorflow.keras.elastic.KerasState,
        horovod.tensorflow.elastic.TensorFlowKerasState,
    ]


def keras_states_sync() -> None:
    """All of model and optimizer is rank 0's after sync, though names differ; seeds stay."""
    import horovod.tensorflow as hvd
    import keras

    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    for state_class in _states():
        if hvd.rank() == 1:
            _model()
        model, optimizer = _model(), keras.optimizers.Adam(0.1 / (1 + hvd.rank()))
        state = state_class(model, optimizer, step=hvd.rank() + 5, names=["rank", hvd.rank()])
        _train(model, optimizer, steps=2 + hvd.rank())
        state.step += 10
        before = _values(model.weights + optimizer.variables)
        seeds = _values(v for v in model.variables if "seed" in v.path)
        state.sync()
        _assert_equal_to_rank_0(before, _values(model.weights + optimizer.variables))
        assert len(seeds) == 1
        assert _equal(seeds, _values(v for v in model.variables if "seed" in v.path))
        assert (int(optimizer.iterations), state.step, state.names) == (2, 15, ["rank", 0])


def built_on_rank_0() -> None:
    """An optimizer that only rank 0 has used is whole on the others too."""
    import horovod.tensorflow as hvd
    import keras

    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    for state_class in _states():
        model = _model()
        model.compile(keras.optimizers.AdamW(0.1, use_ema=True, gradient_accumulation_steps=2))
        if hvd.rank() == 0:
            _train(model, model.optimizer, steps=3)
        state = state_class(model)
        before = _values(model.weights + model.optimizer.variables)
        state.sync()
        _assert_equal_to_rank_0(before, _values(model.weights + model.optimizer.variables))
        assert int(model.optimizer._iterations) == 3


def loss_scale() -> None:
    """The loss scale, its counter and the weights of mixed precision."""
    import horovod.tensorflow as hvd
    import keras

    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    for policy in ("mixed_float16", "bfloat16"):
        keras.config.set_dtype_policy(policy)
        try:
            model = _model()
            model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
        finally:
            keras.config.set_dtype_policy("float32")
        optimizer = model.optimizer
        state = _states()[0](model)
        if policy == "mixed_float16":
            optimizer.dynamic_scale.assign(2.0 ** (3 + hvd.rank()))
        _train(model, optimizer, steps=1 + hvd.rank())
        before = _values(model.weights + optimizer.variables)
        state.sync()
        _assert_equal_to_rank_0(before, _values(model.weights + optimizer.variables))
        if policy == "mixed_float16":
            assert float(optimizer.dynamic_scale) == 8


def restores() -> None:
    """`restore` brings back each bit that `commit` saved, seeds and untouched slots too."""
    import horovod.tensorflow as hvd
    import keras

    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    for state_class in _states():
        model, optimizer = _model(), keras.optimizers.Adagrad(0.1)
        state = state_class(model, optimizer, step=0)
        for steps in (0, 2):
            _train(model, optimizer, steps)
            state.step = steps
            saved = _values(model.variables + optimizer.variables)
            state.commit()
            _train(model, optimizer, steps=3)
            state.step += 3
            assert not _equal(saved, _values(model.variables + optimizer.variables))
            state.restore()
            assert _equal(saved, _values(model.variables + optimizer.variables))
            assert state.step == steps


def other_models_are_refused() -> None:
    """Ranks with other layers all say so, and none waits for the others."""
    import horovod.tensorflow as hvd
    import keras

    hvd.init()
    state = _states()[0](_model(4 + hvd.rank()), keras.optimizers.SGD())
    with _raises(ValueError, "same variables on all ranks"):
        state.sync()
    with _raises(ValueError, "no optimizer"):
        _states()[0](_model())


def tensorflow_state() -> None:
    """`TensorFlowState` of TensorFlow's and Keras's variables: sync, commit, restore."""
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    hvd.init()
    variables = [
        tf.Variable([1.0 + hvd.rank(), 2]),
        tf.Variable(hvd.rank() == 0),
        keras.Variable(np.float32([[3 + hvd.rank()]])),
    ]
    state = hvd.elastic.TensorFlowState(variables, step=hvd.rank())
    variables[0].assign_add([10, 10])
    before = _values(variables)
    state.sync()
    _assert_equal_to_rank_0(before, _values(variables))
    assert state.step == 0
    variables[0].assign_add([1, 1])
    saved = _values(variables)
    state.commit()
    variables[0].assign_add([1, 1])
    state.restore()
    assert _equal(saved, _values(variables))
    with _raises(ValueError, "Name the variables"):
        hvd.elastic.TensorFlowState()


def other_errors_pass() -> None:
    """An UnknownError that is not Horovod's ends the training function, not in silence."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()

    @hvd.elastic.run
    def train(state):
        raise tf.errors.UnknownError(None, None, "a disk that fails")

    with _raises(tf.errors.UnknownError, "a disk that fails"):
        train(hvd.elastic.TensorFlowState([tf.Variable(1.0)], step=0))


def attributes() -> None:
    """What is changed in place is restored; what is set before sync is sent."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    state = hvd.elastic.TensorFlowState([tf.Variable(1.0)], losses=[], epoch=0)
    state.losses.append(1)
    state.commit()
    state.losses.append(2)
    state.restore()
    assert state.losses == [1]
    state.losses.append(2)
    state.restore()
    assert state.losses == [1]
    state.epoch = 3 + hvd.rank()
    state.losses.append(2 + hvd.rank())
    state.sync()
    assert (state.epoch, state.losses) == (3, [1, 2])
    state.losses.append(4)
    state.restore()
    assert (state.epoch, state.losses) == (3, [1, 2])


def _fit(model, callbacks, **given) -> None:
    """Four steps an epoch."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
    model.fit(x, y, batch_size=2, verbose=0, callbacks=callbacks, **given)


def _compiled():
    import keras

    model = _model()
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


def epochs_counted() -> None:
    """`state.epoch`, whether Keras counts on from it or from 0."""
    import horovod.keras.elastic
    import horovod.tensorflow as hvd
    import horovod.tensorflow.keras.elastic

    hvd.init()
    for module in (horovod.keras.elastic, horovod.tensorflow.keras.elastic):
        model = _compiled()
        state = module.KerasState(model, epoch=3)
        _fit(model, [module.UpdateEpochStateCallback(state)], initial_epoch=state.epoch, epochs=5)
        assert state.epoch == 5
        _fit(model, [module.UpdateEpochStateCallback(state)], epochs=2)
        assert state.epoch == 7


def batches_counted() -> None:
    """An epoch that is interrupted after two of its batches goes on with the other two."""
    import horovod.keras.elastic
    import horovod.tensorflow as hvd
    import horovod.tensorflow.keras.elastic
    import keras

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                raise InterruptedError("after two batches")

    hvd.init()
    for module in (horovod.keras.elastic, horovod.tensorflow.keras.elastic):
        model, seen = _compiled(), []
        state = module.KerasState(model, batch=0)
        update = module.UpdateBatchStateCallback(state)
        with _raises(InterruptedError, "after two batches"):
            _fit(model, [update, Interrupt()])
        assert state.batch == 2
        note = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs, s=state, n=seen: n.append(s.batch)
        )
        _fit(model, [update, note], epochs=2)
        assert (seen, state.batch) == ([3, 4, 1, 2, 3, 4], 0)


def told_again() -> None:
    """The driver tells of each change at once, and after a second again of all."""
    from horovod.runner.elastic import driver as drivers
    from horovod.runner.elastic.discovery import FixedHosts
    from horovod.runner.elastic.worker import HostUpdateResult

    told = []
    client = mock.Mock()
    client.notify_hosts_updated = lambda _, change: told.append((change, time.monotonic()))
    discovery = FixedHosts({"first": 2})
    with mock.patch.object(drivers, "DISCOVER_HOSTS_FREQUENCY_SECS", 0.01):
        driver = drivers.ElasticDriver(mock.Mock(), discovery, 2, 4)
        driver.get_worker_client = lambda slot: client
        driver.wait_for_available_slots(2)
        driver.start(2, lambda slot, events: (int(not events[0].wait()), 0.0))
        discovery.set({"first": 2, "second": 2})
        _wait_for(lambda: told)
        discovery.set({"second": 2})
        _wait_for(lambda: len(told) == 3)
        driver.stop()
    changes, times = zip(*told, strict=True)
    assert changes == (HostUpdateResult.added, HostUpdateResult.removed, HostUpdateResult.mixed)
    assert times[2] - times[1] > 0.9


def slow_start() -> None:
    """A new worker may take longer to start than --elastic-timeout: its host is not given up."""
    from horovod.runner.elastic.meeting import Meeting

    slot = mock.Mock(hostname="new", local_rank=0)
    driver = mock.Mock(_timeout=0.1, _rank_assignments={1: slot})
    driver.finished.return_value = False
    meeting = Meeting(driver)
    meeting.begin([mock.Mock(hostname="first", local_rank=0)])
    meeting.begin([slot])
    waiting = threading.Thread(target=meeting.wait, daemon=True)
    waiting.start()
    waiting.join(2.5)
    assert waiting.is_alive()
    assert not driver._host_manager.blacklist.called
    meeting.come(1)
    waiting.join(2.5)
    assert not waiting.is_alive()


def _wait_for(condition: Callable[[], object], seconds: float = 5) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


CHECKS = {
    check.__name__: check
    for check in (
        keras_states_sync,
        built_on_rank_0,
        loss_scale,
        restores,
        other_models_are_refused,
        tensorflow_state,
        other_errors_pass,
        attributes,
        epochs_counted,
        batches_counted,
        told_again,
        slow_start,
    )
}


# ---------------------------------------------------------------------------- a worker of a job


def _step(model, optimizer, inputs, tape_of=lambda tape: tape) -> None:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(inputs, training=True) ** 2)
    gradients = tape_of(tape).gradient(loss, model.trainable_variables)
    optimizer.apply(gradients, model.trainable_variables)


def _batch(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(ROWS, 3)).astype("float32")


def worker(folder: Path) -> None:
    """Trains with two workers at first; writes what it ended with.

    At step AT one is killed. At step 2 AT there is room for another, which is killed while it gets
    the state. Then there is room for two more, and the job ends AT steps after these have come.
    """
    import horovod.tensorflow as hvd
    import horovod.tensorflow.keras as hvd_keras
    import keras
    import tensorflow as tf

    host = os.environ["HOROVOD_HOSTNAME"]
    hvd.init()
    keras.utils.set_random_seed(os.getpid())

    def make():
        layers = [keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)]
        return keras.Sequential(layers), keras.optimizers.Adam(0.01)

    class State(hvd_keras.elastic.KerasState):
        def sync(self):
            if host == HOSTS[1]:
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            super().sync()

    model, optimizer = make()
    state = State(model, optimizer, step=0, sizes=[], start=None)

    @tf.function
    def step(inputs):
        _step(model, optimizer, inputs, lambda t: hvd.DistributedGradientTape(t, num_groups=1))

    def happen() -> None:
        if state.step == AT and host == HOSTS[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.step == 2 * AT:
            _write_hosts(folder, {HOSTS[0]: 1, HOSTS[1]: 1, HOSTS[2]: 1})
        if state.step > 2 * AT and hvd.size() == 1 and (folder / "killed").exists():
            _write_hosts(folder, {HOSTS[0]: 1, HOSTS[1]: 1, HOSTS[2]: 3})

    @hvd.elastic.run
    def train(state):
        if state.start is None:
            state.start = model.get_weights()
        while state.sizes.count(3) < AT and state.step < 2000:
            happen()
            step(tf.constant(_batch(state.step)[hvd.rank() :: hvd.size()]))
            state.step += 1
            state.sizes.append(hvd.size())
            if state.step > 2 * AT:
                time.sleep(0.02)
            state.commit()

    train(state)
    alone, optimizer_alone = make()
    alone.set_weights(state.start)
    for index in range(state.step):
        _step(alone, optimizer_alone, _batch(index))
    result = {
        "step": state.step,
        "iterations": int(optimizer.iterations),
        "sizes": state.sizes,
        "variables": [v.tobytes().hex() for v in _values(model.variables + optimizer.variables)],
        "off": max(
            float(np.abs(one - other).max())
            for one, other in zip(model.get_weights(), alone.get_weights(), strict=True)
        ),
    }
    (folder / f"rank-{hvd.rank()}.json").write_text(json.dumps(result))


def _write_hosts(folder: Path, slots: dict[str, int]) -> None:
    new = folder / f"hosts.{os.getpid()}"  # several workers may write at once
    new.write_text("".join(f"{host}:{count}\n" for host, count in slots.items()))
    new.replace(folder / "hosts")


def _job(
    folder: Path,
    path: Path,
    seconds: float = 100,
    *,
    file: str = __file__,
    hosts: dict[str, int] | None = None,
    options: tuple[str, ...] = ("--network-interfaces", "lo", "--min-np", "1"),
    arguments: tuple[str, ...] = (),
) -> tuple[list[dict], str]:
    """Runs an elastic job; the results of the ranks at its end, and its output."""
    _write_hosts(folder, hosts or {HOSTS[0]: 1, HOSTS[2]: 1})
    script = folder / "discover.sh"
    script.write_text(f"#!/bin/sh\ncat '{folder}/hosts'\n")
    script.chmod(0o755)
    command = [str(BIN / "horovodrun"), "-np", "2", "--max-np", "3", *options]
    command += ["--host-discovery-script", str(script)]
    command += [sys.executable, file, "job", str(folder), *arguments]
    limited = ["timeout", "--kill-after", "5", str(seconds), *command]
    ended = subprocess.run(
        limited, env=environment(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]
    left = _left_behind(folder)
    return results, f"exit code {ended.returncode}, {left} left\n{ended.stdout[-6000:]}"


def _left_behind(folder: Path) -> int:
    """How many processes of the job are there 10 seconds after its end; ends them."""
    until = time.monotonic() + 10
    while processes_with(str(folder)) and time.monotonic() < until:
        time.sleep(0.1)
    return len(end_processes_with(str(folder)))


# ---------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(__file__, tmp_path_factory)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_states(jobs, launcher):
    for check in CHECKS:
        jobs(launcher, list(CHECKS)).passed(check)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_states_without_the_mends(jobs, launcher):
    names = [name for of_mend in MENDS.values() for name in of_mend]
    job = jobs(launcher, names, undone=MENDS, check_seconds=30)
    for name in names:
        job.failed(name)


def test_workers_killed_and_added(tmp_path):
    results, output = _job(tmp_path, package(tmp_path / "package"))
    assert output.startswith("exit code 0, 0 left\n"), output
    assert len(results) == 3, output
    for result in results:
        assert result["variables"] == results[0]["variables"]
        assert result["iterations"] == result["step"] == len(result["sizes"])
        assert result["sizes"] == [2] * AT + [1] * (result["step"] - 2 * AT) + [3] * AT
        assert result["off"] < 1e-6  # weights of about 1 after steps of 0.01


def test_a_worker_killed_without_the_mend(tmp_path):
    """A failed grouped allreduce ended the training function as if it were done."""
    path = package(tmp_path, undone=["python/elastic_errors"])
    results, output = _job(tmp_path, path, seconds=40)
    assert results, output
    assert all(result["step"] == AT for result in results), output


if __name__ == "__main__":
    if sys.argv[1] == "job":
        worker(Path(sys.argv[2]))
    else:
        main(CHECKS)
