"""Probes of `DistributedOptimizer` with the optimizers of Keras."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

from horovod_build.probes.common import (
    ROWS,
    STEPS,
    adam,
    arrays,
    batches,
    close,
    fit,
    like_one_rank,
    rows,
    same_on_ranks,
    small_model,
    start_keras,
)

PROBES, probe = rows("Keras: `DistributedOptimizer`")


@probe("`fit`, of `horovod.tensorflow.keras`")
def fit_tensorflow_keras() -> None:
    import horovod.tensorflow.keras as hvd

    start_keras()
    like_one_rank(hvd.DistributedOptimizer, adam)


@probe("`fit`, of `horovod.keras`")
def fit_keras() -> None:
    import horovod.keras as hvd

    start_keras()
    like_one_rank(hvd.DistributedOptimizer, adam)


@probe("`fit`, of `horovod.tensorflow`")
def fit_tensorflow() -> None:
    import horovod.tensorflow as hvd

    start_keras()
    like_one_rank(hvd.DistributedOptimizer, adam)


@probe("`op=hvd.Sum`, of `horovod.tensorflow`")
def optimizer_sum() -> None:
    import horovod.tensorflow as hvd

    keras = start_keras()
    mine = small_model(optimizer=hvd.DistributedOptimizer(keras.optimizers.SGD(0.05), op=hvd.Sum))
    fit(mine, hvd.rank())
    one = small_model(optimizer=keras.optimizers.SGD(0.1))
    fit(one, None)
    close(mine.get_weights(), one.get_weights())


@probe("`train_on_batch`")
def train_on_batch() -> None:
    import horovod.tensorflow.keras as hvd

    def train(model, rank) -> None:
        x, y = batches(rank)
        rows = len(x) // STEPS
        for first in range(0, len(x), rows):
            model.train_on_batch(x[first : first + rows], y[first : first + rows])

    start_keras()
    like_one_rank(hvd.DistributedOptimizer, adam, train)


def _loop(method: str) -> Callable:
    """A loop of one's own that hands gradients to the `method` of the optimizer."""

    def train(model, rank) -> None:
        import tensorflow as tf

        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
            if method == "apply":
                model.optimizer.apply(gradients, model.trainable_variables)
            else:
                model.optimizer.apply_gradients(
                    zip(gradients, model.trainable_variables, strict=True)
                )

        model.optimizer.build(model.trainable_variables)
        x, y = batches(rank)
        rows = len(x) // STEPS
        for first in range(0, len(x), rows):
            step(x[first : first + rows], y[first : first + rows])

    return train


@probe("a loop with `apply`")
def loop_apply() -> None:
    import horovod.tensorflow.keras as hvd

    start_keras()
    like_one_rank(hvd.DistributedOptimizer, adam, _loop("apply"))


@probe("a loop with `apply_gradients`")
def loop_apply_gradients() -> None:
    import horovod.tensorflow.keras as hvd

    start_keras()
    like_one_rank(hvd.DistributedOptimizer, adam, _loop("apply_gradients"))


@probe("`backward_passes_per_step=2`")
def backward_passes_per_step() -> None:
    import horovod.tensorflow.keras as hvd

    keras = start_keras()
    distributed = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.1), backward_passes_per_step=2, average_aggregated_gradients=True
    )
    mine = small_model(optimizer=distributed)
    fit(mine, hvd.rank())
    one = small_model(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    fit(one, None)
    close(mine.get_weights(), one.get_weights())


@probe("`global_clipnorm`: clipped after the reduction")
def clipping() -> None:
    import horovod.tensorflow.keras as hvd

    keras = start_keras()
    like_one_rank(hvd.DistributedOptimizer, lambda: keras.optimizers.SGD(0.3, global_clipnorm=0.05))


@probe("`groups=2`")
def optimizer_groups() -> None:
    import horovod.tensorflow.keras as hvd

    start_keras()
    like_one_rank(lambda made: hvd.DistributedOptimizer(made, groups=2), adam)


@probe("an embedding's sparse gradients")
def optimizer_sparse() -> None:
    import horovod.tensorflow.keras as hvd
    import numpy as np

    keras = start_keras()

    def trained(optimizer, rows):
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Embedding(6, 3), keras.layers.Flatten(), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((2,)), *layers])
        model.compile(optimizer, "mse")
        x, y = np.arange(16).reshape(8, 2) % 5, np.arange(8.0).reshape(8, 1)
        model.fit(x[rows], y[rows], batch_size=8, epochs=3, shuffle=False, verbose=0)
        return model.get_weights()

    mine = slice(4 * hvd.rank(), 4 * hvd.rank() + 4)
    sgd = keras.optimizers.SGD
    found = trained(hvd.DistributedOptimizer(sgd(0.05)), mine)
    close(found, trained(sgd(0.05), slice(0, 8)))
    same_on_ranks(found)


