"""Horovod's tapes and broadcasts with Keras 3 variables, two ranks over MPI and over Gloo: every
option against the gradient of one rank on the whole batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.ranks.mended import LAUNCHERS, Jobs, main
from tests.ranks.test_horovod_wheel import groups_of_one_name, sparse_beside_dense

# ---------------------------------------------------------------------------- checks, in each rank


def _numbers(rows: int, columns: int, seed: int):
    import numpy as np

    return np.random.default_rng(seed).normal(size=(rows, columns)).astype("float32")


class _Problem:
    """A model with an embedding and two layers whose variables have the same names, and a batch of
    8 of which each rank has a half."""

    def __init__(self) -> None:
        import horovod.tensorflow as hvd
        import keras
        import numpy as np

        self.layers = [
            keras.layers.Embedding(6, 3),
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.Dense(2),
        ]
        self.net = keras.Sequential([keras.Input((), dtype="int32"), *self.layers])
        for place, v in enumerate(self.net.weights):
            v.assign(_numbers(1, v.numpy().size, place).reshape(v.shape))
        self.sources = self.net.trainable_variables
        self.x, self.y = np.array([0, 1, 1, 2, 1, 4, 2, 2]), _numbers(8, 2, 9)
        self.mine = slice(4 * hvd.rank(), 4 * hvd.rank() + 4)

    def loss(self, rows: slice):
        import tensorflow as tf

        return tf.reduce_mean(tf.square(self.net(self.x[rows], training=True) - self.y[rows]))

    def found(self, wrap, compiled: bool = True, sources=None) -> list:
        """The gradients of this rank's half through `wrap(tape)`, dense."""
        import tensorflow as tf

        sources = self.sources if sources is None else sources

        def gradients():
            with tf.GradientTape() as tape:
                loss = self.loss(self.mine)
            return wrap(tape).gradient(loss, sources)

        call = tf.function(gradients) if compiled else gradients
        return tf.nest.map_structure(lambda g: tf.convert_to_tensor(g).numpy(), call())

    def expected(self, rows: slice | None = None) -> list:
        """The gradients by plain TensorFlow: of the whole batch if no `rows` are given."""
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = self.loss(slice(None) if rows is None else rows)
        found = tape.gradient(loss, [v.value for v in self.sources])
        return [tf.convert_to_tensor(g).numpy() for g in found]


def _close(mine, theirs, tolerance=1e-6) -> None:
    import numpy as np

    for place, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.shape == b.shape and np.abs(a - b).max() <= tolerance, (place, np.abs(a - b).max())


def tape_options() -> None:
    """Averages, sums, groups, compression, predivision, sparse as dense: compiled and eager."""
    import horovod.tensorflow as hvd

    problem = _Problem()
    mean = problem.expected()
    kernels = [layer.kernel for layer in problem.layers[1:]]
    # fp16 rounds what is sent by 2 ** -11 of it, and the average once more.
    half = 2**-10 * max(abs(g).max() for g in mean + problem.expected(problem.mine))
    cases = [
        ({}, 1, 1e-6),
        ({"op": hvd.Sum}, 2, 1e-6),
        ({"sparse_as_dense": True}, 1, 1e-6),
        ({"gradient_predivide_factor": 2.0, "sparse_as_dense": True}, 1, 1e-6),
        ({"compression": hvd.Compression.fp16}, 1, half),
        ({"groups": 1, "sparse_as_dense": True}, 1, 1e-6),
        ({"groups": 2}, 1, 1e-6),
        ({"groups": [kernels]}, 1, 1e-6),
        ({"groups": [kernels, problem.layers[0].trainable_variables], "op": hvd.Sum}, 2, 1e-6),
    ]
    for options, times, tolerance in cases:
        for compiled in (True, False):
            found = problem.found(
                lambda t, o=options: hvd.DistributedGradientTape(t, **o), compiled
            )
            _close(found, [times * g for g in mean], tolerance)


def tape_structures() -> None:
    """Sources may be one variable, a dictionary or a tuple."""
    import horovod.tensorflow as hvd

    problem = _Problem()
    mean = problem.expected()
    one = problem.found(hvd.DistributedGradientTape, sources=problem.sources[1])
    _close([one], [mean[1]])
    named = {"b": problem.sources[2], "a": (problem.sources[3],)}
    found = problem.found(hvd.DistributedGradientTape, sources=named)
    _close([found["b"], found["a"][0]], [mean[2], mean[3]])


