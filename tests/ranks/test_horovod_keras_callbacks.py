"""Horovod's callbacks under Keras 3, two ranks over MPI and over Gloo: each check passes with our
mends, and fails without them.

Models train through DistributedGradientTape in a train_step; references are plain Keras in the same
process.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.ranks.mended import LAUNCHERS, Jobs, folder_of_job, main

# ---------------------------------------------------------------------------- checks, in each rank


def _taped(base):
    """The Keras model class `base` with a train_step that reduces gradients."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    class Taped(base):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                predicted = self(x, training=True)
                loss = self.compute_loss(x=x, y=y, y_pred=predicted)
                self._loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
                scaled = self.optimizer.scale_loss(loss)
            tape = hvd.DistributedGradientTape(tape)
            gradients = tape.gradient(scaled, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return self.compute_metrics(x, y, predicted)

    return Taped


def _numbers(rows: int, columns: int, seed: int):
    import numpy as np

    return np.random.default_rng(seed).normal(size=(rows, columns)).astype("float32")


def _net(base, layers=1):
    """A small functional model of class `base`."""
    import keras

    inputs = x = keras.Input((3,))
    for _ in range(layers):
        x = keras.layers.Dense(4, activation="tanh")(x)
    return base(inputs, keras.layers.Dense(2)(x))


def _set(variables, seed: int) -> None:
    for place, v in enumerate(variables):
        v.assign(0.3 * _numbers(1, v.numpy().size, seed + place).reshape(v.shape))


def _same_on_ranks(variables) -> None:
    import horovod.tensorflow as hvd

    seen = hvd.allgather_object([v.numpy().tobytes() for v in variables])
    assert seen[0] == seen[1]


def _trained(model, data) -> list:
    """The weights of `model` after a step of plain SGD with momentum for each list of batches in
    `data`: the sum of their mean gradients, divided by 2."""
    import keras
    import tensorflow as tf

    model.optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.optimizer.build(model.trainable_variables)
    for batches in data:
        total = [tf.zeros(v.shape) for v in model.trainable_variables]
        for x, y in batches:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            found = tape.gradient(loss, [v.value for v in model.trainable_variables])
            total = [a + g / 2 for a, g in zip(total, found, strict=True)]
        model.optimizer.apply(total, model.trainable_variables)
    return model.get_weights()


def _close(mine, theirs, tolerance=2e-6) -> None:
    import numpy as np

    for a, b in zip(mine, theirs, strict=True):
        assert np.abs(a - b).max() < tolerance, np.abs(a - b).max()


def _broadcast_resumed(module) -> None:
    import horovod.tensorflow as hvd
    import keras

    rank = hvd.rank()
    keras.utils.set_random_seed(7 + rank)
    if rank == 1:
        _net(keras.Model)  # so that Keras counts names from another number
    model = _net(_taped(keras.Model))
    model.compile(keras.optimizers.SGD(0.5 - 0.1 * rank, momentum=0.9), "mse")
    _set(model.weights, 40 + rank)
    if rank == 0:
        model.optimizer.build(model.trainable_variables)
        _set(model.optimizer.momentums, 60)
        model.optimizer.iterations.assign(7)
    x, y = _numbers(8, 3, 1), _numbers(8, 2, 2)
    mine = slice(4 * rank, 4 * rank + 4)
    callback = module.callbacks.BroadcastGlobalVariablesCallback(0)
    model.fit(x[mine], y[mine], batch_size=4, shuffle=False, verbose=0, callbacks=[callback])

    other = _net(keras.Model)
    _set(other.weights, 40)
    other.compile(keras.optimizers.SGD(0.5, momentum=0.9), "mse")
    other.optimizer.build(other.trainable_variables)
    _set(other.optimizer.momentums, 60)
    other.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    _close(model.get_weights(), other.get_weights())
    assert int(model.optimizer.iterations.numpy()) == 8
    assert float(model.optimizer.learning_rate.numpy()) == 0.5
    _same_on_ranks(model.weights + model.optimizer.variables)


def broadcast_resumed() -> None:
    """A model that rank 0 alone has resumed, with other names, and whose optimizer it alone has."""
    import horovod.tensorflow.keras as module

    _broadcast_resumed(module)


def broadcast_resumed_keras() -> None:
    """The same through horovod.keras."""
    import horovod.keras as module

    _broadcast_resumed(module)


def broadcast_unbuilt() -> None:
    """A model that its data builds has rank 0's weights before its first step."""
    import horovod.tensorflow.keras as hvd
    import keras
    import numpy as np

    ones = keras.initializers.Constant(1.0 + hvd.rank())
    model = _taped(keras.Sequential)([keras.layers.Dense(1, kernel_initializer=ones)])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    x, y = np.full((2, 1), 2.0, "float32"), np.zeros((2, 1), "float32")
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    model.fit(x, y, verbose=0, callbacks=[callback])
    kernel, bias = (float(w.reshape(())) for w in model.get_weights())
    assert (kernel, bias) == (-7, -4)  # 1 - 2·(2·1)·2 and 0 - 2·(2·1)


def broadcast_keeps_seeds() -> None:
    """Ranks do not come to drop the same units."""
    import horovod.tensorflow.keras as hvd
    import keras

    inputs = keras.Input((3,))
    dropout = keras.layers.Dropout(0.5, seed=10 + hvd.rank())
    model = _taped(keras.Model)(inputs, keras.layers.Dense(2)(dropout(inputs)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    model.fit(_numbers(4, 3, 1), _numbers(4, 2, 2), verbose=0, callbacks=[callback])
    assert int(dropout.seed_generator.state.numpy()[0]) == 10 + hvd.rank()
    _same_on_ranks(model.weights)


def broadcast_refuses_other_models() -> None:
    """Models that differ are an error on both ranks, not a hang."""
    import horovod.tensorflow.keras as hvd
    import keras

    model = _net(_taped(keras.Model), layers=1 + hvd.rank())
    model.compile(keras.optimizers.SGD(0.1), "mse")
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    with pytest.raises(ValueError, match=r"Number 3 is weight kernel \(4, 2\) float32 on rank 0"):
        model.fit(_numbers(4, 3, 1), _numbers(4, 2, 2), verbose=0, callbacks=[callback])


def broadcast_leaves_local() -> None:
    """Local variables and their slots stay a rank's own."""
    import horovod.tensorflow.keras as hvd
    import keras

    rank = hvd.rank()
    model = _net(keras.Model)
    _set(model.weights, 10 * rank)
    model.compile(keras.optimizers.Adam(0.0), "mse")
    model.optimizer.build(model.trainable_variables)
    _set([v for v in model.optimizer.variables if v.shape], 100 + 50 * rank)
    first, last = model.layers[1], model.layers[2]
    before = [w.numpy() for w in last.weights]
    slots = [v for v in model.optimizer.variables if v.shape]
    of_last = [v for v in slots if v.shape in ((4, 2), (2,))]
    slots_before = [v.numpy() for v in of_last]
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=last.weights)
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_train_batch_begin(0)
    _same_on_ranks(first.weights + [v for v in slots if v.shape not in ((4, 2), (2,))])
    _close([w.numpy() for w in last.weights], before, 1e-30)
    _close([v.numpy() for v in of_last], slots_before, 1e-30)
    hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=last.kernel)


def broadcast_loss_scale() -> None:
    """The scale of a LossScaleOptimizer is broadcast, which only rank 0 has built."""
    import horovod.tensorflow.keras as hvd
    import keras

    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        model = _net(_taped(keras.Model))
    finally:
        keras.mixed_precision.set_dtype_policy("float32")
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    if hvd.rank() == 0:
        model.optimizer.build(model.trainable_variables)
        model.optimizer.dynamic_scale.assign(4.0)
        model.optimizer.step_counter.assign(5)
    x, y = _numbers(4, 3, hvd.rank()), _numbers(4, 2, 2)
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    model.fit(x, y, batch_size=2, verbose=0, callbacks=[callback])
    assert float(model.optimizer.dynamic_scale.numpy()) == 4
    assert int(model.optimizer.step_counter.numpy()) == 7
    _same_on_ranks(model.weights + model.optimizer.variables)


def broadcast_turns_xla_off() -> None:
    import horovod.tensorflow.keras as hvd
    import keras

    model = _net(_taped(keras.Model))
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=True)
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.fit(_numbers(4, 3, 1), _numbers(4, 2, 2), verbose=0, callbacks=[callback])
    assert [w for w in seen if "jit_compile=False" in str(w.message)]
    _same_on_ranks(model.weights)


