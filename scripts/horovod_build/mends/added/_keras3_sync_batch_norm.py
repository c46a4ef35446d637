"""Batch normalization over all ranks, for Keras 3."""

import keras
import tensorflow as tf
from horovod.tensorflow.mpi_ops import Sum, _allreduce
from tensorflow.python.framework import ops as tf_ops


@keras.saving.register_keras_serializable(package="horovod")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """keras.layers.BatchNormalization with the mean and variance of all ranks' batches.

    Each rank counts as many times as it has elements that no mask leaves out, so forward pass,
    gradients and moving statistics are those of one rank with all the batches, whatever their
    sizes; the moving statistics are equal on all ranks. One allreduce of 3 numbers a channel forward
    and one of 2 backward.

    The gradients are those of the sum of all ranks' losses: DistributedOptimizer and
    DistributedGradientTape then average or add them as they do those of other layers.
    """

    def __init__(self, fused=False, **kwargs):
        if fused in (True, None):
            raise ValueError("SyncBatchNormalization does not support fused=True.")
        super().__init__(**kwargs)

    def _moments(self, inputs, mask):
        axes = self._reduction_axes
        if mask is None:
            counted = None
            elements = tf.reduce_prod(tf.gather(tf.shape(inputs), axes))
            count = tf.fill([inputs.shape[self.axis]], tf.cast(elements, inputs.dtype))
        else:
            counted = tf.broadcast_to(tf.expand_dims(mask, -1), tf.shape(inputs))
            counted = tf.cast(counted, tf.bool)
            inputs = tf.where(counted, inputs, 0)
            count = tf.reduce_sum(tf.cast(counted, inputs.dtype), axes)
        # The mean in two steps, for one in fp32 is off by its last bits, which a large mean feels.
        near = tf.stop_gradient(tf.math.divide_no_nan(tf.reduce_sum(inputs, axes), count))
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        difference = inputs - tf.reshape(near, shape)
        if counted is not None:
            difference = tf.where(counted, difference, 0)
        rest = tf.math.divide_no_nan(tf.reduce_sum(difference, axes), count)
        squares = tf.reduce_sum(tf.square(difference), axes) - count * tf.square(rest)
        return _moments_of_all(count, near, rest, squares)


@tf.custom_gradient
def _moments_of_all(count, near, rest, squares):
    """The mean and variance of all ranks' elements, from each one's own count, mean (the sum of a
    constant `near` and `rest`) and sum of squared differences from that mean.

    Sums over ranks are in fp64: the difference of mean square and squared mean then loses nothing
    that fp32 has. An allreduce, unlike an allgather, goes on with ranks that have joined.
    """
    name = _name()
    count, mean = tf.cast(count, tf.float64), tf.cast(near, tf.float64) + tf.cast(rest, tf.float64)
    sums = [count, count * mean, tf.cast(squares, tf.float64) + count * tf.square(mean)]
    total, mean_sum, square_sum = tf.unstack(_summed(tf.stack(sums), name))
    mean_of_all = tf.math.divide_no_nan(mean_sum, total)
    variance_of_all = tf.math.divide_no_nan(square_sum, total) - tf.square(mean_of_all)
    variance_of_all = tf.maximum(variance_of_all, 0)

    def grad(*upstream):
        upstream = tf.stack([tf.cast(g, tf.float64) for g in upstream])
        by_mean, by_variance = tf.unstack(_summed(upstream, name + "_grad"))
        by_rest = by_mean + 2 * (mean - mean_of_all) * by_variance
        by_rest = tf.math.divide_no_nan(count * by_rest, total)
        by_squares = tf.math.divide_no_nan(by_variance, total)
        return None, None, tf.cast(by_rest, rest.dtype), tf.cast(by_squares, squares.dtype)

    return (tf.cast(mean_of_all, rest.dtype), tf.cast(variance_of_all, rest.dtype)), grad


def _summed(values, name):
    return _allreduce(values, name=name, op=Sum, ignore_name_scope=True)


def _name():
    """A name for Horovod that is the same on all ranks and no other layer's of this step.

    It has the layer's place in the traced function: names of layers may differ where one rank has
    loaded its model.
    """
    if tf.executing_eagerly():
        return "SyncBatchNormalization"
    graph = tf_ops.get_default_graph()
    while getattr(graph, "outer_graph", None) is not None and graph.outer_graph.building_function:
        graph = graph.outer_graph
    place = getattr(graph, "_horovod_sync_batch_norms", 0)
    graph._horovod_sync_batch_norms = place + 1
    return f"SyncBatchNormalization_{place}"
