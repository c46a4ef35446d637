"""Probes of horovod.tensorflow, mostly with Keras's variables."""

from __future__ import annotations

from collections.abc import Callable

from horovod_build.probes.common import close, rows, small_model, start_keras

PROBES, probe = rows("TensorFlow with Keras variables")


def _tape_gradients(make: Callable, sources: list) -> list:
    """The gradients of (rank + 1) × (the sum of each source × its place) through `make(tape)`."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    @tf.function
    def gradients():
        with tf.GradientTape() as tape:
            loss = sum((i + 1) * tf.reduce_sum(1.0 * s) for i, s in enumerate(sources))
            loss *= hvd.rank() + 1.0
        return make(tape).gradient(loss, sources)

    found = gradients()
    assert not any(g is None for g in found), "a gradient is None"
    return [float(g.numpy().ravel()[0]) for g in found]


def _kernels(number: int) -> list:
    import keras

    layers = [keras.layers.Dense(1, use_bias=False) for _ in range(number)]
    for layer in layers:
        layer.build((1, 1))
    return layers


@probe("`DistributedGradientTape`")
def tape() -> None:
    import horovod.tensorflow as hvd

    start_keras()
    sources = [layer.kernel for layer in _kernels(2)]
    found = _tape_gradients(lambda t: hvd.DistributedGradientTape(t, op=hvd.Sum), sources)
    assert found == [3, 6], found


@probe("`PartialDistributedGradientTape`")
def partial_tape() -> None:
    import horovod.tensorflow as hvd

    start_keras()
    shared, local = _kernels(2)

    def make(tape):
        return hvd.PartialDistributedGradientTape(
            tape, op=hvd.Sum, local_layers=[local], scale_local_gradients=False
        )

    found = _tape_gradients(make, [shared.kernel, local.kernel])
    assert found == [3, 2 * (hvd.rank() + 1)], found


@probe("`groups` of variables with one name (plain `tf.Variable`)")
def groups_of_one_name() -> None:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    start_keras()
    sources = [tf.Variable([1.0], name="kernel") for _ in range(4)]
    found = _tape_gradients(
        lambda t: hvd.DistributedGradientTape(t, op=hvd.Sum, groups=[sources[:2], sources[2:]]),
        sources,
    )
    assert found == [3, 6, 9, 12], found


@probe("`grouped_allreduce`, a sparse tensor beside a dense one")
def sparse_beside_dense() -> None:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    values = tf.ones((1, 2)) * (hvd.rank() + 1)
    sparse = tf.IndexedSlices(values, tf.constant([hvd.rank()]), tf.constant([4, 2]))
    _, reduced = hvd.grouped_allreduce([tf.ones(3), sparse], op=hvd.Sum)
    found = tf.convert_to_tensor(reduced).numpy().tolist()
    assert found == [[1, 1], [2, 2], [0, 0], [0, 0]], found


@probe("`allreduce`, with compression")
def keras_variable_reduced() -> None:
    import horovod.tensorflow as hvd

    keras = start_keras()
    variable = keras.Variable([1.0 + hvd.rank()])
    found = hvd.allreduce(variable, compression=hvd.Compression.fp16).numpy().tolist()
    assert found == [1.5], found


@probe("`broadcast_variables(model.weights)`")
def broadcast_variables() -> None:
    import horovod.tensorflow as hvd

    start_keras()
    model, other = small_model(), small_model()
    model.set_weights([w + hvd.rank() for w in model.get_weights()])
    hvd.broadcast_variables(model.weights, root_rank=0)
    close(model.get_weights(), other.get_weights(), 1e-9)


@probe("`broadcast_variables` in a `tf.function`, names differ between ranks")
def broadcast_variables_in_graph() -> None:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    start_keras()
    if hvd.rank() == 1:
        small_model()  # Keras counts the names of the next one from another number
    model, other = small_model(), small_model()
    model.set_weights([w + hvd.rank() for w in model.get_weights()])

    @tf.function
    def broadcast() -> None:
        hvd.broadcast_variables(model.weights, root_rank=0)

    broadcast()
    close(model.get_weights(), other.get_weights(), 1e-9)


@probe("`broadcast_object`, `broadcast_object_fn`")
def broadcast_objects() -> None:
    import horovod.tensorflow as hvd

    hvd.init()
    mine = {"rank": hvd.rank(), "list": [1, "two"] * (1 + hvd.rank())}
    assert hvd.broadcast_object(mine, root_rank=1)["rank"] == 1
    assert hvd.broadcast_object_fn(root_rank=1)(mine)["rank"] == 1
