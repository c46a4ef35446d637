"""SyncBatchNormalization under Keras 3, two ranks over MPI and over Gloo.

What both find is what one rank's keras.layers.BatchNormalization finds on the whole batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.ranks.mended import LAUNCHERS, Jobs, folder_of_job, main

# ---------------------------------------------------------------------------- checks, in each rank


def _numbers(shape: tuple[int, ...], seed: int):
    import numpy as np

    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def _pass(layer, x, weights, mask, compiled: bool) -> tuple[list, list]:
    """Outputs and the gradients by input, gamma and beta of the sum of outputs times weights."""
    import tensorflow as tf

    def call(x, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
            loss = tf.reduce_sum(tf.cast(y, tf.float32) * weights)
        return y, tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])

    call = tf.function(call) if compiled else call
    y, gradients = call(tf.constant(x), None if mask is None else tf.constant(mask))
    return y.numpy(), [g.numpy() for g in gradients]


def _equals_one_rank(
    shape, first: int, *, masked=False, dtype="float32", offset=0.0, tolerance=2e-6, **kwargs
) -> None:
    """Rank 0 has `first` rows of `shape`, rank 1 the rest; both find what one rank finds on all."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np

    mine = slice(0, first) if hvd.rank() == 0 else slice(first, None)
    x, weights = _numbers(shape, 1) + np.float32(offset), _numbers(shape, 2)
    mask = None
    if masked:
        mask = np.random.default_rng(3).random(shape[:-1]) < 0.6
        mask[0] = False  # a row of rank 0 counts for nothing
        x = np.where(mask[..., None], x, 1e4).astype("float32")
    for compiled in (False, True):
        whole = keras.layers.BatchNormalization(dtype=dtype, momentum=0.7, **kwargs)
        shard = hvd.SyncBatchNormalization(dtype=dtype, momentum=0.7, **kwargs)
        for layer in (whole, shard):
            layer.build(shape)
            layer.gamma.assign(_numbers(layer.gamma.shape, 4))
            layer.beta.assign(_numbers(layer.beta.shape, 5))
        half = dtype != "float32"
        given = x.astype("float16").astype("float32") if half else x
        y, (by_x, *by_weights) = _pass(whole, given, weights, mask, compiled)
        my_mask = None if mask is None else mask[mine]
        my_y, (my_by_x, *mine_by_weights) = _pass(
            shard, given[mine], weights[mine], my_mask, compiled
        )
        assert str(my_y.dtype) == str(y.dtype)
        compared = [(my_y.astype("float32"), y[mine].astype("float32")), (my_by_x, by_x[mine])]
        sums = [hvd.allreduce(g, op=hvd.Sum).numpy() for g in mine_by_weights]
        compared += zip(sums, by_weights, strict=True)
        compared += [
            (a.numpy(), b.numpy())
            for a, b in zip(shard.non_trainable_weights, whole.non_trainable_weights, strict=True)
        ]
        for place, (a, b) in enumerate(compared):
            error = np.abs(a - b).max() / max(1, np.abs(b).max())
            assert error <= tolerance, (compiled, place, error)
        moving = hvd.allgather_object([v.numpy().tobytes() for v in shard.non_trainable_weights])
        assert moving[0] == moving[1]


def even_and_uneven() -> None:
    for first in (4, 3, 7):
        _equals_one_rank((8, 5), first)


def images() -> None:
    _equals_one_rank((8, 4, 6, 3), 3)
    _equals_one_rank((8, 3, 4, 5), 5, axis=1)


def masks() -> None:
    for first in (4, 3):
        _equals_one_rank((8, 6, 5), first, masked=True)


def half_precision() -> None:
    """Statistics are in fp32: outputs differ by their own rounding at most."""
    _equals_one_rank((8, 5), 3, dtype="mixed_float16", tolerance=1e-3)
    _equals_one_rank((8, 5), 3, dtype="mixed_bfloat16", tolerance=8e-3)


def renormalization() -> None:
    _equals_one_rank((8, 5), 3, renorm=True, tolerance=4e-6)


