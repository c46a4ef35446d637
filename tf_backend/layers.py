"""The layers of the Transformer. Shape letters: B batch, L queries, M keys, D width, H heads,
G heads of keys and values, K head width, F feed-forward width, V vocabulary."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from horovod_lm.activations import record, record_rows, traced
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

# Query rows of one block of attention. A causal one skips the keys after its last row; where every
# key is seen there is nothing to skip, and large products were faster up to here.
ROW_BLOCK = 64
FREE_ROWS = 512
UNSEEN = -1e30  # added to scores: finite, so that a query that sees no key gives no NaN


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
    "silu": tf.nn.silu,
}


NATIVE_SITES = 2**12  # more than a stack has, of either kind


class Words(NamedTuple):
    """`horovod_lm.randomness.DropoutWords` as tensors."""

    residual_rows: tf.Tensor | None
    residual_columns: tf.Tensor | None
    attention_rows: tf.Tensor | None
    attention_columns: tf.Tensor | None
    cross_rows: tf.Tensor | None
    cross_columns: tf.Tensor | None


class Native(NamedTuple):
    """The framework's own dropout in one stack: `seed` (2,) int32 keys it, with the site."""

    seed: tf.Tensor


Noise = Words | Native


@dataclass(frozen=True)
class Sight:
    """What attention is told in all blocks of a stack: which keys a query sees, and what positions
    do to it. `causal`: none after it, and each row has as many queries as new keys, which then are
    the last ones. `mask` (B, L, M) is 0, or `UNSEEN` where a query does not see a key; `seeing`
    (B, L, 1) is 1, or 0 for a query that sees none, whose probabilities are equal then and have no
    gradient. `bias` (H, L, M) and `mask` are added to scaled scores. `rotary` are cosines and sines
    (B or 1, 1, L, K / 2) by which queries and new keys are turned.

    No named tuple, in which Keras would look for tensors, and refuse it for what is none."""

    causal: bool = False
    mask: tf.Tensor | None = None
    seeing: tf.Tensor | None = None
    bias: tf.Tensor | None = None
    rotary: tuple[tf.Tensor, tf.Tensor] | None = None


class Cache(NamedTuple):
    """What decoding keeps of one block: keys and values of earlier tokens, (2, B, G, context, K),
    and those of the encoder's output, (2, B, G, M, K), where it attends to that."""

    own: tf.Variable
    cross: tf.Tensor | None


def keep_mask(rows: tf.Tensor, columns: tf.Tensor, rate: float) -> tf.Tensor:
    """The shared dropout mask: bool of shape rows.shape + columns.shape."""
    mixed = tf.bitwise.bitwise_xor(rows[..., None], columns) * MULTIPLIER
    return mixed >= threshold(rate)


def _times_keep(x: tf.Tensor, keep: tf.Tensor, rate: float) -> tf.Tensor:
    return x * (tf.cast(keep, x.dtype) * (1 / (1 - rate)))


def _site_seed(noise: Native, site: int, start: int = 0) -> tf.Tensor:
    """`site`: not negative on the residual stream, -1 - i for the attention of layer i, and
    `NATIVE_SITES` less for its attention to the encoder."""
    return tf.add(noise.seed, [site, start])


def _site_noise(noise, site: int, cross: bool):
    """What drops the probabilities of layer `site`, as `attention` takes it."""
    if isinstance(noise, Native):
        return Native(_site_seed(noise, -1 - site - (NATIVE_SITES if cross else 0)))
    if noise is None or noise.attention_rows is None:
        return None
    if cross:
        return noise.cross_rows[site], noise.cross_columns[site]
    return noise.attention_rows[site], noise.attention_columns[site]


@scope("dropout")
def dropout(x: tf.Tensor, noise: Noise | None, site: int, rate: float) -> tf.Tensor:
    """Dropout on the residual stream, (B, L, D), at one site; the identity without noise."""
    if noise is None or not rate:
        return x
    if isinstance(noise, Native):
        return tf.nn.experimental.stateless_dropout(x, rate, _site_seed(noise, site))
    keep = keep_mask(noise.residual_rows[site], noise.residual_columns[site], rate)
    return _times_keep(x, keep, rate)