def metrics_of_all_examples() -> None:
    """evaluate, and fit with validation, on uneven shards give what one rank finds on all of it."""
    import horovod.tensorflow.keras as hvd
    import keras
    import numpy as np

    rank = hvd.rank()

    def model():
        inputs = keras.Input((3,))
        made = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(inputs))
        _set(made.weights, 3)
        metrics = ["accuracy", keras.metrics.AUC(name="auc"), keras.metrics.R2Score(name="r2")]
        made.compile(keras.optimizers.SGD(0.0), "binary_crossentropy", metrics=metrics)
        return made

    x = _numbers(8, 3, 1)
    y = (np.arange(8) % 3 > 0).astype("float32").reshape(8, 1)
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    whole = model().evaluate(x, y, batch_size=8, verbose=0, return_dict=True)

    average = hvd.callbacks.MetricAverageCallback()
    sharded = model()
    call = {"batch_size": 2, "verbose": 0, "return_dict": True}
    found = sharded.evaluate(x[mine], y[mine], callbacks=[average], **call)
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert abs(found[name] - value) < 1e-6, (name, found[name], value)
    sharded.evaluate(x[mine], y[mine], **call)
    reduced = hvd.allreduce_metrics(sharded)
    assert reduced == found

    seen = {}
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.update(logs))
    train = slice(0, 3) if rank == 0 else slice(3, 7)
    seven = model().evaluate(x[:7], y[:7], batch_size=7, verbose=0, return_dict=True)
    history = model().fit(
        *(x[train], y[train], 2, 2),
        validation_data=(x[mine], y[mine]),
        callbacks=[watch, hvd.callbacks.MetricAverageCallback()],
        shuffle=False,
        verbose=0,
    )
    for name, value in whole.items():
        for got in (*history.history["val_" + name], seen["val_" + name]):
            assert abs(got - value) < 1e-6, (name, got, value)
        for got in (*history.history[name], seen[name]):
            assert abs(got - seven[name]) < 1e-6, (name, got, seven[name])