def large_means() -> None:
    """A mean of 1000 times the standard deviation costs no more than it costs one rank."""
    import horovod.tensorflow as hvd
    import numpy as np

    x = (_numbers((64, 4), 1) + np.float32(1000)).astype("float32")
    layer = hvd.SyncBatchNormalization(momentum=0.0)
    mine = slice(0, 24) if hvd.rank() == 0 else slice(24, 64)
    layer(x[mine], training=True)
    exact = x.astype("float64").var(0)
    assert np.abs(layer.moving_variance.numpy() / exact - 1).max() < 1e-5


def evaluation_and_frozen() -> None:
    """In evaluation and where the layer is frozen, each rank uses the moving statistics."""
    import horovod.tensorflow as hvd
    import numpy as np

    layer = hvd.SyncBatchNormalization()
    x = _numbers((2 + hvd.rank(), 3), 1)
    layer.build(x.shape)
    expected = x / np.sqrt(1 + layer.epsilon)
    assert np.abs(layer(x, training=False).numpy() - expected).max() < 1e-6
    layer.trainable = False
    assert np.abs(layer(x, training=True).numpy() - expected).max() < 1e-6


def _net(layer):
    import keras

    inputs = keras.Input((3,))
    x = layer()(keras.layers.Dense(4)(inputs))
    return inputs, keras.layers.Dense(1)(layer()(keras.layers.Dense(4, activation="tanh")(x)))


def _taped():
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    class Taped(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
            tape = hvd.DistributedGradientTape(tape)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    return Taped


def training() -> None:
    """`fit` on two halves is `fit` on the whole, with two layers, and other names on rank 1."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np

    if hvd.rank() == 1:
        _net(hvd.SyncBatchNormalization)
    x, y = _numbers((16, 3), 1), _numbers((16, 1), 2)
    whole, halves = (
        kind(*_net(layer))
        for kind, layer in (
            (keras.Model, keras.layers.BatchNormalization),
            (_taped(), hvd.SyncBatchNormalization),
        )
    )
    for model in (whole, halves):
        for place, v in enumerate(model.weights):
            v.assign(np.abs(0.5 * _numbers(tuple(v.shape), place)))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    whole.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    mine = np.arange(16).reshape(2, 2, 4)[:, hvd.rank()].ravel()
    halves.fit(x[mine], y[mine], batch_size=4, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(halves.weights, whole.weights, strict=True):
        assert np.abs(a.numpy() - b.numpy()).max() < 1e-5, a.path
    both = hvd.allgather_object([v.numpy().tobytes() for v in halves.weights])
    assert both[0] == both[1]


def with_a_rank_that_has_joined() -> None:
    """A rank without batches adds nothing to the statistics of the others."""
    import horovod.tensorflow as hvd
    import numpy as np

    layer = hvd.SyncBatchNormalization(momentum=0.0)
    x = _numbers((6, 3), 1)
    layer.build(x.shape)
    if hvd.rank() == 0:
        layer(x, training=True)
    int(hvd.join())
    if hvd.rank() == 0:
        assert np.abs(layer.moving_mean.numpy() - x.mean(0)).max() < 1e-6
        assert np.abs(layer.moving_variance.numpy() - x.var(0)).max() < 1e-6


def saving() -> None:
    import horovod.tensorflow as hvd
    import keras

    inputs, outputs = _net(hvd.SyncBatchNormalization)
    file = folder_of_job() / f"{hvd.rank()}.keras"
    keras.Model(inputs, outputs).save(file)
    loaded = keras.models.load_model(file)
    assert isinstance(loaded.layers[2], hvd.SyncBatchNormalization)
    with pytest.raises(ValueError, match="fused"):
        hvd.SyncBatchNormalization(fused=True)


CHECKS = {
    check.__name__: check
    for check in (
        even_and_uneven,
        images,
        masks,
        half_precision,
        renormalization,
        large_means,
        evaluation_and_frozen,
        training,
        with_a_rank_that_has_joined,
        saving,
    )
}

if __name__ == "__main__":
    import horovod.tensorflow

    horovod.tensorflow.init()
    main(CHECKS)
    sys.exit()

# ------------------------------------------------------------------------------ tests, outside it

MEND = "python/keras3_sync_batch_norm"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(__file__, tmp_path_factory)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_with_mend(jobs, launcher: str, check: str) -> None:
    jobs(launcher, list(CHECKS)).passed(check)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_mend(jobs, launcher: str) -> None:
    job = jobs(launcher, list(CHECKS), undone=[MEND])
    for check in CHECKS:
        job.failed(check)
