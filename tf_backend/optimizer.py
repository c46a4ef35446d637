"""The optimizers, and the global norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import tensorflow as tf

from horovod_lm.backend import EngineSettings
from horovod_lm.optimizers import moment_shapes
from tf_backend.weights import Weights, own_name


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


def _root_mean_square(block: tf.Tensor) -> tf.Tensor:
    """Of each part of a block (rows, parts, columns), as (parts,) fp64."""
    means = tf.cast(tf.reduce_mean(tf.square(block), 2), tf.float64)
    return tf.sqrt(tf.reduce_mean(means, 0))


class Optimizer:
    """What all optimizers share: by default each moment is a list of variables like the weights.

    In the formulas g is the gradient, w the weights, lr the learning rate, t the update's number
    from 1; decay is 0 for parameters without weight decay. All decay is decoupled (Loshchilov and
    Hutter, 2019): it enters no moment. Corrections that depend on t come from the host in fp64.
    """

    moment_names: tuple[str, ...] = ("first", "second")

    def __init__(self, weights: Weights, settings: EngineSettings) -> None:
        self.weights, self.settings = weights, settings
        self.moments = {
            name: [tf.Variable(tf.zeros_like(value)) for value in weights.values]
            for name in self.moment_names
        }

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the weights, in place."""
        raise NotImplementedError

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Copies of the moments, by moment and canonical name."""
        return {name: self.weights.read(moment) for name, moment in self.moments.items()}

    def load_state(self, moments: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Take over moments; none at all: they are 0."""
        assert not moments or moments.keys() == self.moments.keys(), list(moments)
        for name, moment in self.moments.items():
            if moments:
                self.weights.write(moment, moments[name])
            else:
                for variable in moment:
                    variable.assign(tf.zeros_like(variable))

    def _numbers(self, *numbers: float) -> list[np.floating]:
        """Numbers in the type of the weights: as tensors they don't make a function trace anew."""
        return [self.weights.gradients.dtype.as_numpy_dtype(number) for number in numbers]

    @tf.function(autograph=False)
    def _update_all(self, gradients: tf.Tensor, *numbers: tf.Tensor) -> None:
        own = zip(
            self.weights.values,
            self.weights.views(gradients),
            self.weights.blocks,
            self.weights.decays,
            *self.moments.values(),
            strict=True,
        )
        for value, gradient, block, decays, *moments in own:
            self._update(value, gradient, block, decays, moments, *numbers)


# XLA makes one pass of an _update where TensorFlow makes a dozen. It is compiled once for a shape;
# as one function of all variables its compilation took seconds.
_compiled = tf.function(autograph=False, jit_compile=True)


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, 2019):
    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
    w = w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon).

    Not Keras's AdamW, which adds epsilon before the bias correction and makes the corrections in
    fp32.
    """

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the weights, in place."""
        settings = self.settings
        numbers = (
            1 - learning_rate * settings.weight_decay,
            learning_rate / (1 - settings.beta1**update),
            1 / math.sqrt(1 - settings.beta2**update),
        )
        self._update_all(self.weights.gradients, *self._numbers(*numbers))

    @_compiled
    def _update(self, value, gradient, block, decays, moments, kept, rate, correction) -> None:
        m, v = _adam_moments(moments, gradient, self.settings)
        move = rate * m / (tf.sqrt(v) * correction + self.settings.epsilon)
        value.assign((value * kept if decays else value) - move)


class Adam(AdamW):
    """Adam (Kingma and Ba, 2015): AdamW without weight decay."""

    def __init__(self, weights: Weights, settings: EngineSettings) -> None:
        super().__init__(weights, replace(settings, weight_decay=0.0))


