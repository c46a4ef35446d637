"""The output layer and its loss in one, some rows at a time: all logits never exist at once."""

from __future__ import annotations

import tensorflow as tf

from horovod_lm.activations import record
from tf_backend.precision import full, multiply, operand
from tf_backend.profiler import scope

ROWS = 512  # measured best on CPUs: a chunk's logits stay in the cache


def _chunk(hidden, kernel, targets, weights, coefficients, half):
    """Both sums of one chunk of rows, its dh and its share of dW^T."""
    hidden, kernel = operand(hidden, half), operand(kernel, half)
    z = full(multiply(hidden, kernel, half))
    record("logits", z)
    z -= tf.reduce_max(z, -1, keepdims=True)
    cells = tf.stack([tf.range(targets.shape[0]), targets], 1)
    picked = tf.gather_nd(z, cells)
    exponentials = tf.exp(z)
    total = tf.reduce_sum(exponentials, -1)
    nll = tf.math.log(total) - picked
    sums = tf.stack([tf.reduce_sum(weights * nll), tf.reduce_sum(coefficients * nll)])
    d_z = exponentials * (coefficients / total)[:, None]
    d_z = operand(tf.tensor_scatter_nd_sub(d_z, cells, coefficients), half)
    d_hidden = multiply(d_z, tf.transpose(kernel), half)
    d_kernel = multiply(tf.transpose(d_z), hidden, half)
    return sums, full(d_hidden), full(d_kernel)


@scope("loss")
def head_loss(
    hidden_ND: tf.Tensor,
    kernel_DV: tf.Tensor,
    targets_N: tf.Tensor,
    weights_N: tf.Tensor,
    coefficients_N: tf.Tensor,
    half: tf.DType | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Two sums over the rows of their negative log-likelihood in nats: times `coefficients` (the
    differentiable one), and times `weights`. `targets` are int32. To be called in a `tf.function`,
    which leaves the gradients out where nobody asks for them.

    With z = h W, p = softmax(z) and c the rows' coefficients: L = sum c (logsumexp(z) - z_y),
    dz = c (p - onehot(y)), dh = dz W^T, dW = h^T dz. Gradients are made in the forward, while the
    chunk's logits are at hand, and handed out in the backward.
    """

    @tf.custom_gradient
    def forward(hidden, kernel):
        sums, d_hidden, d_table = tf.zeros(2, weights_N.dtype), [], 0.0
        for start in range(0, hidden.shape[0], ROWS):
            part = slice(start, start + ROWS)
            # One chunk after the other: side by side their logits would not fit the cache.
            with tf.control_dependencies([sums]):
                rows = tf.identity(hidden[part])
            chunk, d_rows, d_part = _chunk(
                rows, kernel, targets_N[part], weights_N[part], coefficients_N[part], half
            )
            sums += chunk
            d_hidden.append(d_rows)
            d_table += d_part

        @scope("loss")
        def backward(gradient, _):
            # dW is made transposed, as a tied kernel lies in memory; transposing twice is free.
            return tf.concat(d_hidden, 0) * gradient, tf.transpose(d_table * gradient)

        return (sums[1], sums[0]), backward

    return forward(hidden_ND, kernel_DV)
