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
    Sums,
)
from horovod_lm.errors import UserError
from horovod_lm.randomness import dropout_words, native_seed
from horovod_lm.spec import ModelSpec
from tf_backend.communicator import Communicator
from tf_backend.layers import NATIVE_SITES, Native, Noise, Words
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
            self.model = Transformer(spec, settings.precision, settings.recompute)
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
        losses = [
            self._loss_arrays(loss, loss_scale * loss.factor / loss.normaliser)
            for loss in micro.losses
        ]
        normalisers = tf.constant([loss.normaliser for loss in micro.losses], self.dtype)
        noise, kinds = self._noise(micro, step), _kinds(micro)
        buffer = self._backward(_tensors(micro.inputs), noise, losses, normalisers, kinds)
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

    def evaluate(self, micro: MicroBatch) -> dict[str, Sums]:
        """By loss name, the sums on this rank, without dropout."""
        losses = [self._loss_arrays(loss, 0.0) for loss in micro.losses]
        sums = self._sums(_tensors(micro.inputs), losses, _kinds(micro)).numpy().tolist()
        return {
            loss.name: Sums(nll_sum, float(loss.weights.sum()), hits)
            for loss, nll_sum, hits in zip(micro.losses, *sums, strict=True)
        }

    def logits(self, inputs: Mapping[str, np.ndarray], head: str = "lm") -> np.ndarray:
        """Logits of a head without dropout: (B, L, outputs), or (B, outputs)."""
        return self._logits(_tensors(inputs), head).numpy()

    def hidden(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the stacks give without dropout, by stack, and `pooled`."""
        return {name: x.numpy() for name, x in self._hidden(_tensors(inputs)).items()}

    def trace(self, micro: MicroBatch, step: int) -> dict[str, np.ndarray]:
        """The activations of one forward with the dropout of `step`, by site."""
        losses = [self._loss_arrays(loss, loss.factor / loss.normaliser) for loss in micro.losses]
        with tracing(_as_array) as sites:
            hidden = self.model(_tensors(micro.inputs), self._noise(micro, step))
            scaled, *_ = self._losses(hidden, losses, _kinds(micro))
            record("loss", tf.add_n(scaled)[None])
        sites["loss"] = sites["loss"].reshape(())
        heads = [loss.head for loss in micro.losses]
        for loss in micro.losses:
            if heads.count(loss.head) == 1:
                site = _logits_site(loss.head)
                sites[site] = sites[site].reshape(*loss.targets.shape, -1)
        return sites

    def start(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Any]:
        """Begin decoding after prompts `tokens` (B, L)."""
        if "decoder" not in self.spec.stacks:
            raise UserError(f'a model of kind "{self.spec.kind}" has no decoder to generate with')
        hidden, past = self.model.start(_tensors(inputs))
        return self.model.logits(self.model.head("lm")(hidden)).numpy(), past

    def next(self, tokens: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """Feed one token a row."""
        logits = self._next_logits(tf.constant(tokens), cache).numpy()
        return logits, cache._replace(start=cache.start + 1)

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

    def _noise(self, micro: MicroBatch, step: int) -> dict[str, Noise]:
        """What the dropout of one forward is made of, by stack."""
        seed, rows, stacks = self.settings.seed, micro.rows, list(self.spec.stacks)
        if self.settings.dropout_generator == "native":
            first = tf.constant(native_seed(seed, step, rows))
            return {
                name: Native(tf.add(first, [2 * NATIVE_SITES * number, 0]))
                for number, name in enumerate(stacks)
            }
        inputs = ["source", "tokens"][-len(stacks) :]
        lengths = {
            name: micro.inputs[key].shape[1] for name, key in zip(stacks, inputs, strict=True)
        }
        noise = {}
        for name, words in dropout_words(self.spec, seed, step, rows, lengths).items():
            arrays = (getattr(words, field) for field in Words._fields)
            noise[name] = Words(*(None if a is None else tf.constant(a) for a in arrays))
        return noise

    def _loss_arrays(self, loss, coefficient: float) -> tuple[tf.Tensor | None, ...]:
        weights = loss.weights.reshape(-1).astype(self.dtype.as_numpy_dtype)
        arrays = (loss.targets.reshape(-1), weights, weights * weights.dtype.type(coefficient))
        positions = None if loss.positions is None else tf.constant(loss.positions)
        return *map(tf.constant, arrays), positions

    def _losses(self, hidden, losses, kinds) -> tuple[list, list, list]:
        """The scaled losses, the sums of nll, and the hits."""
        results = []
        for (head, smoothing, z_loss), (*arrays, positions) in zip(kinds, losses, strict=True):
            features = self.model.features(hidden, head, positions)
            results.append(
                head_loss(
                    tf.reshape(features, [-1, features.shape[-1]]),
                    self.model.head_kernel(head),
                    self.model.head_bias(head),
                    *arrays,
                    smoothing,
                    z_loss,
                    self.model.half,
                    _logits_site(head),
                )
            )
        scaled, nll_sums, hits = zip(*results, strict=True)
        return list(scaled), list(nll_sums), list(hits)

    def _buffer(self, inputs, noise, losses, normalisers, kinds) -> tf.Tensor:
        """The flat buffer (P + tail,) of one micro-batch, statuses 0."""
        values = self.weights.values
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            scaled, nll_sums, _ = self._losses(self.model(inputs, noise), losses, kinds)
            total = tf.add_n(scaled)
        # A head that no loss of this micro-batch has gets zeros.
        zero = tf.UnconnectedGradients.ZERO
        gradients = tape.gradient(total, values, unconnected_gradients=zero)
        tail = [tf.stack(nll_sums) / normalisers, tf.zeros(self.communicator.size, self.dtype)]
        return tf.concat([*(tf.reshape(g, [-1]) for g in gradients), *tail], 0)

    @tf.function(autograph=False)
    def _sums(self, inputs, losses, kinds) -> tf.Tensor:
        return tf.stack(self._losses(self.model(inputs), losses, kinds)[1:])

    @tf.function(autograph=False)
    def _logits(self, inputs, head) -> tf.Tensor:
        return self.model.logits(self.model.features(self.model(inputs), head), head)

    @tf.function(autograph=False)
    def _hidden(self, inputs) -> dict[str, tf.Tensor]:
        return self.model(inputs)

    @tf.function(autograph=False)
    def _next_logits(self, tokens, past) -> tf.Tensor:
        hidden, _ = self.model.next(tokens, past)
        return self.model.logits(self.model.head("lm")(hidden))


def _tensors(inputs: Mapping[str, np.ndarray]) -> dict[str, tf.Tensor]:
    return {name: tf.constant(array) for name, array in inputs.items()}


def _kinds(micro: MicroBatch) -> tuple[tuple[str, float, float], ...]:
    """What is not a tensor in the losses of a micro-batch."""
    return tuple((loss.head, loss.smoothing, loss.z_loss) for loss in micro.losses)


def _logits_site(head: str) -> str:
    """The name of a head's logits in records."""
    return "logits" if head == "lm" else f"{head}.logits"


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