@probe("`exclude_from_weight_decay` is kept")
def excluded_weight_decay() -> None:
    import horovod.tensorflow.keras as hvd

    keras = start_keras()

    def make():
        optimizer = keras.optimizers.AdamW(0.05, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    like_one_rank(hvd.DistributedOptimizer, make)


@probe("a built optimizer keeps its slots")
def built_optimizer() -> None:
    import horovod.tensorflow.keras as hvd

    start_keras()

    def resumed(model, wrap) -> None:
        fit(model, None)
        model.compile(wrap(model.optimizer), "mse")

    mine, one = small_model(optimizer=adam()), small_model(optimizer=adam())
    resumed(mine, hvd.DistributedOptimizer)
    resumed(one, lambda optimizer: optimizer)
    fit(mine, hvd.rank())
    fit(one, None)
    close(mine.get_weights(), one.get_weights())
    assert int(mine.optimizer.iterations.numpy()) == 2 * STEPS


def _half_precision(inside: bool, overflow: bool) -> None:
    """Two ranks under mixed_float16 end equal, and near one rank in single precision; with
    `overflow` rank 1 has an infinite gradient in one step, which both then leave out."""
    import horovod.tensorflow.keras as hvd
    import numpy as np

    keras = start_keras()
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    scaled = keras.optimizers.LossScaleOptimizer
    if inside:
        mine = small_model(optimizer=hvd.DistributedOptimizer(scaled(sgd, initial_scale=1024.0)))
    else:
        mine = small_model(optimizer=scaled(hvd.DistributedOptimizer(sgd), initial_scale=1024.0))
    x, y = batches(hvd.rank())
    if overflow and hvd.rank() == 1:
        y[ROWS] = 6e4
    mine.fit(x, y, batch_size=ROWS, shuffle=False, verbose=0)

    keras.mixed_precision.set_dtype_policy("float32")
    one = small_model(optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    x, y = (a.reshape(STEPS, 2 * ROWS, -1) for a in batches())
    for step in range(STEPS):
        if not (overflow and step == 1):
            one.train_on_batch(x[step], y[step])
    weights = [np.asarray(w, "float64") for w in mine.get_weights()]
    assert all(np.isfinite(w).all() for w in weights), "weights are not finite"
    close(weights, one.get_weights(), 1e-2)
    same_on_ranks(arrays(mine))
    if overflow:
        scale = float(mine.optimizer.dynamic_scale.numpy())
        assert scale == 512, f"the loss scale is {scale}, not 512"


@probe("`mixed_float16`, inside `LossScaleOptimizer` (as `compile` does)")
def half_inside_loss_scale() -> None:
    _half_precision(inside=False, overflow=False)


@probe("`mixed_float16`, around `LossScaleOptimizer`")
def half_around_loss_scale() -> None:
    _half_precision(inside=True, overflow=False)


@probe("an overflow on one rank, inside `LossScaleOptimizer`")
def overflow_inside_loss_scale() -> None:
    _half_precision(inside=False, overflow=True)


@probe("an overflow on one rank, around `LossScaleOptimizer`")
def overflow_around_loss_scale() -> None:
    _half_precision(inside=True, overflow=True)


@probe("`compile(jit_compile=True)`")
def optimizer_xla() -> None:
    import horovod.tensorflow.keras as hvd

    start_keras()
    like_one_rank(hvd.DistributedOptimizer, adam, jit_compile=True)


@probe("`PartialDistributedOptimizer`")
def partial_optimizer() -> None:
    import horovod.keras as hvd
    import numpy as np

    keras = start_keras()
    mine = small_model()
    last = mine.layers[-1]
    optimizer = hvd.PartialDistributedOptimizer(
        keras.optimizers.SGD(0.1), local_layers=[last], scale_local_gradients=False
    )
    mine.compile(optimizer, "mse")
    x, y = (a[:ROWS] for a in batches(hvd.rank()))
    mine.fit(x, y, batch_size=ROWS, shuffle=False, verbose=0)
    whole, own = (small_model(optimizer=keras.optimizers.SGD(0.1)) for _ in range(2))
    x, y = (np.concatenate([batches(rank)[i][:ROWS] for rank in range(2)]) for i in range(2))
    whole.fit(x, y, batch_size=2 * ROWS, shuffle=False, verbose=0)
    x, y = (a[:ROWS] for a in batches(hvd.rank()))
    own.fit(x, y, batch_size=ROWS, shuffle=False, verbose=0)
    close(mine.get_weights(), [*whole.get_weights()[:2], *own.get_weights()[2:]])


@probe("a saved model loads without Horovod")
def saved_model() -> None:
    import horovod.tensorflow.keras as hvd

    keras = start_keras()
    mine = small_model(optimizer=hvd.DistributedOptimizer(adam()))
    mine.fit(*batches(), verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        mine.save(f"{folder}/model.keras")
        loaded = keras.models.load_model(f"{folder}/model.keras")
    assert type(loaded.optimizer) is keras.optimizers.Adam, type(loaded.optimizer)
    close(arrays(loaded), arrays(mine))


@probe("a rank with fewer batches in `fit`")
def fewer_batches() -> None:
    import horovod.tensorflow.keras as hvd

    start_keras()
    mine = small_model(optimizer=hvd.DistributedOptimizer(adam()))
    x, y = (a[: (STEPS - hvd.rank()) * ROWS] for a in batches(hvd.rank()))
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    mine.fit(x, y, batch_size=ROWS, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    assert int(mine.optimizer.iterations.numpy()) == 2 * STEPS
    same_on_ranks(arrays(mine))
