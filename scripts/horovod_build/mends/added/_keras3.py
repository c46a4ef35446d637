"""What Horovod's Keras side must know about Keras 3.

Horovod 0.28.1 was written for the Keras before it: on Keras 3 most of `horovod.keras` and
`horovod.tensorflow.keras` failed late or did nothing at all, and ranks then trained different models
without a word.
"""

import sys


class Keras3NotSupported(NotImplementedError):
    """A part of Horovod that does not work with Keras 3 was given something of Keras 3."""


def of_keras3(thing):
    """Whether the object or class `thing` derives from a class of Keras 3 (tf_keras is Keras 2)."""
    keras = sys.modules.get("keras")
    if keras is None or int(keras.__version__.split(".")[0]) < 3:
        return False
    cls = thing if isinstance(thing, type) else type(thing)
    return any(base.__module__.split(".")[0] == "keras" for base in cls.__mro__)


def tf_variable(variable):
    """The tf.Variable of a Keras 3 variable; anything else as it is."""
    return variable.value if of_keras3(variable) else variable
