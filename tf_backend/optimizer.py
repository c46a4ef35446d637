"""The optimizer, and the global norm."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from horovod_lm.backend import EngineSettings
from tf_backend.weights import Weights


@tf.function(autograph=False)
def _sum_of_squares(weights: Weights, gradients: tf.Tensor) -> tf.Tensor:
    # l2_loss halves, which is exact; it is the one kernel that squares and sums in one pass.
    halves = [tf.nn.l2_loss(part) for part in weights.views(gradients)]
    return 2 * tf.add_n([tf.cast(half, tf.float64) for half in halves])


def global_norm(weights: Weights) -> float:
    """L2 norm of the whole gradient: the square root of fp64-added sums of squares of each
    tensor. (One fp32 norm over a flat buffer is off by 1e-3 at 20 million elements.) inf or nan
    exactly where an element of the gradient is."""
    total = float(_sum_of_squares(weights, weights.gradients))
    if not math.isfinite(total):  # the elements may be finite and only their squares too large
        elements = tf.cast(weights.gradients[: weights.size], tf.float64)
        total = float(tf.reduce_sum(tf.square(elements)))
    return math.sqrt(total) if total >= 0 else math.nan


class AdamW:
    """AdamW (Loshchilov and Hutter, 2019): with g the gradient and t the update's number from 1,
    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
    w = w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon).

    Not Keras's AdamW, which adds epsilon before the bias correction and makes the corrections in
    fp32; here they come from the host in fp64.
    """

    def __init__(self, weights: Weights, settings: EngineSettings) -> None:
        self.weights, self.settings = weights, settings
        self.moments = {
            name: [tf.Variable(tf.zeros_like(value)) for value in weights.values]
            for name in ("first", "second")
        }

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the weights, in place."""
        settings = self.settings
        first = 1 - settings.beta1**update
        second = 1 - settings.beta2**update
        coefficients = (
            1 - learning_rate * settings.weight_decay,
            learning_rate / first,
            1 / math.sqrt(second),
        )
        self._update_all(self.weights.gradients, *map(np.float32, coefficients))

    @tf.function(autograph=False)
    def _update_all(self, gradients, decay_factor, rate, correction) -> None:
        parts = zip(
            self.weights.values,
            self.weights.views(gradients),
            self.moments["first"],
            self.moments["second"],
            self.weights.decays,
            strict=True,
        )
        for value, gradient, first, second, decays in parts:
            factor = decay_factor if decays else tf.constant(1.0)
            self._update(value, gradient, first, second, factor, rate, correction)

    # XLA makes one pass of this where TensorFlow makes a dozen. It is compiled once for a shape;
    # as one function of all variables its compilation took seconds.
    @tf.function(autograph=False, jit_compile=True)
    def _update(self, value, gradient, first, second, factor, rate, correction) -> None:
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        m = first.assign(beta1 * first + (1 - beta1) * gradient)
        v = second.assign(beta2 * second + (1 - beta2) * tf.square(gradient))
        divisor = tf.sqrt(v) * correction + self.settings.epsilon
        value.assign(value * factor - rate * m / divisor)
