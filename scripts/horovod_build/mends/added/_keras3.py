"""What Horovod's Keras side must know about Keras 3.

Horovod 0.28.1 was written for the Keras before it: on Keras 3 most of `horovod.keras` and
`horovod.tensorflow.keras` either fails late or does nothing at all, and ranks then train different
models without a word. Until it is right, each of these parts refuses a Keras 3 object and says what
to use instead.
"""

import sys

CUSTOM_LOOP = (
    "Use hvd.DistributedGradientTape in a training loop or train_step of your own "
    "(horovod.tensorflow), or train with horovod-lm."
)
BROADCAST = (
    "Call hvd.broadcast_variables(model.weights, root_rank=0) and, after "
    "optimizer.build(model.trainable_variables), hvd.broadcast_variables(optimizer.variables, "
    "root_rank=0) from horovod.tensorflow before the first step."
)
AVERAGE = (
    "Average metrics with hvd.allreduce(value) from horovod.tensorflow, in the same order on every "
    "rank."
)
LEARNING_RATE = (
    "Assign optimizer.learning_rate in a callback of your own, or give the optimizer a schedule from "
    "keras.optimizers.schedules."
)
ELASTIC = (
    "Start the job again from a checkpoint, or use elastic training with PyTorch "
    "(horovod.torch.elastic.TorchState)."
)


class Keras3NotSupported(NotImplementedError):
    """A part of Horovod that does not work with Keras 3 was given something of Keras 3."""


def of_keras3(thing):
    """Whether the object or class `thing` derives from a class of Keras 3 (tf_keras is Keras 2)."""
    keras = sys.modules.get("keras")
    if keras is None or int(keras.__version__.split(".")[0]) < 3:
        return False
    cls = thing if isinstance(thing, type) else type(thing)
    return any(base.__module__.split(".")[0] == "keras" for base in cls.__mro__)


def refuse(what, why, instead, thing):
    """Raises Keras3NotSupported if `thing` is of Keras 3; does nothing otherwise."""
    if of_keras3(thing):
        raise Keras3NotSupported(f"{what} does not work with Keras 3: {why}. {instead}")


def tf_variable(variable):
    """The tf.Variable of a Keras 3 variable; anything else as it is."""
    return variable.value if of_keras3(variable) else variable
