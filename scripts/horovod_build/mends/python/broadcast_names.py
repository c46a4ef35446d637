"""Tell the variables of `hvd.broadcast_variables` apart by their places, not by their names.

Horovod pairs what ranks send by name, and took that of each variable. Keras counts names up:
`dense_1` of a rank that has made or loaded another model before is `dense` of the next rank, and
names of optimizer slots hold those of layers. The ranks then waited for each other for ever, or
took each other's variables in another order. In place, two variables of one name could not be
broadcast at all. And bfloat16, which Horovod's TensorFlow operations do not take, goes as float32.

https://github.com/horovod/horovod/issues/530
"""

FROM_ROOT = """def _from_root(var, place, root_rank, process_set):
    narrow = var.dtype.base_dtype == tf.bfloat16
    value = broadcast(tf.cast(var, tf.float32) if narrow else var, root_rank,
                      name='HorovodBroadcast_variable_%d' % place, process_set=process_set)
    return tf.cast(value, tf.bfloat16) if narrow else value


"""


def mend(source):
    path = "horovod/tensorflow/functions.py"
    anchor = "@_cache\ndef _make_broadcast_group_fn():\n"
    source.edit(path, anchor, FROM_ROOT + anchor)
    source.edit(
        path,
        "            for var in variables:\n"
        "                var.assign(broadcast(var, root_rank, process_set=process_set))\n",
        "            for place, var in enumerate(variables):\n"
        "                var.assign(_from_root(var, place, root_rank, process_set))\n",
    )
    source.edit(
        path,
        "var.assign(broadcast(var, root_rank, process_set=process_set))\n"
        "                              for var in variables])",
        "var.assign(_from_root(var, place, root_rank, process_set))\n"
        "                              for place, var in enumerate(variables)])",
    )
    source.edit(
        "horovod/tensorflow/mpi_ops.py",
        "variable_names=[var.name for var in variables]",
        "variable_names=['variable_%d' % place for place in range(len(variables))]",
        times=2,
    )
