"""Horovod's distributed optimizers under Keras 3: two ranks end with the same weights and slots,
and with those of one rank that is given the whole batches.

Each launcher runs one job with all checks; this file is also the program that its ranks run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.mended import LAUNCHERS, Jobs, main

MENDS = ("python/keras3_optimizer", "python/keras3_load_model")
STEPS, BATCH = 4, 8
ENV = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}


# -------------------------------------------------------------- what the checks have in common


def _model(seed: int = 0) -> Any:
    """A convolutional net and a Transformer block beside each other.

    Its attention has no biases: the true gradient of a key's bias is zero, and what adaptive
    optimizers make of the rounding that is left of it is not the same twice.
    """
    import keras
    from keras import layers

    keras.utils.set_random_seed(seed)
    image, text = keras.Input((6, 6, 2)), keras.Input((4,))
    x = layers.Conv2D(3, 3, activation="tanh")(image)
    y = layers.Embedding(7, 4)(text)
    y = layers.LayerNormalization()(y + layers.MultiHeadAttention(2, 2, use_bias=False)(y, y))
    y = y + layers.Dense(4)(layers.Dense(6, activation="gelu")(y))
    both = layers.Concatenate()([layers.Flatten()(x), layers.Flatten()(y)])
    return keras.Model([image, text], layers.Dense(3, dtype="float32")(both))


def _small(seed: int = 0) -> Any:
    import keras

    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(2)]
    return keras.Sequential([keras.Input((4,)), *layers])


def _data(small: bool = False) -> tuple[Any, Any]:
    """Inputs and targets of STEPS whole batches."""
    import numpy as np

    rng = np.random.default_rng(0)
    samples = STEPS * BATCH
    if small:
        return rng.normal(size=(samples, 4)).astype("f"), rng.normal(size=(samples, 2)).astype("f")
    images = rng.normal(size=(samples, 6, 6, 2)).astype("f")
    return [images, rng.integers(0, 7, (samples, 4))], rng.integers(0, 3, samples)


def _mine(data: Any) -> Any:
    """This rank's part of each whole batch."""
    import horovod.tensorflow as hvd

    if isinstance(data, (list, tuple)):
        return type(data)(_mine(part) for part in data)
    parts = data.reshape(-1, hvd.size(), BATCH // hvd.size(), *data.shape[1:])
    return parts[:, hvd.rank()].reshape(-1, *data.shape[1:])


def _loss(small: bool) -> Any:
    import keras

    if small:
        return keras.losses.MeanSquaredError()
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _fit(optimizer: Any, mine: bool, small: bool = False, **compiled: Any) -> Any:
    """A model after `fit`: on this rank's part of each batch, or on the whole of it."""
    import horovod.tensorflow as hvd

    model = _small() if small else _model()
    model.compile(optimizer, _loss(small), **compiled)
    # A scale that overflows nothing: what a part of a batch gives is larger than the whole's.
    model.optimizer.initial_scale = 256.0
    inputs, targets = _mine(_data(small)) if mine else _data(small)
    size = BATCH // hvd.size() if mine else BATCH
    model.fit(inputs, targets, batch_size=size, shuffle=False, verbose=0)
    return model


def _alike(model: Any) -> None:
    """Asserts that weights and slots are the same on all ranks, bit for bit."""
    import horovod.tensorflow as hvd
    import numpy as np
    import tensorflow as tf

    values = [v.numpy().astype("float64") for v in (*model.weights, *model.optimizer.variables)]
    for_all = hvd.allgather(tf.constant(np.concatenate([v.ravel() for v in values])[None])).numpy()
    assert np.isfinite(for_all).all()
    assert (for_all == for_all[0]).all(), "ranks differ"


def _agree(ours: Any, whole: Any, within: float = 2e-4) -> None:
    """Asserts that weights and slots are those of one rank, within a fraction of their change."""
    import numpy as np

    start = [*(_model() if len(whole.weights) > 6 else _small()).get_weights()]
    start += [0 * v.numpy() for v in whole.optimizer.variables]
    ours, whole = ([*m.weights, *m.optimizer.variables] for m in (ours, whole))
    assert len(ours) == len(whole) == len(start)
    for one, other, before in zip(ours, whole, start, strict=True):
        one, other = one.numpy().astype("float64"), other.numpy().astype("float64")
        apart, change = np.abs(one - other).max(), np.abs(other - before).max()
        assert apart <= within * change, (other.shape, apart, change)


def _distributed(optimizer: Any, **options: Any) -> Any:
    import horovod.tensorflow.keras as hvd

    return hvd.DistributedOptimizer(optimizer, **options)


def _raises(kind: type[Exception], words: str, function: Callable) -> None:
    try:
        function()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__} with {words!r}")


