"""Let `hvd.join` of TensorFlow wait each time, not only the first.

The operation has no inputs and is not marked as stateful, so TensorFlow keeps its first result: a
second call returned at once, on a rank that the others then waited for. In eager mode each call now
runs in a graph of its own that nothing optimizes.
"""

JOIN = """    if not _executing_eagerly():
        return MPI_LIB.horovod_join()
    graph = tf.Graph()
    with graph.as_default():
        last = MPI_LIB.horovod_join()
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    config.graph_options.optimizer_options.opt_level = -1
    if not cuda_built() and not rocm_built():
        config.device_count['GPU'] = 0
    with tf.compat.v1.Session(graph=graph, config=config) as session:
        rank_joined_last = session.run(last)
    return tf.constant(rank_joined_last)
"""


def mend(source):
    source.edit("horovod/tensorflow/mpi_ops.py", "    return MPI_LIB.horovod_join()\n", JOIN)
