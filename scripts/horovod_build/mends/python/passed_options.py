"""Pass `op` and `groups` on where horovod.tensorflow.DistributedOptimizer wraps a Keras optimizer.

Both were dropped: a Sum was asked for, an average was taken, in silence.

`groups` came to the Keras side with https://github.com/horovod/horovod/pull/2851; `op` was once lost
in the same way on its way from `horovod.keras.allreduce`:
https://github.com/horovod/horovod/issues/2842.
"""


def mend(source):
    source.edit(
        "horovod/tensorflow/__init__.py",
        "        return hvd_k.DistributedOptimizer(\n            optimizer=optimizer,\n",
        "        return hvd_k.DistributedOptimizer(\n"
        "            optimizer=optimizer,\n            op=op,\n            groups=groups,\n",
    )
