"""The layers of the Transformer. Shape letters: B batch, L queries, M keys, D width, H heads,
K head width, F feed-forward width, V vocabulary."""

from __future__ import annotations

import math
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from horovod_lm.activations import record, record_rows
from horovod_lm.randomness import MULTIPLIER, threshold
from horovod_lm.spec import ModelSpec, sinusoidal_positions
from tf_backend.precision import (
    FULL_TYPES,
    HALF_TYPES,
    cast,
    full,
    linear,
    multiply,
    operand,
    product,
)
from tf_backend.profiler import scope

ROW_BLOCK = 64  # query rows of one block of attention; later keys than its last row are skipped


@tf.custom_gradient
def _gelu(x):
    """x P(X < x) for a standard normal X, by the error function. TensorFlow's own gradient keeps
    and passes over twice as many tensors."""
    cumulative = 0.5 + 0.5 * tf.math.erf(x * math.sqrt(0.5))

    @scope("activation")
    def backward(gradient):
        density = tf.exp(-0.5 * tf.square(x)) * (1 / math.sqrt(2 * math.pi))
        return gradient * (cumulative + x * density)

    return x * cumulative, backward


def _gelu_tanh(x):
    """The form of tf.nn.gelu(approximate=True), whose 0.044715 is rounded to fp32."""
    return 0.5 * x * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * tf.pow(x, 3))))


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": tf.nn.relu,
}


class Words(NamedTuple):
    """`horovod_lm.randomness.DropoutWords` as tensors."""

    residual_rows: tf.Tensor | None
    residual_columns: tf.Tensor | None
    attention_rows: tf.Tensor | None
    attention_columns: tf.Tensor | None


class Native(NamedTuple):
    """The framework's own dropout: `seed` (2,) int32 keys it, together with the site."""

    seed: tf.Tensor


Noise = Words | Native


def keep_mask(rows: tf.Tensor, columns: tf.Tensor, rate: float) -> tf.Tensor:
    """The shared dropout mask: bool of shape rows.shape + columns.shape."""
    mixed = tf.bitwise.bitwise_xor(rows[..., None], columns) * MULTIPLIER
    return mixed >= threshold(rate)


def _times_keep(x: tf.Tensor, keep: tf.Tensor, rate: float) -> tf.Tensor:
    return x * (tf.cast(keep, x.dtype) * (1 / (1 - rate)))


def _site_seed(noise: Native, site: int, start: int = 0) -> tf.Tensor:
    """`site`: not negative on the residual stream, -1 - i for the attention of layer i."""
    return tf.add(noise.seed, [site, start])


@scope("dropout")
def dropout(x: tf.Tensor, noise: Noise | None, site: int, rate: float) -> tf.Tensor:
    """Dropout on the residual stream, (B, L, D), at one site; the identity without noise."""
    if noise is None or not rate:
        return x
    if isinstance(noise, Native):
        return tf.nn.experimental.stateless_dropout(x, rate, _site_seed(noise, site))
    keep = keep_mask(noise.residual_rows[site], noise.residual_columns[site], rate)
    return _times_keep(x, keep, rate)