def _turned(x, cosines, sines):
    first, second = tf.split(x, 2, -1)
    return tf.concat([first * cosines - second * sines, second * cosines + first * sines], -1)


def rotate(x_BHLK: tf.Tensor, rotary: tuple[tf.Tensor, tf.Tensor] | None) -> tf.Tensor:
    """Each pair (i, i + K / 2) turned by its position's angle (Su et al., 2021), in the full type
    and then rounded as `x` was; the identity without `rotary`."""
    if rotary is None:
        return x_BHLK
    cosines, sines = rotary

    @tf.custom_gradient
    def turn(x):
        @scope("attention")
        def backward(gradient):
            return tf.cast(_turned(full(gradient), cosines, -sines), gradient.dtype)

        return tf.cast(_turned(full(x), cosines, sines), x.dtype), backward

    return turn(x_BHLK)


@dataclass(frozen=True)
class _Given:
    """What `attention` is given beside queries, keys and values; words of rows are (B H, L), and
    `times` are the heads of queries that a head of keys serves."""

    sight: Sight
    scale: float
    noise: tuple[tf.Tensor, tf.Tensor] | Native | None
    rate: float
    heads: int
    times: int
    site: tuple[str, str]
    half: tf.DType | None


class _Rows(NamedTuple):
    """A block of query rows, from `start` to `end`, which see no key from `last` on."""

    start: int
    end: int
    last: int


def _row_blocks(length, keys, causal):
    step = ROW_BLOCK if causal else FREE_ROWS
    ends = [(start, min(start + step, length)) for start in range(0, length, step)]
    return [_Rows(start, end, end if causal else keys) for start, end in ends]


def _by_head(x, heads):
    return tf.reshape(x, [-1, heads, *x.shape[-2:]])


def _scaled(x, factor):
    return x if factor == 1 else x * factor


def _probabilities(scores, bias, rows, given):
    """Softmax of one block's scores with all that is added to them."""
    sight, (start, end, last) = given.sight, rows
    part = (slice(None), slice(start, end), slice(0, last))
    added = [x[part] for x in bias]
    if sight.mask is not None:
        added.append(sight.mask[part][:, None])
    by_head = bool(added)
    if sight.causal:
        shape, full_type = (end - start, last), scores.dtype.as_numpy_dtype
        added.insert(0, np.triu(np.full(shape, -np.inf, full_type), start + 1))
    if added:
        total = functools.reduce(operator.add, added)
        scores = (_by_head(scores, given.heads) if by_head else scores) + total
    _note("scores", scores, rows, given)
    probabilities = tf.reshape(tf.nn.softmax(scores), [-1, end - start, last])
    _note("probabilities", probabilities, rows, given)
    return probabilities


def _dropped(probabilities, rows, given):
    """One block's probabilities after dropout, and which are kept: None where all are."""
    noise, (start, end, last) = given.noise, rows
    if noise is None:
        return probabilities, None
    if isinstance(noise, Native):
        shape = tf.shape(probabilities)
        keep = tf.random.stateless_uniform(shape, tf.add(noise.seed, [0, start])) >= given.rate
    else:
        keep = keep_mask(noise[0][:, start:end], noise[1][:last], given.rate)
    dropped = _times_keep(probabilities, keep, given.rate)
    _note("dropped", dropped, rows, given)
    return dropped, keep


def _through_softmax(gradient, inner_sum, probabilities, keep, rows, given):
    """One block's gradient of scores, of the one of probabilities after dropout."""
    if keep is not None:
        gradient = _times_keep(gradient, keep, given.rate)
    gradient = (gradient - inner_sum[:, rows.start : rows.end]) * probabilities
    if given.sight.seeing is None:
        return gradient
    shape, seeing = tf.shape(gradient), given.sight.seeing[:, None, rows.start : rows.end]
    return tf.reshape(_by_head(gradient, given.heads) * seeing, shape)


