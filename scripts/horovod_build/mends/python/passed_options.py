"""Pass `op` and `groups` on where horovod.tensorflow.DistributedOptimizer wraps a Keras optimizer.

Both were dropped: a Sum was asked for, an average was taken, in silence.
"""


def mend(source):
    source.edit(
        "horovod/tensorflow/__init__.py",
        "        return hvd_k.DistributedOptimizer(\n            optimizer=optimizer,\n",
        "        return hvd_k.DistributedOptimizer(\n"
        "            optimizer=optimizer,\n            op=op,\n            groups=groups,\n",
    )
