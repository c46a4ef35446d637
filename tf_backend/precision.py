"""Which numbers the products run in: fp32, bf16, or fp16.

In the half precisions weights, residual stream, norms, softmax and loss stay in fp32; only the
inputs and results of matrix products are halves.
"""

from __future__ import annotations

import tensorflow as tf

HALF_TYPES = {"fp32": None, "bf16": tf.bfloat16, "fp16": tf.float16}


def cast(x: tf.Tensor, half: tf.DType | None) -> tf.Tensor:
    """`x` in the type of products."""
    return x if half is None else tf.cast(x, half)


def product(a: tf.Tensor, b: tf.Tensor, half: tf.DType | None) -> tf.Tensor:
    """`a @ b` with inputs and result in the type of products, summed in fp32.

    TensorFlow's fp16 product on CPUs rounds and overflows as fp16 does, also in the backward, at
    a bearable speed, so unlike in torch it is taken as it is. A `tf.transpose` of an input costs
    nothing: the graph optimizer folds it into the product.
    """
    return tf.matmul(cast(a, half), cast(b, half))


@tf.custom_gradient
def _add_bias(y, bias):
    def backward(gradient):
        # Summed in fp32: TensorFlow's own gradient adds up thousands of rows in a half. This
        # kernel sums columns four times as fast as tf.reduce_sum.
        total = tf.raw_ops.BiasAddGrad(out_backprop=tf.cast(gradient, tf.float32))
        return gradient, tf.cast(total, bias.dtype)

    return tf.nn.bias_add(y, bias), backward


def linear(
    x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None, half: tf.DType | None
) -> tf.Tensor:
    """`x @ kernel + bias` over the last axis: (…, in) and (in, out) give (…, out), in the type of
    products."""
    inputs, outputs = kernel.shape
    shape = tf.concat([tf.shape(x)[:-1], [outputs]], 0)
    y = product(tf.reshape(x, [-1, inputs]), kernel, half)
    if bias is not None:
        y = _add_bias(y, cast(bias, half))
    return tf.reshape(y, shape)
