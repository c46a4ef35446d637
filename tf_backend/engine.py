"""A model with its gradients and optimizer: what the loop drives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from horovod_lm.activations import record, tracing
from horovod_lm.backend import (
    OVERFLOW,
    EngineSettings,
    EngineState,
    MicroBatch,
    Reduced,
)
from horovod_lm.randomness import dropout_words, native_seed
from horovod_lm.spec import ModelSpec
from tf_backend.communicator import Communicator
from tf_backend.layers import Native, Noise, Words
from tf_backend.loss import head_loss
from tf_backend.model import Transformer
from tf_backend.optimizer import OPTIMIZERS, global_norm
from tf_backend.precision import FULL_TYPES, full
from tf_backend.profiler import scope
from tf_backend.weights import Weights


class Engine:
    """See `horovod_lm.backend.Engine`. Gradients accumulate in one flat buffer whose tail
    carries the losses and each rank's status through the same allreduce. What changes from step
    to step reaches the `tf.function`s as tensors, so that each is traced once. They go without
    AutoGraph, which has nothing to convert here, and reads source files at the first call."""

    def __init__(
        self,
        spec: ModelSpec,
        settings: EngineSettings,
        communicator: Communicator,
        device: str,
    ) -> None:
        self.spec, self.settings, self.communicator = spec, settings, communicator
        self.device, self.dtype = device, FULL_TYPES[settings.precision]
        with tf.device(device):
            self.model = Transformer(spec, settings.precision)
            self.model.build()
            tail = len(settings.loss_names) + communicator.size
            self.weights = Weights(self.model, spec, tail, device)
            self.optimizer = OPTIMIZERS[settings.optimizer](self.weights, settings)
        self._backward = tf.function(self._buffer, autograph=False, jit_compile=_compiles(settings))
        self.updates = 0
        self._norm = 0.0
        self._loss_scale = 1.0
        self._empty = True

    def forward_backward(self, micro: MicroBatch, step: int, loss_scale: float) -> None:
        """Add the gradients and losses of one micro-batch to the accumulator."""
        self._loss_scale = loss_scale
        tokens = micro.inputs["tokens"]
        losses = [
            self._loss_arrays(loss, loss_scale * loss.factor / loss.normaliser)
            for loss in micro.losses
        ]
        normalisers = tf.constant([loss.normaliser for loss in micro.losses], self.dtype)
        heads = tuple(loss.head for loss in micro.losses)
        buffer = self._backward(
            tf.constant(tokens), self._noise(micro, step), losses, normalisers, heads
        )
        self.weights.gradients = buffer if self._empty else self.weights.gradients + buffer
        self._empty = False

    @scope("optimizer")
    def reduce_gradients(self, status: int = 0) -> Reduced:
        """Sum the accumulator over the ranks and undo the loss scale."""
        names, weights = self.settings.loss_names, self.weights
        if self._empty:
            weights.gradients = tf.zeros_like(weights.gradients)
        self._empty = True
        # Only a scaled loss needs to know which rank overflowed; elsewhere it is not worth a pass.
        if self.settings.precision == "fp16" and not _all_finite(weights.gradients):
            status |= OVERFLOW
        if status:
            place = [[weights.size + len(names) + self.communicator.rank]]
            weights.gradients = tf.tensor_scatter_nd_add(weights.gradients, place, [float(status)])
        weights.gradients = self.communicator.reduce(weights.gradients)
        tail = weights.gradients[weights.size :].numpy()
        if self._loss_scale != 1:
            weights.gradients = weights.gradients * (1 / self._loss_scale)
        self._norm = global_norm(weights)
        finite = math.isfinite(self._norm)
        return Reduced(
            losses=dict(zip(names, tail.tolist(), strict=False)),
            finite=finite,
            norm=self._norm,
            status=tail[len(names) :].astype(np.int64),
            tensor=None if finite else weights.first_not_finite(weights.gradients),
        )

    @scope("optimizer")
    def apply_gradients(self, learning_rate: float, clip: float | None) -> None:
        """One update with the reduced gradient, clipped to a global norm of `clip`."""
        if clip is not None and self._norm > clip:
            self.weights.gradients = self.weights.gradients * (clip / self._norm)
        self.updates += 1
        self.optimizer.step(learning_rate, self.updates)

    def evaluate(self, micro: MicroBatch) -> dict[str, tuple[float, float]]:
        """By loss name: (weighted sum of nll, sum of weights) on this rank, without dropout."""
        losses = [self._loss_arrays(loss, 0.0) for loss in micro.losses]
        heads = tuple(loss.head for loss in micro.losses)
        sums = self._nll_sums(tf.constant(micro.inputs["tokens"]), losses, heads).numpy()
        return {
            loss.name: (float(nll_sum), float(loss.weights.sum()))
            for loss, nll_sum in zip(micro.losses, sums, strict=True)
        }

    def logits(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """(B, L, V) logits without dropout."""
        return self._logits(tf.constant(inputs["tokens"])).numpy()

    def trace(self, micro: MicroBatch, step: int) -> dict[str, np.ndarray]:
        """The activations of one forward with the dropout of `step`, by site."""
        tokens = micro.inputs["tokens"]
        losses = [self._loss_arrays(loss, loss.factor / loss.normaliser) for loss in micro.losses]
        heads = tuple(loss.head for loss in micro.losses)
        with tracing(_as_array) as sites:
            hidden = self.model(tf.constant(tokens), self._noise(micro, step))
            scaled, _ = self._losses(hidden, losses, heads)
            record("loss", tf.add_n(scaled)[None])
        sites["logits"] = sites["logits"].reshape(*tokens.shape, -1)
        sites["loss"] = sites["loss"].reshape(())
        return sites

    def start(self, tokens: np.ndarray) -> tuple[np.ndarray, Any]:
        """Begin decoding after prompts (B, L)."""
        spec = self.spec
        shape = (2, len(tokens), spec.heads, spec.context, spec.head_width)
        caches = [tf.Variable(tf.zeros(shape, self.dtype)) for _ in range(spec.layers)]
        return self._decode(tokens, caches, 0)

    def next(self, tokens: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """Feed one token a row."""
        caches, position = cache
        return self._decode(tokens[:, None], caches, position)

    def gradients(self) -> dict[str, np.ndarray]:
        """The reduced gradient by canonical name, as it is before `apply_gradients` clips it."""
        return self.weights.read(self.weights.views(self.weights.gradients))

    def load_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Take `gradients` for what `reduce_gradients` has given."""
        weights = self.weights
        variables = [tf.Variable(tf.zeros_like(value)) for value in weights.values]
        weights.write(variables, gradients)
        flat = [tf.reshape(variable, [-1]) for variable in variables]
        weights.gradients = tf.concat([*flat, weights.gradients[weights.size :]], 0)
        self._norm = global_norm(weights)

    def state(self) -> EngineState:
        """A copy of weights, moments and update count."""
        return EngineState(
            self.weights.read(self.weights.values), self.optimizer.state(), self.updates
        )

    def load_state(self, state: EngineState) -> None:
        """Take over `state`; without moments they start at 0."""
        self.weights.write(self.weights.values, state.weights)
        self.optimizer.load_state(state.moments)
        self.updates = state.updates

    def synchronise(self) -> None:
        """Wait for the device."""
        if "GPU" in self.device:
            tf.test.experimental.sync_devices()

    def _noise(self, micro: MicroBatch, step: int) -> Noise | None:
        """What the dropout of one forward is made of."""
        seed, rows = self.settings.seed, micro.rows
        if self.settings.dropout_generator == "native":
            return Native(tf.constant(native_seed(seed, step, rows)))
        length = micro.inputs["tokens"].shape[1]
        words = dropout_words(self.spec, seed, step, rows, length)
        if words is None:
            return None
        arrays = (
            words.residual_rows,
            words.residual_columns,
            words.attention_rows,
            words.attention_columns,
        )
        return Words(*(None if a is None else tf.constant(a) for a in arrays))

    def _loss_arrays(self, loss, coefficient: float) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        weights = loss.weights.reshape(-1).astype(self.dtype.as_numpy_dtype)
        arrays = (loss.targets.reshape(-1), weights, weights * weights.dtype.type(coefficient))
        return tuple(map(tf.constant, arrays))

    def _losses(self, hidden, losses, heads) -> tuple[list, list]:
        """The scaled losses and the sums of nll."""
        rows = tf.reshape(hidden, [-1, hidden.shape[-1]])
        results = [
            head_loss(rows, self.model.head_kernel(head), *arrays, self.model.half)
            for head, arrays in zip(heads, losses, strict=True)
        ]
        scaled, nll_sums = zip(*results, strict=True)
        return list(scaled), list(nll_sums)

    def _buffer(self, tokens, words, losses, normalisers, heads) -> tf.Tensor:
        """The flat buffer (P + tail,) of one micro-batch, statuses 0."""
        values = self.weights.values
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            hidden = self.model(tokens, words)
            scaled, nll_sums = self._losses(hidden, losses, heads)
            total = tf.add_n(scaled)
        gradients = [tf.reshape(g, [-1]) for g in tape.gradient(total, values)]
        tail = [tf.stack(nll_sums) / normalisers, tf.zeros(self.communicator.size, self.dtype)]
        return tf.concat([*gradients, *tail], 0)

    @tf.function(autograph=False)
    def _nll_sums(self, tokens, losses, heads) -> tf.Tensor:
        return tf.stack(self._losses(self.model(tokens), losses, heads)[1])

    @tf.function(autograph=False)
    def _logits(self, tokens) -> tf.Tensor:
        return self.model.logits(self.model(tokens))

    @tf.function(autograph=False)
    def _last_logits(self, tokens, caches, start) -> tf.Tensor:
        return self.model.logits(self.model(tokens, None, caches, start=start)[:, -1])

    def _decode(self, tokens, caches, position: int) -> tuple[np.ndarray, Any]:
        logits = self._last_logits(tf.constant(tokens), caches, tf.constant(position))
        return logits.numpy(), (caches, position + tokens.shape[1])


def _compiles(settings: EngineSettings) -> bool:
    """Whether XLA compiles forward and backward: measured 1.1 to 1.3 times faster on 2 threads, and
    slower on 1. Never a half precision, whose roundings XLA may drop, nor native dropout, for which
    XLA's random numbers are others and take 15 times as long."""
    if settings.precision != "fp32" or settings.dropout_generator == "native":
        return False
    return tf.config.threading.get_intra_op_parallelism_threads() > 1


@tf.function(autograph=False)
def _all_finite(buffer: tf.Tensor) -> tf.Tensor:
    return tf.reduce_all(tf.math.is_finite(buffer))


def _as_array(x: tf.Tensor) -> np.ndarray:
    return full(x).numpy()