def tape_local_sources() -> None:
    """A local layer's gradients are its rank's own, divided by the number of ranks or not."""
    import horovod.tensorflow as hvd

    problem = _Problem()
    mean, own = problem.expected(), problem.expected(problem.mine)
    first = 1  # the embedding is local
    for scaled in (True, False):

        def wrap(tape, scaled=scaled):
            return hvd.PartialDistributedGradientTape(
                tape, local_layers=problem.layers[0], scale_local_gradients=scaled
            )

        found = problem.found(wrap)
        _close(found[first:], mean[first:])
        _close(found[:first], [g / (2 if scaled else 1) for g in own[:first]])

    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = problem.loss(problem.mine)
    tape = hvd.PartialDistributedGradientTape(tape, local_layers=[problem.layers[0]])
    local, shared = tape.get_local_and_global_gradients(loss, problem.sources)
    assert [v is problem.sources[0] for v, _ in local] == [True]
    assert all(a is b for (a, _), b in zip(shared, problem.sources[1:], strict=True))


def tape_process_set() -> None:
    """Ranks outside the process set keep their own gradients."""
    import horovod.tensorflow as hvd

    problem = _Problem()
    alone = hvd.add_process_set([1])
    try:
        found = problem.found(lambda t: hvd.DistributedGradientTape(t, process_set=alone))
        _close(found, problem.expected(problem.mine))
        found = problem.found(
            lambda t: hvd.DistributedGradientTape(t, process_set=hvd.global_process_set)
        )
        _close(found, problem.expected())
    finally:
        hvd.remove_process_set(alone)


def tape_unconnected() -> None:
    """A layer that only rank 0's loss reaches is no reason to wait for rank 1."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    v, other = tf.Variable(2.0), tf.Variable(3.0)
    with tf.GradientTape() as tape:
        loss = v * v + (other if hvd.rank() == 0 else 0.0)
    tape = hvd.DistributedGradientTape(tape)
    zero = tf.UnconnectedGradients.ZERO
    found = tape.gradient(loss, [v, other], unconnected_gradients=zero)
    assert [float(g) for g in found] == [4, 0.5]


def tape_names() -> None:
    """Layers with other names on rank 1, in a traced step: dense and sparse, alone and grouped."""
    import horovod.tensorflow as hvd
    import keras

    for _ in range(hvd.rank()):
        keras.layers.Dense(2), keras.layers.Embedding(2, 2)
    problem = _Problem()
    for groups in (None, 1):

        def wrap(tape, groups=groups):
            return hvd.DistributedGradientTape(tape, groups=groups)

        _close(problem.found(wrap), problem.expected())


def broadcast_by_place() -> None:
    """Variables with other names on each rank are broadcast, in place too; so is bfloat16."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np
    import tensorflow as tf

    rank = hvd.rank()
    names = [["b", "a", "b"], ["a", "b", "c"]][rank]
    for inplace in (False, True):
        for dtype in ("float32", "int64", "bool") if inplace else ("float32", "int64", "bfloat16"):
            made = [
                keras.Variable(
                    np.full(shape, rank + 1 if dtype != "bool" else rank == 0),
                    dtype=dtype,
                    name=name,
                )
                for name, shape in zip(names, ((2, 3), (4,), ()), strict=True)
            ]
            hvd.broadcast_variables(made, root_rank=0, inplace=inplace)
            for v in made:
                assert bool(np.all(np.asarray(v.numpy()).astype("float32") == 1)), (inplace, dtype)

    made = [keras.Variable(np.full((2,), 1.0 + rank), name=name) for name in names]

    @tf.function
    def broadcast():
        hvd.broadcast_variables(made, root_rank=1)

    broadcast()
    assert all(v.numpy().tolist() == [2, 2] for v in made)


