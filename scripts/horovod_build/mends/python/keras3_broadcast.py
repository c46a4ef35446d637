"""Let `hvd.broadcast_variables` take Keras 3 variables.

In a graph a Keras 3 variable has no `assign` that can be traced here; its `value`, the tf.Variable,
has.

Other things without `assign` in a model failed in the same line:
https://github.com/horovod/horovod/issues/2356.
"""


def mend(source):
    path = "horovod/tensorflow/functions.py"
    source.edit(
        path,
        "from horovod.tensorflow.mpi_ops import allgather, broadcast, broadcast_\n",
        "from horovod import _keras3\n"
        "from horovod.tensorflow.mpi_ops import allgather, broadcast, broadcast_\n",
    )
    source.edit(
        path,
        "    if inplace:\n        vars_by_device = {}\n",
        "    variables = [_keras3.tf_variable(v) for v in variables]\n"
        "    if inplace:\n        vars_by_device = {}\n",
    )