def other_numbers_are_averaged() -> None:
    """What a callback before it has put into the logs is averaged over the ranks."""
    import horovod.keras as hvd
    import horovod.tensorflow
    import keras

    rank = horovod.tensorflow.rank()
    model = _net(keras.Model)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    add = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(mine=3.0 + 2 * rank)
    )
    callbacks = [add, hvd.callbacks.MetricAverageCallback()]
    history = model.fit(_numbers(4, 3, 1), _numbers(4, 2, 2), verbose=0, callbacks=callbacks)
    assert history.history["mine"] == [4.0]


def validation_on_one_rank_is_an_error() -> None:
    """If only rank 0 validates, both ranks say so instead of waiting for each other."""
    import horovod.tensorflow.keras as hvd
    import keras

    model = _net(keras.Model)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = _numbers(4, 3, 1), _numbers(4, 2, 2)
    with pytest.raises(RuntimeError, match="not at the same point"):
        model.fit(
            *(x, y),
            validation_data=(x, y) if hvd.rank() == 0 else None,
            callbacks=[hvd.callbacks.MetricAverageCallback()],
            verbose=0,
        )


def warmup() -> None:
    """The learning rate rises to its full value; with other numbers of batches it is the same."""
    import horovod.tensorflow.keras as hvd
    import keras
    import numpy as np

    model = _net(keras.Model)
    model.compile(keras.optimizers.SGD(0.8), "mse")
    rates = []

    def note(batch, logs):
        rates.append(float(model.optimizer.learning_rate.numpy()))

    watch = keras.callbacks.LambdaCallback(on_train_batch_end=note)
    rows = 6 if hvd.rank() == 0 else 4
    callback = hvd.callbacks.LearningRateWarmupCallback(0.8, warmup_epochs=2, verbose=1)
    history = model.fit(
        *(_numbers(rows, 3, 1), _numbers(rows, 2, 2), 2, 3),
        verbose=0,
        callbacks=[callback, watch],
    )
    assert callback.steps_per_epoch == 3
    steps = 3 if hvd.rank() == 0 else 2
    epochs = [e + (b + 1) / 3 for e in range(2) for b in range(steps)]
    expected = [0.4 * (epoch / 2 + 1) for epoch in epochs]
    expected += [expected[-1]] * steps
    assert np.allclose(rates, expected, rtol=1e-6), (rates, expected)
    assert np.allclose(history.history["lr"][-1], rates[-1])


