"""Probes of what else Horovod has for Keras."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

from horovod_build.probes.common import (
    STEPS,
    adam,
    arrays,
    batches,
    close,
    fit,
    rows,
    same_on_ranks,
    small_model,
    start_keras,
)

PROBES, probe = rows("Keras: callbacks, loading, layers, elastic")


@probe("`load_model`")
def load_model() -> None:
    import horovod.tensorflow.keras as hvd

    keras = start_keras()
    begun = small_model(optimizer=adam())
    fit(begun, None)
    with tempfile.TemporaryDirectory() as folder:
        begun.save(f"{folder}/model.keras")
        mine = hvd.load_model(f"{folder}/model.keras")
        one = keras.models.load_model(f"{folder}/model.keras")
    fit(mine, hvd.rank())
    fit(one, None)
    close(mine.get_weights(), one.get_weights())
    same_on_ranks(mine.get_weights())


@probe("`BroadcastGlobalVariablesCallback`, rank 0 alone has resumed")
def broadcast_callback() -> None:
    import horovod.tensorflow.keras as hvd

    keras = start_keras()
    mine, one = small_model(), small_model()
    sgd = keras.optimizers.SGD
    for model in (mine, one):
        model.compile(sgd(0.1, momentum=0.9), "mse")
    fit(one, None)
    if hvd.rank() == 0:
        fit(mine, None)
    else:
        mine.set_weights([w + 1 for w in mine.get_weights()])
    # Both train on the same data from here: equal only if the same was there before the first step.
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    fit(mine, None, callbacks=callbacks)
    fit(one, None)
    close(mine.get_weights(), one.get_weights())
    same_on_ranks(arrays(mine))


@probe("`MetricAverageCallback`, shards of other sizes")
def metric_average() -> None:
    import horovod.tensorflow.keras as hvd

    keras = start_keras()
    x, y = batches()
    mine = slice(0, 5) if hvd.rank() == 0 else slice(5, 16)

    def compiled():
        return small_model(optimizer=keras.optimizers.SGD(0.0), metrics=["mae"])

    seen = {}
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.update(logs))
    callbacks = [hvd.callbacks.MetricAverageCallback(), watch]
    compiled().fit(x[mine], y[mine], batch_size=4, verbose=0, callbacks=callbacks)
    whole = compiled().evaluate(x[:16], y[:16], batch_size=16, verbose=0, return_dict=True)
    for name, value in whole.items():
        assert abs(seen[name] - value) < 1e-5, f"{name} is {seen[name]} instead of {value}"


@probe("`LearningRateWarmupCallback`")
def warmup() -> None:
    import horovod.tensorflow.keras as hvd

    keras = start_keras()
    model = small_model(optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    rates = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: rates.append(float(model.optimizer.learning_rate))
    )
    warmed = hvd.callbacks.LearningRateWarmupCallback(initial_lr=0.1, warmup_epochs=2)
    fit(model, hvd.rank(), epochs=3, callbacks=[warmed, watch])
    expected = [0.05 * (min(n + 1, 2 * STEPS) / STEPS / 2 + 1) for n in range(3 * STEPS)]
    close(rates, expected, 1e-6)


@probe("`LearningRateScheduleCallback`")
def schedule() -> None:
    import horovod.tensorflow.keras as hvd

    keras = start_keras()
    model = small_model(optimizer=keras.optimizers.SGD(0.1))
    rates = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: rates.append(float(model.optimizer.learning_rate))
    )
    halved = hvd.callbacks.LearningRateScheduleCallback(initial_lr=0.1, multiplier=0.5)
    fit(model, hvd.rank(), epochs=2, callbacks=[halved, watch])
    close(rates, [0.1, 0.05], 1e-6)


@probe("`BestModelCheckpoint`")
def best_checkpoint() -> None:
    import horovod.tensorflow.keras as hvd

    keras = start_keras()
    model = small_model(optimizer=keras.optimizers.SGD(0.1))
    with tempfile.TemporaryDirectory() as folder:
        best = hvd.callbacks.BestModelCheckpoint(monitor="loss")
        best.filepath = f"{folder}/best.keras"
        fit(model, None, callbacks=[best])
        written = os.listdir(folder)
        assert written == ([] if hvd.rank() else ["best.keras"]), written


def _sync_batch_norm(rows: tuple[int, int]) -> None:
    import horovod.tensorflow as hvd
    import numpy as np
    import tensorflow as tf

    keras = start_keras()
    x = np.random.default_rng(3).normal(size=(sum(rows), 3)).astype("float32")
    y = np.random.default_rng(4).normal(size=(sum(rows), 3)).astype("float32")
    layer, one = hvd.SyncBatchNormalization(), keras.layers.BatchNormalization()
    mine = slice(0, rows[0]) if hvd.rank() == 0 else slice(rows[0], None)
    results = []
    for norm, part in ((layer, mine), (one, slice(None))):
        inputs = tf.constant(x[part])
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = norm(inputs, training=True)
            loss = tf.reduce_sum(tf.square(out - y[part]))
        results.append([out.numpy(), tape.gradient(loss, inputs).numpy()])
    close(results[0], [a[mine] for a in results[1]], 1e-4)
    close([w.numpy() for w in layer.weights], [w.numpy() for w in one.weights])


@probe("`SyncBatchNormalization`")
def sync_batch_norm() -> None:
    _sync_batch_norm((4, 4))


@probe("`SyncBatchNormalization`, batches of other sizes")
def sync_batch_norm_uneven() -> None:
    _sync_batch_norm((3, 6))


def _elastic_state(make: Callable) -> None:
    """Rank 0's state reaches rank 1; what is changed after a commit comes back."""
    import horovod.tensorflow as hvd

    keras = start_keras()
    model = small_model(optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    if hvd.rank() == 0:
        fit(model, None)
    model.optimizer.build(model.trainable_variables)
    state = make(model)
    state.sync()
    same_on_ranks(arrays(model))
    assert int(model.optimizer.iterations.numpy()) == STEPS
    state.epoch = 3
    state.commit()
    before = arrays(model)
    fit(model, None)
    state.epoch = 4
    state.restore()
    close(arrays(model), before, 1e-9)
    assert state.epoch == 3


@probe("elastic `KerasState`, of `horovod.tensorflow.keras`")
def keras_state() -> None:
    import horovod.tensorflow.keras as hvd

    start_keras()
    _elastic_state(lambda model: hvd.elastic.KerasState(model, epoch=0))


@probe("elastic `TensorFlowKerasState`")
def tensorflow_keras_state() -> None:
    import horovod.tensorflow as hvd

    start_keras()
    _elastic_state(lambda model: hvd.elastic.TensorFlowKerasState(model, epoch=0))


@probe("elastic `UpdateBatchStateCallback`: no batch is repeated")
def update_batch_state() -> None:
    import horovod.tensorflow.keras as hvd

    keras = start_keras()
    model = small_model(optimizer=keras.optimizers.SGD(0.1))
    state = hvd.elastic.KerasState(model, batch=2, epoch=0)
    seen = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(1))
    callbacks = [hvd.elastic.UpdateBatchStateCallback(state), watch]
    fit(model, hvd.rank(), callbacks=callbacks)
    assert len(seen) == STEPS - 2, f"{len(seen)} batches after a restart at batch 2 of {STEPS}"
