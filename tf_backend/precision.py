"""Which numbers a model runs in: fp32, fp64 for tests and parity, or products in bf16 or fp16.

In the half precisions weights, residual stream, norms, softmax and loss stay in fp32; only the
inputs and results of matrix products are halves.
"""

from __future__ import annotations

import tensorflow as tf

from tf_backend.profiler import scope

# The type of products where it is not the full one, and the full one: weights, stream, sums.
HALF_TYPES = {"fp64": None, "fp32": None, "bf16": tf.bfloat16, "fp16": tf.float16}
FULL_TYPES = dict.fromkeys(HALF_TYPES, tf.float32) | {"fp64": tf.float64}


def cast(x: tf.Tensor, half: tf.DType | None) -> tf.Tensor:
    """`x` in the type of products."""
    return x if half is None else tf.cast(x, half)


def full(x: tf.Tensor) -> tf.Tensor:
    """A half as fp32; anything else as it is."""
    return tf.cast(x, tf.float32) if x.dtype.size == 2 else x


def operand(x: tf.Tensor, half: tf.DType | None) -> tf.Tensor:
    """`x` as products take it: rounded to the type of products.

    CPUs without fp16 instructions lose a sixth of a step in it, so there it is an fp32 copy of the
    rounded numbers: the products are the same, and so are their overflows, once rounded.
    """
    x = cast(x, half)
    copied = half is tf.float16 and not tf.config.get_visible_devices("GPU")
    return tf.cast(x, tf.float32) if copied else x


def multiply(a: tf.Tensor, b: tf.Tensor, half: tf.DType | None) -> tf.Tensor:
    """`a @ b` of operands, summed in fp32, the result in the type of products. A `tf.transpose` of
    an input costs nothing: the graph optimizer folds it into the product."""
    return cast(tf.matmul(a, b), half)


def product(a: tf.Tensor, b: tf.Tensor, half: tf.DType | None) -> tf.Tensor:
    """`a @ b` with inputs and result in the type of products."""
    return multiply(operand(a, half), operand(b, half), half)


@tf.custom_gradient
def _add_bias(y, bias):
    @scope("linear")
    def backward(gradient):
        # Summed in fp32: TensorFlow's own gradient adds up thousands of rows in a half. This
        # kernel sums columns four times as fast as tf.reduce_sum.
        return gradient, tf.raw_ops.BiasAddGrad(out_backprop=full(gradient))

    return tf.nn.bias_add(y, tf.cast(bias, y.dtype)), backward


@scope("linear")
def linear(
    x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None, half: tf.DType | None
) -> tf.Tensor:
    """`x @ kernel + bias` over the last axis: (…, in) and (in, out) give (…, out), in the type of
    products."""
    inputs, outputs = kernel.shape
    shape = tf.concat([tf.shape(x)[:-1], [outputs]], 0)
    y = product(tf.reshape(x, [-1, inputs]), kernel, half)
    if bias is not None:
        if half is not None:
            # Else the graph optimizer makes one operation of both, which rounds once and not twice.
            y = tf.reshape(y, [1, -1, outputs])
        # As a tensor: eagerly, a custom gradient refuses variables.
        y = _add_bias(y, tf.convert_to_tensor(bias))
    return tf.reshape(y, shape)