def momentum_is_corrected() -> None:
    """After each change of the rate the velocity is that of the new rate, in the compiled step."""
    import horovod.keras as hvd
    import keras
    import numpy as np

    rates = [0.1, 0.4, 0.4, 0.02]
    x, y = np.ones((2, 1), "float32"), np.zeros((2, 1), "float32")
    makers = [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), 2.0),
    ]
    for make in makers:
        inputs = keras.Input((1,))
        model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
        model.compile(make(), lambda true, predicted: predicted + 0 * true)  # the gradient is 1
        model.set_weights([np.zeros((1, 1), "float32")])
        schedule = hvd.callbacks.LearningRateScheduleCallback(0.1, lambda e: rates[e] / 0.1)
        model.fit(x, y, batch_size=2, epochs=4, verbose=0, callbacks=[schedule])
        weight = velocity = 0.0
        for step, rate in enumerate(rates):
            velocity = 0.9 * velocity * (rate / rates[max(step - 1, 0)]) - rate
            weight += velocity
        assert abs(float(model.get_weights()[0].item()) - weight) < 1e-6, (
            weight,
            model.get_weights(),
        )


def schedules_are_refused() -> None:
    import horovod.tensorflow.keras as hvd
    import keras

    model = _net(keras.Model)
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    model.compile(keras.optimizers.SGD(decay), "mse")
    callback = hvd.callbacks.LearningRateScheduleCallback(0.1, 2.0)
    with pytest.raises(ValueError, match="ExponentialDecay"):
        model.fit(_numbers(4, 3, 1), _numbers(4, 2, 2), verbose=0, callbacks=[callback])


def best_checkpoint() -> None:
    """Rank 0 alone writes, and what it writes can be loaded."""
    import horovod.keras as hvd_keras
    import horovod.tensorflow.keras as hvd
    import keras

    folder = folder_of_job() / f"checkpoints-{hvd.rank()}"
    folder.mkdir()
    model = _net(keras.Model)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    given = hvd.callbacks.BestModelCheckpoint(monitor="loss", filepath=folder / "given.keras")
    later = hvd_keras.callbacks.BestModelCheckpoint(monitor="loss")
    x, y = _numbers(4, 3, 1), _numbers(4, 2, 2)
    with pytest.raises(ValueError, match="filepath"):
        model.fit(x, y, verbose=0, callbacks=[later])
    later.filepath = str(folder / "later.keras")
    model.fit(x, y, epochs=2, verbose=0, callbacks=[given, later])
    written = sorted(file.name for file in folder.iterdir())
    assert written == ([] if hvd.rank() else ["given.keras", "later.keras"])
    for name in written:
        _close(keras.models.load_model(folder / name).get_weights(), model.get_weights(), 1e-9)


def uneven_batches() -> None:
    """Ranks with 3 and 5 batches: two epochs end, every batch counts, ranks are equal."""
    import horovod.tensorflow.keras as hvd
    import keras
    import tensorflow as tf

    rank = hvd.rank()
    x, y = _numbers(16, 3, 1), _numbers(16, 2, 2)
    rows = [range(0, 6, 2), range(6, 16, 2)]
    batches = [[(x[i : i + 2], y[i : i + 2]) for i in starts] for starts in rows]
    steps = [[mine[i] for mine in batches if i < len(mine)] for i in range(5)]
    reference = _net(keras.Model)
    _set(reference.weights, 5)
    expected = _trained(reference, steps * 2)

    def generate():
        yield from batches[rank]

    signature = (tf.TensorSpec((None, 3)), tf.TensorSpec((None, 2)))
    unknown = tf.data.Dataset.from_generator(generate, output_signature=signature)
    known = tf.data.Dataset.from_tensor_slices(
        (x[rows[rank][0] : rows[rank][-1] + 2], y[rows[rank][0] : rows[rank][-1] + 2])
    ).batch(2)
    for data in (known, unknown):
        model = _net(_taped(keras.Model))
        _set(model.weights, 5 + rank)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        callbacks = [
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.MetricAverageCallback(),
        ]
        model.fit(data, epochs=2, verbose=0, callbacks=callbacks)
        _close(model.get_weights(), expected, 1e-6)
        # Keras adds one each time that it finds the end of data of unknown size.
        assert int(model.optimizer.iterations.numpy()) == (10 if data is known else 12)
        _same_on_ranks(model.weights + model.optimizer.variables)


