"""Variables of TensorFlow and of Keras 3 in an elastic state: their values in host memory, and those
of rank 0 on every rank.
"""

import contextlib

import numpy as np
import tensorflow as tf
from horovod._keras3 import of_keras3, tf_variable
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow.functions import allgather_object
from horovod.tensorflow.mpi_ops import broadcast

PIECE = 256 * 2**20  # bytes of one broadcast


def copy(variables):
    """Pairs of each variable and a copy of its value in host memory."""
    return [(variable, np.array(tf_variable(variable).numpy())) for variable in variables]


def assign(pairs):
    """Gives each variable of `copy`'s pairs its value."""
    for variable, value in pairs:
        tf_variable(variable).assign(value)


def broadcast_from_rank_0(variables):
    """Makes every rank's variables equal to rank 0's, bit by bit.

    Variables belong together by their place in the list, not by their names, which differ where one
    rank has made more models than another. Raises ValueError on every rank where shapes or types
    differ.
    """
    pairs = copy(variables)
    described = [(value.shape, value.dtype.name) for _, value in pairs]
    for rank, theirs in enumerate(allgather_object(described, name="elastic.variables")):
        if theirs != described:
            raise ValueError(
                "An elastic state must hold the same variables on all ranks, but rank "
                f"{rank} has others than this one: {_difference(theirs, described)}"
            )
    if not pairs:
        return
    # As bytes: one collective for all types, some of which Horovod doesn't reduce or send.
    flat = np.concatenate([_as_bytes(value) for _, value in pairs])
    for start in range(0, flat.size, PIECE):
        with tf.device("/CPU:0"):
            piece = tf.constant(flat[start : start + PIECE])
            flat[start : start + PIECE] = broadcast(piece, 0, name="elastic.values").numpy()
    sizes = [value.nbytes for _, value in pairs]
    received = []
    for (variable, value), part in zip(pairs, np.split(flat, np.cumsum(sizes)[:-1]), strict=True):
        received.append((variable, part.copy().view(value.dtype).reshape(value.shape)))
    assign(received)


def of_optimizer(optimizer):
    """All variables of an optimizer: iterations, learning rate, slots, loss scale."""
    variables = optimizer.variables
    return variables() if callable(variables) else variables


def build(model, optimizer):
    """Makes the slots of an optimizer for Keras 3 that has none yet, for what the model trains.

    A commit before the first step then holds them too, and a worker that comes later has as many as
    the others. Raises ValueError if there is no optimizer.
    """
    if optimizer is None:
        raise ValueError("The model has no optimizer: compile it, or give the state an optimizer.")
    if of_keras3(optimizer) and not optimizer.built:
        optimizer.build(model.trainable_variables)


@contextlib.contextmanager
def horovod_errors():
    """Turns an error of Horovod's operations into HorovodInternalError, after which an elastic job
    meets again; other errors pass."""
    try:
        yield
    except tf.errors.OpError as error:
        if "Horovod" in error.message and isinstance(
            error, (tf.errors.UnknownError, tf.errors.AbortedError)
        ):
            raise HorovodInternalError(error) from error
        raise


def _as_bytes(value):
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _difference(theirs, mine):
    if len(theirs) != len(mine):
        return f"{len(theirs)} variables, not {len(mine)}."
    at = next(i for i, (one, other) in enumerate(zip(theirs, mine, strict=True)) if one != other)
    return f"variable {at} is {theirs[at]}, not {mine[at]}."