@contextmanager
def _policy(name: str):
    import keras

    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


# ---------------------------------------------------------------------------- checks, in each rank


def every_optimizer(chosen: Sequence[str] = ()) -> None:
    """Whatever optimizers this Keras has, under fit. Ranks share the work of comparing."""
    import horovod.tensorflow as hvd
    import keras

    base, wrapper = keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer
    classes = {
        name: c
        for name, c in vars(keras.optimizers).items()
        if isinstance(c, type) and issubclass(c, base) and c not in (base, wrapper)
    }
    several = classes.pop("MultiOptimizer", None)
    assert {"SGD", "Adam", "AdamW", "Adafactor", "Lion", "Muon"} <= set(classes)
    makers = {n: lambda c=c: c(learning_rate=0.01) for n, c in classes.items()}
    if several is not None:
        makers["MultiOptimizer"] = lambda: several(
            keras.optimizers.OptimizerMap(
                keras.optimizers.SGD(0.01), {"conv.*": keras.optimizers.Adam(0.01)}
            )
        )
    for place, name in enumerate(chosen or makers):
        make = makers[name]
        ours = _fit(_distributed(make()), mine=True)
        _alike(ours)
        if place % hvd.size() == hvd.rank():
            try:
                _agree(ours, _fit(make(), mine=False))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def some_optimizers() -> None:
    every_optimizer(["Adam", "MultiOptimizer"])


def half_precisions() -> None:
    """Under mixed_float16 Keras wraps the distributed optimizer in a LossScaleOptimizer itself."""
    import horovod.tensorflow as hvd
    import keras

    def made() -> Any:
        return keras.optimizers.SGD(0.01, momentum=0.9)

    for comparing, (policy, within) in enumerate({"float16": 0.02, "bfloat16": 0.08}.items()):
        with _policy(f"mixed_{policy}"):
            ours = _fit(_distributed(made()), mine=True)
            scaled = isinstance(ours.optimizer, keras.optimizers.LossScaleOptimizer)
            assert scaled == (policy == "float16")
            _alike(ours)
            if hvd.rank() == comparing:
                _agree(ours, _fit(made(), mine=False), within)
            _alike(_fit(_distributed(keras.optimizers.Adam(0.01)), mine=True))