def broadcast_keras_variables() -> None:
    """Eagerly, in place and in a traced function."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np
    import tensorflow as tf

    made = [keras.Variable(np.zeros(shape), name="kernel") for shape in ((2, 3), (4,), ())]

    def broadcast(inplace: bool) -> None:
        hvd.broadcast_variables(made, root_rank=1, inplace=inplace)

    for call in (broadcast, tf.function(broadcast)):
        for inplace in (False, True):
            for v in made:
                v.assign(np.full(v.shape, 1.0 + hvd.rank()))
            call(inplace)
            assert all(bool(np.all(v.numpy() == 2)) for v in made), inplace


def options_of_a_keras_optimizer() -> None:
    """`op` and `groups` given to horovod.tensorflow.DistributedOptimizer."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np
    import tensorflow as tf

    for groups in (None, 1):
        v = keras.Variable(np.zeros(1), dtype="float32")
        sgd = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), op=hvd.Sum, groups=groups)
        sgd.apply([tf.constant([1.0 + hvd.rank()])], [v])
        assert v.numpy().tolist() == [-3]


def objects() -> None:
    """Objects are broadcast and gathered, through a function made before too."""
    import horovod.tensorflow as hvd

    mine = {"rank": hvd.rank(), "list": [1, "two"] * (1 + hvd.rank())}
    assert hvd.broadcast_object(mine, root_rank=1) == {"rank": 1, "list": [1, "two"] * 2}
    assert hvd.broadcast_object(mine if hvd.rank() == 0 else None)["rank"] == 0
    assert hvd.broadcast_object_fn(root_rank=1)(mine)["rank"] == 1
    assert [each["rank"] for each in hvd.allgather_object(mine)] == [0, 1]


def keras_variables_reduced() -> None:
    """The collectives take Keras variables."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np

    v = keras.Variable(np.full((2,), 1.0 + hvd.rank(), "float32"))
    half = hvd.Compression.fp16
    assert hvd.allreduce(v).numpy().tolist() == [1.5, 1.5]
    assert hvd.allreduce(v, compression=half, op=hvd.Sum).numpy().tolist() == [3, 3]
    assert hvd.grouped_allreduce([v, v], compression=half)[1].numpy().tolist() == [1.5, 1.5]
    assert hvd.allgather(v).numpy().tolist() == [1, 1, 2, 2]
    assert hvd.broadcast(v, root_rank=1).numpy().tolist() == [2, 2]


def allreduce_of_values() -> None:
    """horovod.keras.allreduce averages, or does what `op` says."""
    import horovod.keras as hvd
    import horovod.tensorflow
    import numpy as np

    mine = np.full((2,), 1.0 + hvd.rank(), "float32")
    assert np.asarray(hvd.allreduce(mine)).tolist() == [1.5, 1.5]
    assert np.asarray(hvd.allreduce(mine, op=horovod.tensorflow.Max)).tolist() == [2, 2]


CHECKS_OF = {
    "python/keras3_tape": (tape_options, tape_structures, tape_local_sources, tape_process_set),
    "python/keras3_collectives": (keras_variables_reduced,),
    "python/keras_allreduce_op": (allreduce_of_values,),
    "python/tape_unconnected": (tape_unconnected,),
    "python/broadcast_object_fn": (objects,),
    "python/broadcast_names": (broadcast_by_place,),
    "python/keras3_broadcast": (broadcast_keras_variables,),
    "python/passed_options": (options_of_a_keras_optimizer,),
    "python/sparse_list": (sparse_beside_dense,),
    "python/variable_groups": (groups_of_one_name,),
    "python/gradient_names": (tape_names,),
}
CHECKS = {check.__name__: check for checks in CHECKS_OF.values() for check in checks}

if __name__ == "__main__":
    import horovod.tensorflow

    horovod.tensorflow.init(process_sets="dynamic")
    main(CHECKS)
    sys.exit()

# ------------------------------------------------------------------------------ tests, outside it

# Undone together, where none of them lets the check of another one fail; a check that waits in vain
# comes last, and ends the job.
UNDONE = [tuple(CHECKS_OF)[:6], tuple(CHECKS_OF)[6:-1], tuple(CHECKS_OF)[-1:]]


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
    checks = [check.__name__ for mend in undone for check in CHECKS_OF[mend]]
    job = jobs(launcher, checks, undone=undone, check_seconds=15)
    for check in checks:
        job.failed(check, may_wait=check == checks[-1])
