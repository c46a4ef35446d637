"""The output layer and its loss in one, some rows at a time: all logits never exist at once."""

from __future__ import annotations

import tensorflow as tf

from horovod_lm.activations import record
from tf_backend.precision import full, multiply, operand
from tf_backend.profiler import scope

ROWS = 512  # measured best on CPUs: a chunk's logits stay in the cache


def _chunk(hidden, kernel, bias, targets, weights, coefficients, smoothing, z_loss, half, site):
    """The sums of one chunk of rows, its dh, its share of dW^T and that of db."""
    hidden, kernel = operand(hidden, half), operand(kernel, half)
    z = full(multiply(hidden, kernel, half))
    if bias is not None:
        z = tf.nn.bias_add(z, bias)
    record(site, z)
    largest = tf.reduce_max(z, -1, keepdims=True)
    z -= largest
    cells = tf.stack([tf.range(targets.shape[0]), targets], 1)
    picked = tf.gather_nd(z, cells)
    largest_ones = tf.reduce_sum(tf.cast(tf.equal(z, 0), z.dtype), -1)
    hits = weights * tf.cast(tf.equal(picked, 0), z.dtype) / largest_ones
    exponentials = tf.exp(z)
    total = tf.reduce_sum(exponentials, -1)
    logarithm = tf.math.log(total)
    nll = losses = logarithm - picked
    scaled = taken = coefficients
    if smoothing:
        losses += smoothing * (picked - tf.reduce_mean(z, -1))
        taken = (1 - smoothing) * coefficients
    if z_loss:
        logarithm += largest[:, 0]
        losses += z_loss * tf.square(logarithm)
        scaled = (1 + 2 * z_loss * logarithm) * coefficients
    sums = tf.stack([tf.reduce_sum(weights * nll), tf.reduce_sum(coefficients * losses)])
    hits = tf.reduce_sum(hits)
    d_z = exponentials * (scaled / total)[:, None]
    if smoothing:
        d_z -= (smoothing / z.shape[1] * coefficients)[:, None]
    d_z = tf.tensor_scatter_nd_sub(d_z, cells, taken)
    d_bias = None if bias is None else tf.raw_ops.BiasAddGrad(out_backprop=d_z)
    d_z = operand(d_z, half)
    d_hidden = multiply(d_z, tf.transpose(kernel), half)
    d_kernel = multiply(tf.transpose(d_z), hidden, half)
    return sums, hits, full(d_hidden), full(d_kernel), d_bias


@scope("loss")
def head_loss(
    hidden_ND: tf.Tensor,
    kernel_DV: tf.Tensor,
    bias_V: tf.Tensor | None,
    targets_N: tf.Tensor,
    weights_N: tf.Tensor,
    coefficients_N: tf.Tensor,
    smoothing: float,
    z_loss: float,
    half: tf.DType | None,
    site: str,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Three sums over the rows: of their losses times `coefficients` (the differentiable one), of
    their negative log-likelihood in nats times `weights`, and the hits of
    `horovod_lm.backend.Sums`. `targets` are int32; the logits are recorded as `site`. To be called
    in a `tf.function`, which leaves out the gradients, or the hits, where nobody asks for them.

    With z = h W + b, p = softmax(z), s = logsumexp(z), e `smoothing`, a `z_loss` and c the rows'
    coefficients: L = sum c ((1 - e) (s - z_y) + e (s - mean(z)) + a s^2),
    dz = c ((1 + 2 a s) p - (1 - e) onehot(y) - e / V), dh = dz W^T, dW = h^T dz, db = sum dz.
    Gradients are made in the forward, while the chunk's logits are at hand, and handed out in the
    backward.
    """
    settings = smoothing, z_loss, half, site

    @tf.custom_gradient
    def forward(hidden, kernel, *bias):
        sums, d_hidden, d_table, d_bias = tf.zeros(2, weights_N.dtype), [], 0.0, 0.0
        hits = tf.zeros((), weights_N.dtype)
        for start in range(0, hidden.shape[0], ROWS):
            part = slice(start, start + ROWS)
            # One chunk after the other: side by side their logits would not fit the cache.
            with tf.control_dependencies([sums]):
                rows = tf.identity(hidden[part])
            chunk, some, d_rows, d_part, d_share = _chunk(
                rows,
                kernel,
                bias[0] if bias else None,
                targets_N[part],
                weights_N[part],
                coefficients_N[part],
                *settings,
            )
            sums += chunk
            hits += some
            d_hidden.append(d_rows)
            d_table += d_part
            if bias:
                d_bias += d_share

        @scope("loss")
        def backward(gradient, *_):
            # dW is made transposed, as a tied kernel lies in memory; transposing twice is free.
            d_kernel = tf.transpose(d_table * gradient)
            rest = [d_bias * gradient] if bias else []
            return tf.concat(d_hidden, 0) * gradient, d_kernel, *rest

        return (sums[1], sums[0], hits), backward

    return forward(hidden_ND, kernel_DV, *([] if bias_V is None else [bias_V]))