def _blockwise(query, key, value, given):
    """Attention of some query rows at a time, so that what they work on stays in the cache, with
    probabilities kept for the backward. A causal one never touches the keys after them. Queries
    (B H, L, K), keys and values (B G, M, K), lengths known when traced.

    With p = softmax(s), m = keep / (1 - rate), o = (p m) v and g = dL/do:
    dv = (p m)^T g and ds = p (m (g v^T) - rowsum(g o)), since rowsum(p m (g v^T)) = rowsum(g o).
    """
    half, times, keys, sight = given.half, given.times, key.shape[1], given.sight
    blocks = _row_blocks(query.shape[1], keys, sight.causal)
    # The queries and not the scores, which are larger; but a half would be rounded once more.
    early, late = (given.scale, 1) if half is None else (1, given.scale)

    @tf.custom_gradient
    def attend(query, key, value, *bias):
        query, key, value = (operand(x, half) for x in (query, key, value))
        query = _scaled(query, early)
        if times > 1:
            key, value = (tf.repeat(x, times, axis=0) for x in (key, value))
        outputs, saved = [], []
        for rows in blocks:
            transposed = tf.transpose(key[:, : rows.last], [0, 2, 1])
            scores = full(multiply(query[:, rows.start : rows.end], transposed, half))
            probabilities = _probabilities(_scaled(scores, late), bias, rows, given)
            dropped, keep = _dropped(probabilities, rows, given)
            dropped = operand(dropped, half)
            outputs.append(multiply(dropped, value[:, : rows.last], half))
            saved.append((probabilities, dropped, keep))
        output = tf.concat(outputs, 1)

        @scope("attention")
        def backward(gradient):
            inner_sum = tf.reduce_sum(full(gradient) * full(output), -1, keepdims=True)
            gradient = operand(gradient, half)
            d_query, d_key, d_value, d_bias = [], [], [], []
            for rows, (probabilities, dropped, keep) in zip(blocks, saved, strict=True):
                start, end, last = rows
                part = gradient[:, start:end]
                d_scores = full(multiply(part, tf.transpose(value[:, :last], [0, 2, 1]), half))
                d_scores = _through_softmax(d_scores, inner_sum, probabilities, keep, rows, given)
                if bias:
                    of_batch = tf.reduce_sum(_by_head(d_scores, given.heads), 0)
                    d_bias.append(_padded(of_batch, 2, keys))
                d_scores = operand(_scaled(d_scores, late), half)
                d_query.append(multiply(d_scores, key[:, :last], half))
                for total, weights, x in (
                    (d_key, d_scores, query[:, start:end]),
                    (d_value, dropped, part),
                ):
                    share = full(multiply(tf.transpose(weights, [0, 2, 1]), x, half))
                    total.append(_padded(share, 1, keys))
            d_query = _scaled(tf.concat(d_query, 1), early)
            d_key, d_value = (tf.add_n(total) for total in (d_key, d_value))
            if times > 1:
                shape = [-1, times, *d_key.shape[1:]]
                d_key, d_value = (tf.reduce_sum(tf.reshape(x, shape), 1) for x in (d_key, d_value))
            d_bias = [tf.concat(d_bias, 1)] if bias else []
            return d_query, cast(d_key, half), cast(d_value, half), *d_bias

        return output, backward

    return attend(query, key, value, *([] if sight.bias is None else [sight.bias]))


def _padded(x, axis: int, size: int):
    """With zeros at the end of `axis`, up to `size`."""
    missing = size - x.shape[axis]
    if not missing:
        return x
    return tf.pad(x, [[0, missing if i == axis else 0] for i in range(len(x.shape))])


def _note(name, x, rows, given) -> None:
    """Record one block's (B H, rows, keys) or (B, H, rows, keys), if a forward is traced."""
    if not traced():
        return
    sight, heads, (start, end, last) = given.sight, given.heads, rows
    seen = np.tril(np.ones((1, 1, end - start, last), bool), start if sight.causal else last)
    if sight.mask is not None:
        seen = seen & (sight.mask[:, None, start:end, :last].numpy() == 0)
    where, block = given.site
    record_rows(f"{where}.{name}", _by_head(x, heads), start, heads, block, seen=seen)