def uneven_batches_of_optimizer() -> None:
    """The same with DistributedOptimizer, whichever rank has fewer batches; under mixed_float16 the
    steps of the other are not taken for overflows."""
    import horovod.tensorflow.keras as hvd
    import keras

    x, y = _numbers(10, 3, 1), _numbers(10, 2, 2)
    for short, policy in ((0, "float32"), (1, "float32"), (0, "mixed_float16")):
        mine = slice(0, 4) if hvd.rank() == short else slice(4, 10)
        keras.mixed_precision.set_dtype_policy(policy)
        try:
            model = _net(keras.Model)
        finally:
            keras.mixed_precision.set_dtype_policy("float32")
        _set(model.weights, 5 + hvd.rank())
        sgd = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9))
        model.compile(sgd, "mse")
        callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
        call = {"batch_size": 2, "epochs": 2, "shuffle": False, "verbose": 0}
        model.fit(x[mine], y[mine], callbacks=[callback], **call)
        _same_on_ranks(model.weights + model.optimizer.variables)
        assert int(model.optimizer.iterations.numpy()) == 6
        if policy == "float32":
            reference = _net(keras.Model)
            _set(reference.weights, 5)
            pairs = [[slice(0, 2), slice(4, 6)], [slice(2, 4), slice(6, 8)], [slice(8, 10)]]
            steps = [[(x[rows], y[rows]) for rows in pair] for pair in pairs]
            _close(model.get_weights(), _trained(reference, steps * 2), 1e-6)


def one_rank_stops_is_an_error() -> None:
    """A rank that ends training alone: an error on both that names the places, no hang."""
    import horovod.tensorflow.keras as hvd
    import keras

    model = _net(_taped(keras.Model))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    with pytest.raises(RuntimeError, match="the begin of epoch 2, rank 1: the end of train"):
        model.fit(
            *(_numbers(4, 3, 1), _numbers(4, 2, 2)),
            epochs=2 - hvd.rank(),
            verbose=0,
            callbacks=[callback],
        )


def join_again() -> None:
    """Each join waits for the last rank."""
    import horovod.tensorflow as hvd

    for late in (0, 1, 0):
        if hvd.rank() == late:
            time.sleep(0.2)
        assert int(hvd.join()) == late


CHECKS_OF = {
    "python/keras3_broadcast_callback": (
        broadcast_resumed,
        broadcast_resumed_keras,
        broadcast_unbuilt,
        broadcast_keeps_seeds,
        broadcast_leaves_local,
        broadcast_loss_scale,
        broadcast_turns_xla_off,
        broadcast_refuses_other_models,
    ),
    "python/keras3_metric_average": (
        metrics_of_all_examples,
        other_numbers_are_averaged,
        validation_on_one_rank_is_an_error,
    ),
    "python/keras3_learning_rate": (warmup, momentum_is_corrected, schedules_are_refused),
    "python/keras3_best_checkpoint": (best_checkpoint,),
    "python/keras3_uneven_batches": (
        one_rank_stops_is_an_error,
        uneven_batches_of_optimizer,
        uneven_batches,
    ),
    "python/join_again": (join_again,),
}
CHECKS = {check.__name__: check for checks in CHECKS_OF.values() for check in checks}


if __name__ == "__main__":
    import horovod.tensorflow

    horovod.tensorflow.init()
    main(CHECKS)
    sys.exit()

# ------------------------------------------------------------------------------ tests, outside it

# Undone together; a check that waits in vain comes last, and ends the job.
UNDONE = (
    (
        "python/keras3_learning_rate",
        "python/keras3_metric_average",
        "python/keras3_best_checkpoint",
        "python/join_again",
        "python/keras3_broadcast_callback",
    ),
    ("python/keras3_uneven_batches",),
)
# They wait in vain too, and one such check can be last.
NOT_ALONE = ("one_rank_stops_is_an_error", "uneven_batches_of_optimizer")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(__file__, tmp_path_factory)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_with_mends(jobs, launcher: str, check: str) -> None:
    jobs(launcher, list(CHECKS)).passed(check)


@pytest.mark.parametrize("undone", UNDONE, ids=lambda mends: mends[-1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_mends(jobs, launcher: str, undone: tuple[str, ...]) -> None:
    names = [check.__name__ for mend in undone for check in CHECKS_OF[mend]]
    checks = [name for name in names if name not in NOT_ALONE]
    job = jobs(launcher, checks, undone=undone, check_seconds=15)
    for check in checks:
        job.failed(check, may_wait=check == checks[-1])
