"""What `horovod-lm bench` measures the backend against: peers, bare products, an allreduce."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from horovod_lm.backend import Precision
from horovod_lm.bench.tools import Peer, Product
from horovod_lm.config import Config
from tf_backend.communicator import Communicator
from tf_backend.precision import FULL_TYPES, HALF_TYPES

TRIALS = 3  # of each form of a product, to see which is the fastest here


class BenchTools:
    """See `horovod_lm.bench.tools.BenchTools`."""

    def peer(self, name: str, config: Config, threads: int) -> Peer:
        """The peer `name`, with new weights."""
        # As TensorFlow does by itself, but with so many threads; our engine wants one.
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        return _KerasHub(config, compiled=name.endswith("xla"))

    def product_libraries(self, precision: Precision) -> Sequence[str]:
        """TensorFlow's own products."""
        return ("TensorFlow",)

    def products(
        self, library: str, products: Sequence[Product], precision: Precision
    ) -> Callable[[], None]:
        """A function that does all products and their gradients, each in its fastest form."""
        kind = HALF_TYPES[precision] or FULL_TYPES[precision]
        calls = []
        for product in products:
            rows, inputs, outputs = product.rows, product.inputs, product.outputs
            x = tf.cast(tf.random.normal([rows, inputs]), kind)
            k = tf.cast(tf.random.normal([inputs, outputs]), kind)
            g = tf.cast(tf.random.normal([rows, outputs]), kind)
            calls += [_fastest(form) for form in _forms(x, k, g)] * product.times

        def run() -> None:
            for call in calls:
                call()
            tf.test.experimental.sync_devices()

        return run

    def copy(self, elements: int) -> Callable[[], None]:
        """A function that reads a tensor of `elements` fp32 and writes another."""
        source = tf.zeros(elements)

        def run() -> None:
            tf.negative(source)  # tf.identity would hand on the same memory
            tf.test.experimental.sync_devices()

        return run

    def allreduce(self, communicator: Communicator, elements: int) -> Callable[[], None]:
        """A function that sums a buffer of `elements` fp32 as the engine does its gradients."""
        buffer = tf.zeros(elements)

        def run() -> None:
            communicator.reduce(buffer)
            tf.test.experimental.sync_devices()

        return run


class _KerasHub:
    """GPT2CausalLM, trained by `train_on_batch`: what `fit` does with a batch."""

    rank, size = 0, 1

    def __init__(self, config: Config, compiled: bool) -> None:
        import keras_hub

        spec, settings = config.model, config.optimizer
        policy = {"fp32": "float32", "bf16": "mixed_bfloat16", "fp16": "mixed_float16"}
        backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=spec.vocabulary,
            num_layers=spec.layers,
            num_heads=spec.heads,
            hidden_dim=spec.width,
            intermediate_dim=spec.inner_width,
            dropout=spec.dropout,
            max_sequence_length=spec.context,
            dtype=policy[config.train.precision],
        )
        self._model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
        optimizer = keras.optimizers.AdamW(
            settings.learning_rate,
            weight_decay=settings.weight_decay,
            beta_1=settings.beta1,
            beta_2=settings.beta2,
            epsilon=settings.epsilon,
            global_clipnorm=config.train.max_norm,
        )
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        self._model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=compiled,
        )

    def step(self, tokens: np.ndarray) -> float:
        """One training step; the loss."""
        ids = tokens[:, :-1]
        inputs = {"token_ids": ids, "padding_mask": np.ones(ids.shape, bool)}
        return float(np.ravel(self._model.train_on_batch(inputs, tokens[:, 1:]))[0])

    def broadcast(self, data: bytes) -> bytes:
        """There is one rank only."""
        return data


Form = Callable[[], object]


def _forms(x: tf.Tensor, k: tf.Tensor, g: tf.Tensor) -> list[list[Form]]:
    """For the product and its two gradients, the same with either layout of the kernel."""
    kt = tf.transpose(k)
    return [
        [lambda: tf.matmul(x, k), lambda: tf.matmul(x, kt, transpose_b=True)],
        [lambda: tf.matmul(g, k, transpose_b=True), lambda: tf.matmul(g, kt)],
        [
            lambda: tf.matmul(x, g, transpose_a=True),
            lambda: tf.matmul(g, x, transpose_a=True),
        ],
    ]


def _fastest(forms: Sequence[Form]) -> Form:
    """The one that takes the least time here."""

    def seconds(form: Form) -> float:
        form()
        begin = time.perf_counter()
        for _ in range(TRIALS):
            form()
        return time.perf_counter() - begin

    return min(forms, key=seconds)