def _plain(query_BHLK, key_BGMK, value_BGMK, sight, scale, half):
    """Attention of queries to a cache whose last keys are their own, in few operations."""
    _, heads, length, width = query_BHLK.shape
    groups, keys = key_BGMK.shape[1], tf.shape(key_BGMK)[2]
    query = tf.reshape(query_BHLK, [-1, groups, heads // groups * length, width])
    scores = full(product(query, tf.transpose(key_BGMK, [0, 1, 3, 2]), half)) * scale
    scores = tf.reshape(scores, [-1, heads, length, keys])
    if sight.bias is not None:
        scores += sight.bias
    later = tf.range(keys) > tf.range(length)[:, None] + (keys - length)
    scores = tf.where(later, tf.constant(-math.inf, scores.dtype), scores)
    probabilities = tf.reshape(tf.nn.softmax(scores), [-1, groups, query.shape[2], keys])
    mixed = product(probabilities, value_BGMK, half)
    return tf.reshape(mixed, [-1, heads, length, width])


def attention(
    query_BHLK: tf.Tensor,
    key_BGMK: tf.Tensor,
    value_BGMK: tf.Tensor,
    sight: Sight,
    scale: float,
    noise: tuple[tf.Tensor, tf.Tensor] | Native | None,
    rate: float,
    site: tuple[str, str],
    half: tf.DType | None,
) -> tf.Tensor:
    """softmax(scale q k^T + bias + mask) v, (B, H, L, K). Head g of keys and values serves the
    queries' heads g H / G to (g + 1) H / G - 1.

    `noise` drops probabilities: words of rows (B, H, L) and columns (M,), or a generator's seed.
    `site` names what is recorded: the attention, and its block. Queries beside a cache take
    a plain form, which is causal and knows no noise.
    """
    if key_BGMK.shape[2] is None or (sight.causal and key_BGMK.shape[2] != query_BHLK.shape[2]):
        return _plain(query_BHLK, key_BGMK, value_BGMK, sight, scale, half)
    _, heads, length, width = query_BHLK.shape
    times, keys = heads // key_BGMK.shape[1], key_BGMK.shape[2]
    query = tf.reshape(query_BHLK, [-1, length, width])
    key, value = (tf.reshape(x, [-1, keys, width]) for x in (key_BGMK, value_BGMK))
    noise = noise if rate else None
    if noise is not None and not isinstance(noise, Native):
        noise = tf.reshape(noise[0], [-1, length]), noise[1]
    given = _Given(sight, scale, noise, rate, heads, times, site, half)
    output = _blockwise(query, key, value, given)
    return tf.reshape(output, [-1, heads, length, width])


@tf.custom_gradient
def _lookup(table, indices):
    @scope("embeddings")
    def backward(gradient):
        rows = tf.reshape(gradient, [-1, table.shape[1]])
        d_table = tf.math.unsorted_segment_sum(rows, tf.reshape(indices, [-1]), table.shape[0])
        return d_table, None

    return tf.gather(table, indices), backward


class Embeddings(keras.layers.Layer):
    """Token embeddings plus positions and segments, then a norm where the spec has one, then
    dropout: (B, L) int to (B, L, D)."""

    def __init__(self, spec: ModelSpec, precision: str) -> None:
        super().__init__(name="embeddings", dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec = spec
        self.norm = Norm(spec, precision, "norm") if spec.has_embedding_norm else None

    def build(self, input_shape=None) -> None:
        spec = self.spec
        shape = (spec.vocabulary, spec.width)
        self.tokens = self.add_weight(shape=shape, initializer="zeros", name="tokens")
        self.positions = self.segments = None
        if spec.positions == "learned":
            shape = (spec.context + spec.position_offset, spec.width)
            self.positions = self.add_weight(shape=shape, initializer="zeros", name="positions")
        elif spec.positions == "sinusoidal":
            self.positions = sinusoidal_positions(spec).astype(self.dtype)
        if spec.segments:
            shape = (spec.segments, spec.width)
            self.segments = self.add_weight(shape=shape, initializer="zeros", name="segments")
        if self.norm is not None:
            self.norm.build()

    def call(
        self,
        tokens_BL: tf.Tensor,
        noise: Noise | None,
        positions_BL: tf.Tensor | None = None,
        segments_BL: tf.Tensor | None = None,
        start: tf.Tensor | int = 0,
        site: str = "embeddings",
    ) -> tf.Tensor:
        """Without `positions`, they begin with `start`; without `segments`, all are 0. What is
        recorded is named after `site`."""
        spec = self.spec
        x = _lookup(tf.convert_to_tensor(self.tokens), tokens_BL)
        if spec.embedding_scale != 1:
            x = x * spec.embedding_scale
        if self.positions is not None:
            table = tf.convert_to_tensor(self.positions)
            if positions_BL is None:
                first, length = start + spec.position_offset, tokens_BL.shape[1]
                # The shape is made known again where `start` is not.
                x = x + tf.reshape(table[first : first + length], [length, spec.width])
            else:
                x = x + _lookup(table, positions_BL + spec.position_offset)
        if self.segments is not None:
            table = tf.convert_to_tensor(self.segments)
            x = x + (table[0] if segments_BL is None else _lookup(table, segments_BL))
        record(f"{site}.sum", x)
        if self.norm is not None:
            x = self.norm(x)
            record(f"{site}.norm", x)
        x = dropout(x, noise, 0, spec.dropout)
        record(site, x)
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


def _divide_by_size(x, epsilon):
    """x r with r = 1 / sqrt(mean(x^2) + epsilon) over the last axis; its gradient
    r (g - y mean(g y)) in one go."""

    @tf.custom_gradient
    def divide(x):
        inverse = tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + epsilon)
        y = x * inverse

        @scope("norm")
        def backward(gradient):
            along = tf.reduce_mean(gradient * y, -1, keepdims=True)
            return inverse * (gradient - y * along)

        return y, backward

    return divide(x)


NORMS = {"layer_norm": _normalise, "rms_norm": _divide_by_size}


class Norm(keras.layers.Layer):
    """Layer normalisation over the width (Ba et al., 2016), or by the root of the mean square alone
    (Zhang and Sennrich, 2019); never in a half."""

    def __init__(self, spec: ModelSpec, precision: str, name: str) -> None:
        super().__init__(name=name, dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec, self.normalise = spec, NORMS[spec.norm]

    def build(self, input_shape=None) -> None:
        shape = (self.spec.width,)
        self.scale = self.add_weight(shape=shape, initializer="zeros", name="scale")
        self.bias = None
        if self.spec.bias and self.spec.norm == "layer_norm":
            self.bias = self.add_weight(shape=shape, initializer="zeros", name="bias")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """(…, D) to (…, D)."""
        y = self.normalise(x, self.spec.norm_epsilon) * self.scale
        return y if self.bias is None else tf.nn.bias_add(y, self.bias)


class Linear(keras.layers.Layer):
    """`x @ kernel + bias`, kernel (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, precision: str, name: str) -> None:
        super().__init__(name=name, dtype=FULL_TYPES[precision].name, autocast=False)
        self.half, self.has_bias = HALF_TYPES[precision], bias
        self.inputs_outputs = inputs, outputs

    def build(self, input_shape=None) -> None:
        inputs, outputs = self.inputs_outputs
        self.kernel = self.add_weight(shape=(inputs, outputs), initializer="zeros", name="kernel")
        self.bias = None
        if self.has_bias:
            self.bias = self.add_weight(shape=(outputs,), initializer="zeros", name="bias")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """(…, inputs) to (…, outputs), in the type of products."""
        return linear(x, self.kernel, self.bias, self.half)


class Attention(keras.layers.Layer):
    """Multi-head attention (Vaswani et al., 2017): to the same stack, with one fused product for
    query, key and value where they are equally wide, or to the encoder. Elsewhere key and value
    alone are fused. A key's bias exists only where the spec asks for it: softmax cancels it."""

    def __init__(
        self, spec: ModelSpec, precision: str, block: str, index: int, name: str = "attention"
    ) -> None:
        super().__init__(name=name, dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec, self.half = spec, HALF_TYPES[precision]
        self.block, self.index, self.cross = block, index, name == "cross_attention"
        self.fused = not self.cross and spec.heads == spec.key_value_count
        widths = spec.attention_width, spec.width
        self.output_linear = Linear(*widths, spec.bias, precision, "output")

    def build(self, input_shape=None) -> None:
        spec = self.spec
        queries, keys = spec.attention_width, spec.key_value_count * spec.head_width
        widths = {"query_kernel": queries, "key_value_kernel": 2 * keys}
        if self.fused:
            widths = {"qkv_kernel": 3 * queries}
        for name, width in widths.items():
            shape = (spec.width, width)
            setattr(self, name, self.add_weight(shape=shape, initializer="zeros", name=name))
        wanted = {
            "query_bias": (spec.bias, queries),
            "key_bias": (spec.has_key_bias, keys),
            "value_bias": (spec.bias, keys),
        }
        self.biases = None
        if spec.bias or spec.has_key_bias:
            self.biases = [
                self.add_weight(shape=(width,), initializer="zeros", name=name)
                if here
                else tf.zeros(width, self.dtype)
                for name, (here, width) in wanted.items()
            ]
        self.output_linear.build()

    def remember(self, x: tf.Tensor) -> tf.Tensor:
        """Keys and values (2, B, G, M, K) of what the queries see, (B, M, D)."""
        return self._heads(self._product(x, self.key_value_kernel, 1, 3), 2)

    def call(
        self,
        x: tf.Tensor,
        sight: Sight,
        noise: Noise | None,
        memory: tf.Tensor | None = None,
        cache: tf.Variable | None = None,
        start: tf.Tensor | int = 0,
    ) -> tf.Tensor:
        """(B, L, D) to (B, L, D). `memory` is what `remember` made of the encoder's output, for
        attention to it. `cache` (2, B, G, context, K) holds keys and values of the positions before
        `start`, and receives those of `x`."""
        if self.fused:
            query, key, value = tf.unstack(self._heads(self._product(x, self.qkv_kernel, 0, 3), 3))
        else:
            (query,) = tf.unstack(self._heads(self._product(x, self.query_kernel, 0, 1), 1))
            key, value = tf.unstack(memory if self.cross else self.remember(x))
        query, key = rotate(query, sight.rotary), rotate(key, sight.rotary)
        for name, part in (("query", query), ("key", key), ("value", value)):
            record(f"{self.name}.{name}", part, self.block)
        if cache is not None:
            end = start + x.shape[1]
            cache[:, :, :, start:end].assign(full(tf.stack([key, value])))
            key, value = tf.unstack(cast(cache[:, :, :, :end], self.half))
        noise = _site_noise(noise, self.index, self.cross)
        rate, site = self.spec.attention_dropout, (self.name, self.block)
        scale = self.spec.attention_scale
        mixed = attention(query, key, value, sight, scale, noise, rate, site, self.half)
        mixed = tf.transpose(mixed, [0, 2, 1, 3])
        mixed = tf.reshape(mixed, [-1, x.shape[1], self.spec.attention_width])
        record(f"{self.name}.mixed", mixed, self.block)
        output = self.output_linear(mixed)
        record(f"{self.name}.output", output, self.block)
        return output

    def _product(self, x, kernel, first: int, last: int) -> tf.Tensor:
        """With the biases from the `first` of query, key and value on."""
        bias = None if self.biases is None else tf.concat(self.biases[first:last], 0)
        return linear(x, kernel, bias, self.half)

    def _heads(self, x, parts: int) -> tf.Tensor:
        """(B, L, parts H K) as (parts, B, H, L, K)."""
        width = self.spec.head_width
        shape = [-1, x.shape[1], parts, x.shape[2] // (parts * width), width]
        return tf.transpose(tf.reshape(x, shape), [2, 0, 3, 1, 4])


class FeedForward(keras.layers.Layer):
    """Two linear layers with an activation between, or (Shazeer, 2020) with the activation of a
    third one times the first."""

    def __init__(self, spec: ModelSpec, precision: str, block: str) -> None:
        super().__init__(name="feed_forward", dtype=FULL_TYPES[precision].name, autocast=False)
        self.block = block
        self.up = Linear(spec.width, spec.inner_width, spec.bias, precision, "up")
        self.gate = None
        if spec.gated:
            self.gate = Linear(spec.width, spec.inner_width, spec.bias, precision, "gate")
        self.down = Linear(spec.inner_width, spec.width, spec.bias, precision, "down")
        self.activation = ACTIVATIONS[spec.activation]

    def build(self, input_shape=None) -> None:
        for layer in (self.up, self.gate, self.down):
            if layer is not None:
                layer.build()

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """(B, L, D) to (B, L, D)."""
        up = self.up(x)
        record("feed_forward.up", up, self.block)
        # The activation of a half is computed in fp32 and rounded once, as torch does it.
        if self.gate is None:
            x = tf.cast(self.activation(full(up)), up.dtype)
        else:
            gate = self.gate(x)
            record("feed_forward.gate", gate, self.block)
            x = tf.cast(self.activation(full(gate)) * full(up), up.dtype)
        record("feed_forward.activation", x, self.block)
        x = self.down(x)
        record("feed_forward.down", x, self.block)
        return x


class Block(keras.layers.Layer):
    """Attention, in a decoder beside an encoder attention to that, and feed-forward, each on a
    residual branch with dropout; the norm stands before the branch ("pre") or after the sum
    ("post")."""

    def __init__(self, spec: ModelSpec, precision: str, stack: str, index: int) -> None:
        super().__init__(name=str(index), dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec, self.block = spec, f"{stack}.{index}"
        cross = stack == "decoder" and "encoder" in spec.stacks
        self.first_site = 1 + (3 if cross else 2) * index
        place = spec, precision, self.block, index
        self.attention_norm = Norm(spec, precision, "attention_norm")
        self.attention = Attention(*place)
        self.cross_attention_norm = self.cross_attention = None
        if cross:
            self.cross_attention_norm = Norm(spec, precision, "cross_attention_norm")
            self.cross_attention = Attention(*place, "cross_attention")
        self.feed_forward_norm = Norm(spec, precision, "feed_forward_norm")
        self.feed_forward = FeedForward(spec, precision, self.block)

    def build(self, input_shape=None) -> None:
        for layer in (
            self.attention_norm,
            self.attention,
            self.cross_attention_norm,
            self.cross_attention,
            self.feed_forward_norm,
            self.feed_forward,
        ):
            if layer is not None:
                layer.build()

    def call(
        self,
        x: tf.Tensor,
        sight: Sight,
        noise: Noise | None,
        encoded: tf.Tensor | None = None,
        cross_sight: Sight | None = None,
        cache: Cache | None = None,
        start: tf.Tensor | int = 0,
    ) -> tf.Tensor:
        """(B, L, D) to (B, L, D), no half. `encoded` is the encoder's output (B, M, D), where
        there is one and the cache does not have what it gives; `start` is as in `Attention`."""
        own = None if cache is None else cache.own

        def cross(x):
            attend = self.cross_attention
            memory = attend.remember(encoded) if cache is None else cache.cross
            return attend(x, sight=cross_sight, noise=noise, memory=memory)

        def same(x):
            return self.attention(x, sight=sight, noise=noise, cache=own, start=start)

        # By keyword: Keras wants nothing but tensors without.
        branches = {"attention": same}
        if self.cross_attention is not None:
            branches["cross_attention"] = cross
        branches["feed_forward"] = self.feed_forward
        pre = self.spec.norm_placement == "pre"
        for site, (name, branch) in enumerate(branches.items(), self.first_site):
            y = branch(self._norm(name, x) if pre else x)
            x = x + dropout(full(y), noise, site, self.spec.dropout)
            record(f"{name}.residual", x, self.block)
            x = x if pre else self._norm(name, x)
        return x

    def _norm(self, name: str, x: tf.Tensor) -> tf.Tensor:
        x = getattr(self, f"{name}_norm")(x)
        record(f"{name}_norm", x, self.block)
        return x
