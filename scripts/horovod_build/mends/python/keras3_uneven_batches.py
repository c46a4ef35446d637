"""Let ranks with different numbers of batches end each epoch of `fit` together.

A rank that has run out of batches goes on to the next epoch or ends, while the others wait for its
part of their next allreduce, for ever. Horovod's `join` is the remedy, but `fit` has no place for
it, and a rank that has joined misses the steps of the others.

https://github.com/horovod/horovod/issues/1206
https://github.com/horovod/horovod/issues/403
"""

FILES = ("horovod/keras/callbacks.py", "horovod/tensorflow/keras/callbacks.py")


def mend(source):
    for path in FILES:
        source.edit(
            path,
            "class BroadcastGlobalVariablesCallback(",
            "class BroadcastGlobalVariablesCallback(_keras3_callbacks.part(keras, 'StepsTogether'),\n"
            "                                       ",
        )