def _causal_attention(query, key, value, noise, rate, heads, site, half):
    """Causal attention of `ROW_BLOCK` query rows at a time, so that keys after a block are never
    touched, with probabilities kept for the backward. All (B H, L, K), L known when traced.

    With p = softmax(s), m = keep / (1 - rate), o = (p m) v and g = dL/do:
    dv = (p m)^T g and ds = p (m (g v^T) - rowsum(g o)), since rowsum(p m (g v^T)) = rowsum(g o).
    """
    length, width = query.shape[1:]
    scale = 1 / math.sqrt(width)
    if isinstance(noise, Words):
        rows = tf.reshape(noise.attention_rows[site], [-1, length])
        columns = noise.attention_columns[site]
    blocks = [(start, min(start + ROW_BLOCK, length)) for start in range(0, length, ROW_BLOCK)]
    later = np.triu(np.full((length, length), -np.inf, full(query).dtype.as_numpy_dtype), 1)

    def scaled(x):
        # The queries and not the scores, which are larger; but a half would be rounded once more.
        return x * scale if half is None else x

    @tf.custom_gradient
    def attend(query, key, value):
        query, key, value = scaled(operand(query, half)), operand(key, half), operand(value, half)
        outputs, saved = [], []
        for start, end in blocks:
            keys = tf.transpose(key[:, :end], [0, 2, 1])
            scores = full(multiply(query[:, start:end], keys, half))
            if half is not None:
                scores *= scale
            record_rows("attention.scores", scores, start, heads, site)
            probabilities = tf.nn.softmax(scores + later[start:end, :end])
            record_rows("attention.probabilities", probabilities, start, heads, site)
            dropped, keep = probabilities, None
            if isinstance(noise, Native):
                seed = _site_seed(noise, -1 - site, start)
                shape = tf.shape(probabilities)
                keep = tf.random.stateless_uniform(shape, seed) >= rate
            elif noise is not None:
                keep = keep_mask(rows[:, start:end], columns[:end], rate)
            if keep is not None:
                dropped = _times_keep(probabilities, keep, rate)
                record_rows("attention.dropped", dropped, start, heads, site)
            dropped = operand(dropped, half)
            outputs.append(multiply(dropped, value[:, :end], half))
            saved.append((probabilities, dropped, keep))
        output = tf.concat(outputs, 1)

        @scope("attention")
        def backward(gradient):
            inner_sum = tf.reduce_sum(full(gradient) * full(output), -1, keepdims=True)
            gradient = operand(gradient, half)
            d_query, d_key, d_value = [], [], []
            for (start, end), (probabilities, dropped, keep) in zip(blocks, saved, strict=True):
                part, rest = gradient[:, start:end], [[0, 0], [0, length - end], [0, 0]]
                values = tf.transpose(value[:, :end], [0, 2, 1])
                d_scores = full(multiply(part, values, half))
                if keep is not None:
                    d_scores = _times_keep(d_scores, keep, rate)
                d_scores = (d_scores - inner_sum[:, start:end]) * probabilities
                if half is not None:
                    d_scores *= scale
                d_scores = operand(d_scores, half)
                d_query.append(multiply(d_scores, key[:, :end], half))
                for total, weights, x in (
                    (d_key, d_scores, query[:, start:end]),
                    (d_value, dropped, part),
                ):
                    share = full(multiply(tf.transpose(weights, [0, 2, 1]), x, half))
                    total.append(tf.pad(share, rest))
            d_query = scaled(tf.concat(d_query, 1))
            return d_query, cast(tf.add_n(d_key), half), cast(tf.add_n(d_value), half)

        return output, backward

    return attend(query, key, value)


def attention(
    query_BHLK: tf.Tensor,
    key_BHMK: tf.Tensor,
    value_BHMK: tf.Tensor,
    noise: Noise | None,
    site: int,
    rate: float,
    half: tf.DType | None,
) -> tf.Tensor:
    """softmax(q k^T / sqrt(K)) v, causal: query i sees the keys up to M - L + i. (B, H, L, K).

    With noise the probabilities are dropped by the mask of layer `site`. Queries beside a cache
    take the plain form, which knows no noise.
    """
    _, heads, length, width = query_BHLK.shape
    if length is not None and length == key_BHMK.shape[2]:
        flat = [tf.reshape(x, [-1, length, width]) for x in (query_BHLK, key_BHMK, value_BHMK)]
        output = _causal_attention(*flat, noise if rate else None, rate, heads, site, half)
        return tf.reshape(output, [-1, heads, length, width])
    keys_BHKM = tf.transpose(key_BHMK, [0, 1, 3, 2])
    scores_BHLM = full(product(query_BHLK, keys_BHKM, half)) / math.sqrt(width)
    length, keys = tf.shape(scores_BHLM)[2], tf.shape(scores_BHLM)[3]
    later = tf.range(keys) > tf.range(length)[:, None] + (keys - length)
    infinity = tf.constant(math.inf, scores_BHLM.dtype)
    probabilities = tf.nn.softmax(tf.where(later, -infinity, scores_BHLM))
    return product(probabilities, value_BHMK, half)


@tf.custom_gradient
def _lookup(table, indices):
    @scope("embeddings")
    def backward(gradient):
        rows = tf.reshape(gradient, [-1, table.shape[1]])
        d_table = tf.math.unsorted_segment_sum(rows, tf.reshape(indices, [-1]), table.shape[0])
        return d_table, None

    return tf.gather(table, indices), backward


