"""Let `hvd.broadcast_object_fn` work in eager mode, and find `placeholder` in a graph.

It used `tf.placeholder`, which TensorFlow 2 does not have.
"""

EAGER = """    if _executing_eagerly():
        return lambda obj: broadcast_object(obj, root_rank, session, name, process_set)

"""


def mend(source):
    path = "horovod/tensorflow/functions.py"
    anchor = "    name = name or 'broadcast_object_fn'\n\n"
    source.edit(path, anchor, anchor + EAGER)
    source.edit(path, " = tf.placeholder(", " = tf.compat.v1.placeholder(", times=2)