def ways_to_apply() -> None:
    """fit of many steps at once and eagerly, train_on_batch, and loops of one's own."""
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    whole = _fit(keras.optimizers.Adam(0.01), mine=False, small=True)
    for compiled in ({"steps_per_execution": 2}, {"run_eagerly": True}):
        ours = _fit(_distributed(keras.optimizers.Adam(0.01)), mine=True, small=True, **compiled)
        _alike(ours)
        _agree(ours, whole)

    inputs, targets = _mine(_data(small=True))
    size = BATCH // hvd.size()
    batches = [(inputs[i : i + size], targets[i : i + size]) for i in range(0, len(inputs), size)]

    def gradients(model, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(keras.losses.mean_squared_error(y, model(x, training=True)))
        return tape.gradient(loss, model.trainable_variables)

    def apply(model, x, y):
        model.optimizer.apply(gradients(model, x, y), model.trainable_variables)

    def apply_gradients(model, x, y):
        found = gradients(model, x, y)
        model.optimizer.apply_gradients(zip(found, model.trainable_variables, strict=True))

    def apply_to_the_built(model, x, y):
        model.optimizer.apply(gradients(model, x, y))

    ways = (
        lambda model: model.train_on_batch,
        lambda model: lambda x, y: apply(model, x, y),
        lambda model: tf.function(lambda x, y: apply_gradients(model, x, y)),
        lambda model: tf.function(lambda x, y: apply_to_the_built(model, x, y)),
    )
    for way in ways:
        model = _small()
        model.compile(_distributed(keras.optimizers.Adam(0.01)), "mse")
        model.optimizer.build(model.trainable_variables)
        step = way(model)
        for x, y in batches:
            step(tf.constant(x), tf.constant(y))
        _alike(model)
        _agree(model, whole)


def not_compiled_by_xla() -> None:
    """Where there is a GPU Keras compiles by XLA, which knows nothing of Horovod's operations."""
    import keras
    import tensorflow as tf
    from horovod import _keras3

    listed = tf.config.list_physical_devices
    gpu = [tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")]
    tf.config.list_physical_devices = lambda *kind: gpu
    try:
        plain, ours = _small(), _small()
        plain.compile("sgd", "mse")
        ours.compile(_distributed(keras.optimizers.SGD()), "mse")
    finally:
        tf.config.list_physical_devices = listed
    assert plain.jit_compile and not ours.jit_compile
    _raises(
        _keras3.Keras3NotSupported,
        "jit_compile=False",
        lambda: _fit(_distributed(keras.optimizers.SGD()), True, small=True, jit_compile=True),
    )


def _descend(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """How much `apply`, in a tf.function, has taken from the `variables`."""
    import tensorflow as tf

    before = [v.numpy() for v in variables]
    tf.function(lambda: optimizer.apply(list(gradients), list(variables)))()
    return [(b - v.numpy()).tolist() for b, v in zip(before, variables, strict=True)]


def options() -> None:
    import horovod.keras as hvd_keras
    import horovod.tensorflow as hvd_tensorflow
    import horovod.tensorflow.keras as hvd
    import keras
    import numpy as np
    import tensorflow as tf

    mine = 1.0 + hvd.rank()

    def reduced(make=hvd.DistributedOptimizer, dtypes=("float32",) * 3, given=None, **chosen):
        """What becomes of the gradients 1, 10 and 100 times (rank + 1)."""
        variables = [keras.Variable(np.zeros(1), dtype=t, name="kernel") for t in dtypes]
        if "groups" in chosen and isinstance(chosen["groups"], list):
            chosen["groups"] = [[variables[i] for i in group] for group in chosen["groups"]]
        gradients = [tf.constant([mine * 10**i], v.dtype) for i, v in enumerate(variables)]
        return _descend(make(keras.optimizers.SGD(1.0), **chosen), gradients, variables)

    average, total = [[1.5], [15.0], [150.0]], [[3.0], [30.0], [300.0]]
    for make in (
        hvd.DistributedOptimizer,
        hvd_keras.DistributedOptimizer,
        hvd_keras.PartialDistributedOptimizer,
        hvd_tensorflow.DistributedOptimizer,
    ):
        assert reduced(make) == average
        assert reduced(make, op=hvd.Sum) == total
        for groups in (1, 2, 9, [[0], [2, 1]], [[2, 0]], []):
            assert reduced(make, op=hvd.Sum, groups=groups) == total, groups
        assert reduced(make, compression=hvd.Compression.fp16) == average
        assert reduced(make, gradient_predivide_factor=4.0) == average
    assert reduced(num_groups=2) == average
    assert reduced(dtypes=("float32", "float16", "bfloat16")) == average
    sets = [hvd.add_process_set([rank]) for rank in range(hvd.size())]
    for rank, process_set in enumerate(sets):
        assert reduced(process_set=process_set) == [[mine], [10 * mine], [100 * mine]], rank
        hvd.remove_process_set(process_set)

    for dense in (False, True):
        table = keras.Variable(np.zeros((4, 2)), name="table")
        rows = tf.IndexedSlices(
            tf.fill((2, 2), mine), tf.constant([0, 2 * hvd.rank()]), tf.constant([4, 2])
        )
        weight = keras.Variable(np.zeros(1))
        optimizer = _distributed(
            keras.optimizers.SGD(1.0), sparse_as_dense=dense, gradient_predivide_factor=2.0
        )
        moved, single = _descend(optimizer, [rows, tf.constant([mine])], [table, weight])
        assert moved == [[2, 2], [0, 0], [1, 1], [0, 0]], moved
        assert single == [1.5]


def what_contradicts() -> None:
    import horovod.tensorflow as hvd
    import keras

    sgd = keras.optimizers.SGD
    built = sgd()
    built.build(_small().trainable_variables)
    twice = _distributed(sgd())
    for words, use in (
        ("Adasum", lambda: hvd.DistributedOptimizer(sgd(), op=hvd.Adasum)),
        ("Average and Sum", lambda: _distributed(sgd(), op=hvd.Adasum)),
        ("predivide", lambda: _distributed(sgd(), op=hvd.Sum, gradient_predivide_factor=2.0)),
        ("distributed already", lambda: _distributed(twice)),
        ("distributed already", lambda: _distributed(keras.optimizers.LossScaleOptimizer(twice))),
        ("not built", lambda: _distributed(built, backward_passes_per_step=2)),
        ("at least 1", lambda: _distributed(sgd(), backward_passes_per_step=0)),
        (
            "gradient_accumulation_steps=3",
            lambda: _distributed(sgd(gradient_accumulation_steps=3), backward_passes_per_step=2),
        ),
    ):
        _raises(ValueError, words, use)

    class Unclipped(sgd):
        def _backend_apply_gradients(self, grads, trainable_variables):
            self._backend_update_step(grads, trainable_variables, self.learning_rate)

    _raises(RuntimeError, "not reduced", lambda: _fit(_distributed(Unclipped()), True, small=True))


def clips_what_is_reduced() -> None:
    """Clipped before it, gradients of other norms on each rank would not be those of one rank."""
    import keras

    for clip in ({"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"clipvalue": 0.02}):
        ours = _fit(_distributed(keras.optimizers.SGD(0.1, **clip)), mine=True, small=True)
        _alike(ours)
        _agree(ours, _fit(keras.optimizers.SGD(0.1, **clip), mine=False, small=True))


def averages_of_weights() -> None:
    import keras

    given = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    ours = _fit(_distributed(keras.optimizers.SGD(0.1, **given)), mine=True, small=True)
    _alike(ours)
    _agree(ours, _fit(keras.optimizers.SGD(0.1, **given), mine=False, small=True))


def keeps_what_it_was() -> None:
    """Slots, iterations and exclusions from weight decay of an optimizer that was in use."""
    import keras
    import numpy as np

    def made() -> Any:
        optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    plain, wrapped = _fit(made(), mine=False, small=True), _fit(made(), mine=False, small=True)
    slots = [v.numpy() for v in wrapped.optimizer.variables]
    wrapped.compile(_distributed(wrapped.optimizer), "mse")
    plain.compile(plain.optimizer, "mse")
    for before, after in zip(slots, wrapped.optimizer.variables, strict=True):
        assert np.array_equal(before, after.numpy())
    inputs, targets = _data(small=True)
    plain.fit(inputs, targets, batch_size=BATCH, shuffle=False, verbose=0)
    parts = _mine((inputs, targets))
    wrapped.fit(*parts, batch_size=BATCH // 2, shuffle=False, verbose=0)
    assert int(wrapped.optimizer.iterations) == 2 * STEPS
    _alike(wrapped)
    _agree(wrapped, plain)
    again = type(wrapped.optimizer).from_config(wrapped.optimizer.get_config())
    assert type(again) is type(wrapped.optimizer), "a copy of it would not be distributed"


def accumulates() -> None:
    """backward_passes_per_step: one reduction for as many local passes, of their sum or average."""
    import keras
    import tensorflow as tf
    from horovod import _keras3_optimizer

    reductions = []
    grouped = _keras3_optimizer.Reduction._grouped
    _keras3_optimizer.Reduction._grouped = lambda self, tensors, name: (
        tf.py_function(lambda: reductions.append(name), [], []),
        grouped(self, tensors, name),
    )[1]
    given = {"momentum": 0.9, "gradient_accumulation_steps": 2}
    whole = _fit(keras.optimizers.SGD(0.02, **given), mine=False, small=True)
    try:
        for average in (False, True):
            for eagerly in (False, True):
                reductions.clear()
                rate = 0.02 if average else 0.01
                sgd = keras.optimizers.SGD(rate, momentum=0.9)
                options = {"backward_passes_per_step": 2, "average_aggregated_gradients": average}
                ours = _fit(_distributed(sgd, **options), True, small=True, run_eagerly=eagerly)
                assert len(reductions) == STEPS / 2, reductions
                _alike(ours)
                # Half the rate times twice the gradient is the same.
                whole.optimizer.learning_rate = rate
                _agree(ours, whole)
    finally:
        _keras3_optimizer.Reduction._grouped = grouped
    ours = _fit(
        _distributed(keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)), True, small=True
    )
    _agree(
        ours,
        _fit(keras.optimizers.Adam(0.01, gradient_accumulation_steps=2), mine=False, small=True),
    )


def local_layers() -> None:
    """PartialDistributedOptimizer leaves them to each rank, also such as are built only later."""
    import horovod.keras as hvd
    import keras
    import numpy as np
    import tensorflow as tf

    for scale in (False, True):
        for wrap in (lambda o: o, keras.optimizers.LossScaleOptimizer):
            shared, local = (keras.layers.Dense(1, use_bias=False) for _ in range(2))
            optimizer = hvd.PartialDistributedOptimizer(
                wrap(keras.optimizers.SGD(1.0)), local_layers=local, scale_local_gradients=scale
            )
            shared.build((1, 1)), local.build((1, 1))
            weights = [shared.kernel, local.kernel]
            optimizer.build(weights)
            factor = optimizer.scale_loss(1.0)
            gradient = tf.fill((1, 1), factor * (1.0 + hvd.rank()))
            moved = np.ravel(_descend(optimizer, [gradient, gradient], weights))
            assert np.allclose(moved, [1.5, (1 + hvd.rank()) / (2 if scale else 1)]), moved


def one_rank_overflows() -> None:
    """All ranks leave the step out and halve the scale, in every nesting; none waits for others."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np

    scaled = keras.optimizers.LossScaleOptimizer
    given: dict[str, Any] = {"initial_scale": 1024.0, "dynamic_growth_steps": 2}
    for wrap in (
        lambda sgd: _distributed(scaled(sgd, **given)),
        lambda sgd: scaled(_distributed(sgd), **given),
        None,
    ):
        for eagerly in (False, True):
            sgd = keras.optimizers.SGD(0.01)
            with _policy("float32" if wrap else "mixed_float16"):
                model = _small()
                optimizer = wrap(sgd) if wrap else _distributed(sgd)
                model.compile(optimizer, "mse", run_eagerly=eagerly)
            assert isinstance(model.optimizer, scaled)
            inputs, targets = _mine(_data(small=True))
            scales = []
            for step in range(STEPS):
                part = slice(step * BATCH // 2, (step + 1) * BATCH // 2)
                x = inputs[part].copy()
                if step == 1 and hvd.rank() == 1:
                    x[0, 0] = np.inf
                before = model.get_weights()
                model.train_on_batch(x, targets[part])
                after = model.get_weights()
                same = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
                assert same == (step == 1)
                scales.append(float(model.optimizer.dynamic_scale))
                _alike(model)
            if wrap is not None:
                assert scales == [1024, 512, 512, 1024], scales
            assert int(model.optimizer.iterations) == STEPS - 1


def names_differ() -> None:
    """One rank has made optimizers and models before: what Keras counts up is not the same."""
    import horovod.tensorflow as hvd
    import keras

    for _ in range(3 * hvd.rank()):
        keras.optimizers.SGD(), _small()
    ours = _fit(_distributed(keras.optimizers.SGD(0.1)), mine=True, small=True)
    _alike(ours)


def ranks_that_come_and_go() -> None:
    """In an elastic job the number of ranks is asked for in every step."""
    import os

    import keras

    os.environ["HOROVOD_ELASTIC"] = "1"
    try:
        ours = _fit(_distributed(keras.optimizers.SGD(0.1)), mine=True)
    finally:
        del os.environ["HOROVOD_ELASTIC"]
    _alike(ours)
    _agree(ours, _fit(keras.optimizers.SGD(0.1), mine=False))


def overwritten_variables() -> None:
    """The scales of 8-bit floats come as gradients, and their maximum is what all ranks take."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np
    import tensorflow as tf

    scale, weight = keras.Variable(np.zeros(2)), keras.Variable(np.zeros(2))
    scale.overwrite_with_gradient = True
    gradients = [tf.constant([1.0 + hvd.rank(), 5.0 - hvd.rank()]), tf.ones(2) * hvd.rank()]
    moved = _descend(_distributed(keras.optimizers.SGD(1.0)), gradients, [scale, weight])
    assert moved == [[-2, -5], [0.5, 0.5]], moved


PLAINLY = """
import sys
sys.modules["horovod"] = None  # importing it fails
import keras
import numpy as np
model = keras.models.load_model(sys.argv[1])
inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
values = [v.numpy() for v in (*model.weights, *model.optimizer.variables)]
np.savez(sys.argv[1] + ".npz", type(inner).__module__, *values)
"""


def saves_as_it_was() -> None:
    """Files say nothing of Horovod, load where it is not there, and come back distributed."""
    import horovod.keras as hvd_keras
    import horovod.tensorflow.keras as hvd
    import keras
    import numpy as np

    @keras.saving.register_keras_serializable("ours")
    class Mine(keras.optimizers.SGD):
        pass

    folder = Path(tempfile.mkdtemp())
    adam, scaled = keras.optimizers.Adam, keras.optimizers.LossScaleOptimizer
    cases = [
        (adam(0.01), "model.keras", hvd),
        (scaled(adam(0.01), initial_scale=256.0), "scaled.keras", hvd_keras),
        (Mine(0.01, momentum=0.9), "mine.keras", hvd),
    ]
    for optimizer, file, module in cases:
        kind, config = type(optimizer), optimizer.get_config()
        model = _fit(_distributed(optimizer), mine=True, small=True)
        path = str(folder / file)
        assert keras.saving.serialize_keras_object(
            optimizer
        ) == keras.saving.serialize_keras_object(kind.from_config(config))
        model.save(path)
        values = [v.numpy() for v in (*model.weights, *model.optimizer.variables)]
        if file == "model.keras" and hvd.rank() == 0:
            program = [sys.executable, "-c", PLAINLY, path]
            subprocess.run(program, check=True, timeout=60)
            module_name, *plainly = np.load(path + ".npz").values()
            assert str(module_name) == "keras.src.optimizers.adam"
            assert all(np.array_equal(a, b) for a, b in zip(values, plainly, strict=True))
        loaded = module.load_model(path)
        inner = getattr(loaded.optimizer, "inner_optimizer", loaded.optimizer)
        assert hasattr(inner, "horovod") and int(loaded.optimizer.iterations) == STEPS
        found = [v.numpy() for v in (*loaded.weights, *loaded.optimizer.variables)]
        assert all(np.array_equal(a, b) for a, b in zip(values, found, strict=True))
        for each in (model, loaded):
            parts = _mine(_data(small=True))
            each.fit(*parts, batch_size=BATCH // 2, shuffle=False, verbose=0)
        for one, other in zip(model.weights, loaded.weights, strict=True):
            assert np.array_equal(one.numpy(), other.numpy())
        _alike(loaded)
    uncompiled = _small()
    uncompiled.save(folder / "uncompiled.keras")

    class WrapsItself(Mine):
        @classmethod
        def from_config(cls, config):
            return _distributed(Mine.from_config(config))

    loaded = hvd.load_model(path, custom_objects={"ours>Mine": WrapsItself})
    assert isinstance(loaded.optimizer, Mine) and hasattr(loaded.optimizer, "horovod")
    assert getattr(hvd.load_model(folder / "uncompiled.keras"), "optimizer", None) is None


# Of the many optimizers, which take the longest, few are tried again on the other launcher.
OPTIMIZERS = {"mpi": every_optimizer, "gloo": some_optimizers}
CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        half_precisions,
        ways_to_apply,
        not_compiled_by_xla,
        options,
        what_contradicts,
        clips_what_is_reduced,
        averages_of_weights,
        keeps_what_it_was,
        accumulates,
        local_layers,
        one_rank_overflows,
        names_differ,
        ranks_that_come_and_go,
        overwritten_variables,
        saves_as_it_was,
    )
}


# ------------------------------------------------------------------------------ tests, outside it

if __name__ == "__main__":
    import horovod.tensorflow

    horovod.tensorflow.init()
    main(CHECKS | {check.__name__: check for check in OPTIMIZERS.values()})
    sys.exit()

pytest.importorskip("horovod")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(__file__, tmp_path_factory, ENV)


@pytest.mark.parametrize("check", [*CHECKS, "optimizers"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_are_one(jobs, launcher, check):
    optimizers = OPTIMIZERS[launcher].__name__
    job = jobs(launcher, [*CHECKS, optimizers], seconds=280)
    job.passed(optimizers if check == "optimizers" else check)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("mend", MENDS)
def test_without_the_mend(jobs, launcher, mend):
    checks = ["saves_as_it_was"]
    if mend == MENDS[0]:  # over Gloo one of them says enough
        checks = [*CHECKS, "every_optimizer"] if launcher == "mpi" else ["ways_to_apply"]
    job = jobs(launcher, checks, undone=[mend])
    for check in checks:
        job.failed(check)