class Embeddings(keras.layers.Layer):
    """Token embeddings plus positions, then (post-norm only) a norm, then dropout: (B, L) int
    to (B, L, D)."""

    def __init__(self, spec: ModelSpec, precision: str) -> None:
        super().__init__(name="embeddings", dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec = spec
        self.norm = LayerNorm(spec, precision, "norm") if spec.norm_placement == "post" else None

    def build(self, input_shape=None) -> None:
        spec = self.spec
        shape = (spec.vocabulary, spec.width)
        self.tokens = self.add_weight(shape=shape, initializer="zeros", name="tokens")
        if spec.positions == "learned":
            shape = (spec.context, spec.width)
            self.positions = self.add_weight(shape=shape, initializer="zeros", name="positions")
        else:
            self.positions = sinusoidal_positions(spec).astype(self.dtype)
        if self.norm is not None:
            self.norm.build()

    def call(
        self, tokens_BL: tf.Tensor, noise: Noise | None, start: tf.Tensor | int = 0
    ) -> tf.Tensor:
        """`start` is the position of the first token."""
        x = _lookup(tf.convert_to_tensor(self.tokens), tokens_BL)
        if self.spec.embedding_scale != 1:
            x = x * self.spec.embedding_scale
        positions = tf.convert_to_tensor(self.positions)
        x = x + positions[start : start + tf.shape(tokens_BL)[1]]
        record("embeddings.sum", x)
        if self.norm is not None:
            x = self.norm(x)
            record("embeddings.norm", x)
        x = dropout(x, noise, 0, self.spec.dropout)
        record("embeddings", x)
        return x


def _normalise(x, epsilon):
    """(x - mean) r with r = 1 / sqrt(variance + epsilon) over the last axis; its gradient
    r (g - mean(g) - y mean(g y)) in one go, where TensorFlow's own would take a dozen passes."""

    @tf.custom_gradient
    def normalise(x):
        centred = x - tf.reduce_mean(x, -1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
        inverse = tf.math.rsqrt(variance + epsilon)
        y = centred * inverse

        @scope("norm")
        def backward(gradient):
            along = tf.reduce_mean(gradient * y, -1, keepdims=True)
            mean = tf.reduce_mean(gradient, -1, keepdims=True)
            return inverse * (gradient - mean - y * along)

        return y, backward

    return normalise(x)


class LayerNorm(keras.layers.Layer):
    """Layer normalisation over the width (Ba et al., 2016), never in a half."""

    def __init__(self, spec: ModelSpec, precision: str, name: str) -> None:
        super().__init__(name=name, dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec = spec

    def build(self, input_shape=None) -> None:
        shape = (self.spec.width,)
        self.scale = self.add_weight(shape=shape, initializer="zeros", name="scale")
        self.bias = None
        if self.spec.bias:
            self.bias = self.add_weight(shape=shape, initializer="zeros", name="bias")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """(…, D) to (…, D)."""
        y = _normalise(x, self.spec.norm_epsilon) * self.scale
        return y if self.bias is None else tf.nn.bias_add(y, self.bias)


class Linear(keras.layers.Layer):
    """`x @ kernel + bias`, kernel (inputs, outputs)."""

    def __init__(
        self, spec: ModelSpec, inputs: int, outputs: int, precision: str, name: str
    ) -> None:
        super().__init__(name=name, dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec, self.half = spec, HALF_TYPES[precision]
        self.inputs_outputs = inputs, outputs

    def build(self, input_shape=None) -> None:
        inputs, outputs = self.inputs_outputs
        self.kernel = self.add_weight(shape=(inputs, outputs), initializer="zeros", name="kernel")
        self.bias = None
        if self.spec.bias:
            self.bias = self.add_weight(shape=(outputs,), initializer="zeros", name="bias")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """(…, inputs) to (…, outputs), in the type of products."""
        return linear(x, self.kernel, self.bias, self.half)


class Attention(keras.layers.Layer):
    """Causal multi-head self-attention (Vaswani et al., 2017) with one fused product for query,
    key and value. A key's bias exists only where the spec asks for it: softmax cancels it."""

    def __init__(self, spec: ModelSpec, precision: str, site: int) -> None:
        super().__init__(name="attention", dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec, self.half, self.site = spec, HALF_TYPES[precision], site
        self.output_linear = Linear(spec, spec.width, spec.width, precision, "output")

    def build(self, input_shape=None) -> None:
        width = self.spec.width
        self.qkv_kernel = self.add_weight(
            shape=(width, 3 * width), initializer="zeros", name="qkv_kernel"
        )
        wanted = {"query": self.spec.bias, "key": self.spec.key_bias, "value": self.spec.bias}
        self.qkv_biases = [
            self.add_weight(shape=(width,), initializer="zeros", name=f"{name}_bias")
            if here
            else tf.zeros(width, self.dtype)
            for name, here in wanted.items()
        ]
        self.output_linear.build()

    def call(
        self,
        x: tf.Tensor,
        noise: Noise | None,
        cache: tf.Variable | None = None,
        start: tf.Tensor | int = 0,
    ) -> tf.Tensor:
        """(B, L, D) to (B, L, D). `cache` (2, B, H, context, K) holds keys and values of the
        positions before `start`, and receives those of `x`."""
        batch, length, width = (*tf.unstack(tf.shape(x)[:2]), self.spec.width)
        length = x.shape[1] or length
        bias = tf.concat(self.qkv_biases, 0)
        qkv = linear(x, self.qkv_kernel, bias, self.half)
        qkv = tf.reshape(qkv, [batch, length, 3, self.spec.heads, self.spec.head_width])
        query, key, value = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))
        for name, part in (("query", query), ("key", key), ("value", value)):
            record(f"attention.{name}", part, self.site)
        if cache is not None:
            new = full(tf.stack([key, value]))
            cache[:, :, :, start : start + length].assign(new)
            key, value = tf.unstack(cast(cache[:, :, :, : start + length], self.half))
        rate = self.spec.attention_dropout
        mixed = attention(query, key, value, noise, self.site, rate, self.half)
        mixed = tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [batch, length, width])
        record("attention.mixed", mixed, self.site)
        output = self.output_linear(mixed)
        record("attention.output", output, self.site)
        return output


class FeedForward(keras.layers.Layer):
    """Two linear layers with an activation between."""

    def __init__(self, spec: ModelSpec, precision: str, site: int) -> None:
        super().__init__(name="feed_forward", dtype=FULL_TYPES[precision].name, autocast=False)
        self.site = site
        self.up = Linear(spec, spec.width, spec.inner_width, precision, "up")
        self.down = Linear(spec, spec.inner_width, spec.width, precision, "down")
        self.activation = ACTIVATIONS[spec.activation]

    def build(self, input_shape=None) -> None:
        self.up.build()
        self.down.build()

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """(B, L, D) to (B, L, D)."""
        x = self.up(x)
        record("feed_forward.up", x, self.site)
        # The activation of a half is computed in fp32 and rounded once, as torch does it.
        x = tf.cast(self.activation(full(x)), x.dtype)
        record("feed_forward.activation", x, self.site)
        x = self.down(x)
        record("feed_forward.down", x, self.site)
        return x


class Block(keras.layers.Layer):
    """Attention and feed-forward, each on a residual branch with dropout; the norm stands before
    the branch ("pre") or after the sum ("post")."""

    def __init__(self, spec: ModelSpec, precision: str, index: int) -> None:
        super().__init__(name=f"decoder.{index}", dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec, self.index = spec, index
        self.attention_norm = LayerNorm(spec, precision, "attention_norm")
        self.attention = Attention(spec, precision, index)
        self.feed_forward_norm = LayerNorm(spec, precision, "feed_forward_norm")
        self.feed_forward = FeedForward(spec, precision, index)

    def build(self, input_shape=None) -> None:
        for layer in (
            self.attention_norm,
            self.attention,
            self.feed_forward_norm,
            self.feed_forward,
        ):
            layer.build()

    def call(
        self,
        x: tf.Tensor,
        noise: Noise | None,
        cache: tf.Variable | None = None,
        start: tf.Tensor | int = 0,
    ) -> tf.Tensor:
        """(B, L, D) to (B, L, D), no half; see `Attention` for `cache` and `start`."""
        rate, site = self.spec.dropout, 1 + 2 * self.index
        pre = self.spec.norm_placement == "pre"
        branch = self._norm("attention", x) if pre else x
        branch = self.attention(branch, noise, cache, start=start)
        x = x + dropout(full(branch), noise, site, rate)
        record("attention.residual", x, self.index)
        x = x if pre else self._norm("attention", x)
        branch = self.feed_forward(self._norm("feed_forward", x) if pre else x)
        x = x + dropout(full(branch), noise, site + 1, rate)
        record("feed_forward.residual", x, self.index)
        return x if pre else self._norm("feed_forward", x)

    def _norm(self, name: str, x: tf.Tensor) -> tf.Tensor:
        x = getattr(self, f"{name}_norm")(x)
        record(f"{name}_norm", x, self.index)
        return x
