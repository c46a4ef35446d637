"""What probes share: a row of the table, a small Keras model and its reference."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """One row. `refusal` is in the error with which we refuse such a use, where that is not
    Keras3NotSupported. With `of_launcher`, `run` is called outside a job, with a launcher and a
    package."""

    area: str
    title: str
    run: Callable
    refusal: str = ""
    of_launcher: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


def rows(area: str) -> tuple[list[Probe], Callable[..., Callable]]:
    """The rows of one area of the table, and a decorator `probe(title, …)` that makes a function
    one of them."""
    found: list[Probe] = []

    def probe(title: str, **options) -> Callable[[Callable], Callable]:
        def add(function: Callable) -> Callable:
            found.append(Probe(area, title, function, **options))
            return function

        return add

    return found, probe


STEPS, ROWS = 4, 4  # of each rank


def start_keras():
    """Keras after `init`, with the same seed on both ranks."""
    import horovod.tensorflow as hvd
    import keras

    hvd.init()
    keras.utils.set_random_seed(1)
    return keras


def small_model(**compiled):
    import keras

    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    if compiled:
        model.compile(loss="mse", **compiled)
    return model


def batches(rank: int | None = None):
    """Inputs and targets of all steps: this rank's half of each batch, or all of it."""
    import numpy as np

    rng = np.random.default_rng(2)
    x = rng.normal(size=(STEPS, 2, ROWS, 3)).astype("float32")
    y = rng.normal(size=(STEPS, 2, ROWS, 2)).astype("float32")
    if rank is None:
        return x.reshape(-1, 3), y.reshape(-1, 2)
    return x[:, rank].reshape(-1, 3), y[:, rank].reshape(-1, 2)


def fit(model, rank: int | None, **options) -> None:
    batch = 2 * ROWS if rank is None else ROWS
    x, y = batches(rank)
    model.fit(x, y, batch_size=batch, shuffle=False, verbose=0, **options)


def arrays(model) -> list:
    import numpy as np

    variables = [*model.weights, *model.optimizer.variables]
    return [np.asarray(v.numpy(), "float64") for v in variables]


def close(found: list, expected: list, tolerance: float = 1e-5) -> None:
    import numpy as np

    assert len(found) == len(expected), f"{len(found)} variables instead of {len(expected)}"
    for a, b in zip(found, expected, strict=True):
        far = float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0))
        assert far < tolerance, f"differs by {far:.2g} from one rank with the whole batch"


def same_on_ranks(arrays: list) -> None:
    import horovod.tensorflow as hvd
    import numpy as np
    import tensorflow as tf

    digest = hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in arrays)).digest()
    both = hvd.allgather(tf.constant([list(digest)], tf.uint8), name="digest").numpy()
    assert (both[0] == both[1]).all(), "ranks differ"


def like_one_rank(wrap: Callable, make: Callable, train: Callable = fit, **compiled) -> None:
    """Training with `wrap(make())` on two ranks ends like that with `make()` on one."""
    import horovod.tensorflow as hvd

    mine = small_model(optimizer=wrap(make()), **compiled)
    train(mine, hvd.rank())
    one = small_model(optimizer=make())
    train(one, None)
    close([w.numpy() for w in mine.weights], [w.numpy() for w in one.weights])
    same_on_ranks(arrays(mine))


def adam():
    import keras

    return keras.optimizers.Adam(0.05)