class SGD(Optimizer):
    """Stochastic gradient descent with momentum (Polyak, 1964; Sutskever et al., 2013):
    m = momentum m + g, w = w - lr decay w - lr m.

    The learning rate is not in m, so that a schedule acts at once. Not Keras's SGD, whose momentum
    sums up learning rate x gradient.
    """

    moment_names = ("first",)

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the weights, in place."""
        numbers = (1 - learning_rate * self.settings.weight_decay, learning_rate)
        self._update_all(self.weights.gradients, *self._numbers(*numbers))

    @_compiled
    def _update(self, value, gradient, block, decays, moments, kept, rate) -> None:
        (first,) = moments
        m = first.assign(self.settings.momentum * first + gradient)
        value.assign((value * kept if decays else value) - rate * m)


class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern, 2018, algorithms 4 to 6) without a first moment, with the
    learning rate for their relative step size: for a matrix, with s = 1 - t^-0.8,
    R = s R + (1 - s) mean over columns of (g^2 + 1e-30),
    C = s C + (1 - s) mean over rows of (g^2 + 1e-30),
    u = g / sqrt(R C / mean(R)),
    w = w - lr decay w - lr max(1e-3, rms(w)) u / max(1, rms(u)),
    and for a vector V = s V + (1 - s) (g^2 + 1e-30) with u = g / sqrt(V).

    Each canonical parameter is factored by itself, so query, key and value are three matrices. As
    steps are relative to the weights' size, learning rates are about ten times AdamW's.
    """

    def __init__(self, weights: Weights, settings: EngineSettings) -> None:
        self.weights, self.settings = weights, settings
        shapes = {p.name: p.shape for p in weights.spec.parameters}
        # By own name, the moments of the canonical parameters in it as rows: (parts, elements).
        self.moments: dict[str, dict[str, tf.Variable]] = {}
        for moment, table in moment_shapes("adafactor", shapes).items():
            own = {
                own_name(weights.spec, canonical)[0]: shape for canonical, shape in table.items()
            }
            self.moments[moment] = {
                name: tf.Variable(tf.zeros((block[1], *own[name]), weights.gradients.dtype))
                for name, block in zip(weights.names, weights.blocks, strict=True)
                if name in own
            }

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the weights, in place."""
        kept, newest = 1 - learning_rate * self.settings.weight_decay, update**-0.8
        # The steps' size is made up in fp64.
        rate = np.float64(learning_rate)
        self._update_all(self.weights.gradients, *self._numbers(kept, newest), rate)

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Copies of the moments, by moment and canonical name."""
        arrays = {
            moment: {name: variable.numpy() for name, variable in table.items()}
            for moment, table in self.moments.items()
        }
        return {
            moment: {canonical: np.array(view) for canonical, view in table.items()}
            for moment, table in self._views(arrays).items()
        }

    def load_state(self, moments: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Take over moments; none at all: they are 0."""
        assert not moments or moments.keys() == self.moments.keys(), list(moments)
        arrays = {
            moment: {name: np.zeros(v.shape, v.dtype.as_numpy_dtype) for name, v in table.items()}
            for moment, table in self.moments.items()
        }
        for moment, table in self._views(arrays).items():
            for canonical, view in table.items():
                if moments:
                    view[...] = moments[moment][canonical]
        for moment, table in self.moments.items():
            for name, variable in table.items():
                variable.assign(arrays[moment][name])

    @tf.function(autograph=False)
    def _update_all(self, gradients: tf.Tensor, *numbers: tf.Tensor) -> None:
        weights = self.weights
        own = zip(
            weights.names,
            weights.values,
            weights.views(gradients),
            weights.blocks,
            weights.decays,
            strict=True,
        )
        for name, value, gradient, block, decays in own:
            moments = [table[name] for table in self.moments.values() if name in table]
            self._update(value, gradient, block, decays, moments, *numbers)

    @_compiled
    def _update(self, value, gradient, block, decays, moments, kept, newest, rate) -> None:
        direction = self._direction(tf.reshape(gradient, block), moments, newest)
        size = tf.maximum(_root_mean_square(tf.reshape(value, block)), 1e-3)
        rate = rate * size / tf.maximum(_root_mean_square(direction), 1)
        move = tf.reshape(direction * tf.cast(rate, value.dtype)[:, None], value.shape)
        value.assign((value * kept if decays else value) - move)

    def _direction(self, gradient, moments, newest) -> tf.Tensor:
        """u, as (rows, parts, columns), after the moments took in the gradient."""
        squares = tf.square(gradient) + 1e-30
        if len(moments) == 1:
            (second,) = moments
            return gradient * tf.math.rsqrt(second.assign(_mix(second, squares[0], newest)))
        row, column = moments
        r = row.assign(_mix(row, tf.transpose(tf.reduce_mean(squares, 2)), newest))
        # Thousands of rows, one after the other: in fp32 that is off by 1e-5.
        means = tf.reduce_mean(tf.cast(squares, tf.float64), 0)
        c = column.assign(_mix(column, tf.cast(means, column.dtype), newest))
        factor = tf.transpose(tf.math.rsqrt(r / tf.reduce_mean(r, 1, keepdims=True)))
        return gradient * factor[:, :, None] * tf.math.rsqrt(c)

    def _views(self, arrays) -> dict[str, dict[str, np.ndarray]]:
        """Arrays of moments by own name, by moment and canonical name, as views."""
        views: dict[str, dict[str, np.ndarray]] = {moment: {} for moment in arrays}
        for parameter in self.weights.spec.parameters:
            name, part = own_name(self.weights.spec, parameter.name)
            for moment, table in arrays.items():
                if name in table:
                    views[moment][parameter.name] = table[name][part or 0]
        return views


class Lamb(Optimizer):
    """LAMB (You et al., 2020, algorithm 2): with m and v as in AdamW,
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon) + decay w,
    w = w - lr u |w| / |u|, with norms of each canonical parameter (so of query, key and value
    apart).

    The ratio is 1 where |w| or |u| is 0, and, as in the authors' code, for parameters without
    weight decay.
    """

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the weights, in place."""
        settings = self.settings
        numbers = (
            learning_rate,
            1 / (1 - settings.beta1**update),
            1 / math.sqrt(1 - settings.beta2**update),
        )
        self._update_all(self.weights.gradients, *self._numbers(*numbers))

    @_compiled
    def _update(self, value, gradient, block, decays, moments, rate, first, second) -> None:
        m, v = _adam_moments(moments, gradient, self.settings)
        step = first * m / (tf.sqrt(v) * second + self.settings.epsilon)
        if decays:
            step = tf.reshape(step + self.settings.weight_decay * value, block)
            norm = _root_mean_square(tf.reshape(value, block))
            length = _root_mean_square(step)
            ones = tf.ones_like(norm)
            ratio = tf.where((norm > 0) & (length > 0), norm / length, ones)
            step = tf.reshape(step * tf.cast(ratio, value.dtype)[:, None], value.shape)
        value.assign(value - rate * step)


def _adam_moments(moments, gradient, settings) -> tuple[tf.Tensor, tf.Tensor]:
    """m and v, after they took in the gradient."""
    first, second = moments
    m = first.assign(settings.beta1 * first + (1 - settings.beta1) * gradient)
    v = second.assign(settings.beta2 * second + (1 - settings.beta2) * tf.square(gradient))
    return m, v


def _mix(old, new, newest) -> tf.Tensor:
    """s old + (1 - s) new, with 1 - s `newest`."""
    return (1 - newest) * old + newest * new


OPTIMIZERS: Mapping[str, type[Optimizer]] = {
    "adamw": AdamW,
    "adam": Adam,
    "sgd": SGD,
    "adafactor": Adafactor,
    "lamb": Lamb,
}
