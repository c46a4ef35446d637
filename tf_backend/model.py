"""The Transformer of a `ModelSpec`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import keras
import tensorflow as tf

from horovod_lm.activations import record
from horovod_lm.spec import ModelSpec, alibi_slopes, relative_buckets, rotary_tables
from tf_backend.layers import (
    ACTIVATIONS,
    UNSEEN,
    Block,
    Cache,
    Embeddings,
    Linear,
    Noise,
    Norm,
    Sight,
)
from tf_backend.precision import FULL_TYPES, HALF_TYPES, full, linear


def _by_distance(values_HN, length: int, start):
    """(H, L, start + L): for the queries from `start` on and all keys up to the last of them, the
    value of their distance, of N = 2 C - 1 values for 1 - C to C - 1."""
    heads, number = values_HN.shape

    @tf.custom_gradient
    def spread(values):
        def backward(gradient):  # there is no cache, and start is 0
            # Queries backwards, and rows end to end, each one shorter than it was: column c then
            # has all whose distance is c + 1 - L.
            rows = tf.pad(tf.reverse(gradient, [1]), [[0, 0], [0, 0], [0, length]])
            rows = tf.reshape(rows, [heads, -1])[:, : length * (2 * length - 1)]
            sums = tf.reduce_sum(tf.reshape(rows, [heads, length, 2 * length - 1]), 1)
            rest = (number - 2 * length + 1) // 2
            return tf.pad(sums, [[0, 0], [rest, rest]])

        return tf.gather(values, _distances(length, start) + number // 2, axis=1), backward

    return spread(values_HN)


def _distances(length: int, start) -> tf.Tensor:
    """(L, start + L) from queries to keys."""
    end = start + length
    return tf.range(end) - tf.range(start, end)[:, None]


class Stack(keras.layers.Layer):
    """The blocks of an encoder, whose tokens see all others, or of a decoder, whose tokens see
    those before; then, pre-norm only, a last norm. Positions that are not in the embeddings come in
    here: turned queries and keys, or a bias on attention scores by distance."""

    def __init__(self, spec: ModelSpec, precision: str, name: str, recompute: bool = False) -> None:
        super().__init__(name=name, dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec, self.recompute = spec, recompute
        self.blocks = [Block(spec, precision, name, i) for i in range(spec.stacks[name])]
        self.norm = Norm(spec, precision, "norm") if spec.norm_placement == "pre" else None

    def build(self, input_shape=None) -> None:
        spec = self.spec
        if spec.positions == "relative":
            shape = (spec.relative_buckets, spec.heads)
            self.relative_bias = self.add_weight(
                shape=shape, initializer="zeros", name="relative_bias"
            )
        if spec.positions == "rotary":
            self.rotary_tables = [table.astype(self.dtype) for table in rotary_tables(spec)]
        for block in self.blocks:
            block.build()
        if self.norm is not None:
            self.norm.build()

    def sight(
        self,
        length: int,
        blocks: tf.Tensor | None = None,
        prefix: tf.Tensor | None = None,
        positions: tf.Tensor | None = None,
        start: tf.Tensor | int = 0,
    ) -> Sight:
        """What the blocks of `length` tokens from `start` on see, with `blocks`, `prefix` and
        `positions` (B, L) of a micro-batch's inputs."""
        causal, mask = self.name == "decoder", None
        if not causal:
            prefix = None
        if blocks is not None or prefix is not None:
            seen = tf.ones([1, length, length], tf.bool)
            if blocks is not None:
                seen = blocks[:, :, None] == blocks[:, None, :]
            if prefix is not None:
                causal = False
                earlier = tf.linalg.band_part(tf.ones([length, length]), -1, 0) > 0
                seen = seen & (earlier | (prefix[:, None, :] > 0))
            mask = _mask(seen, self.dtype)
        return Sight(
            causal,
            mask,
            bias=self._bias(length, start),
            rotary=self._rotary(length, positions, start),
        )

    def call(
        self,
        x: tf.Tensor,
        sight: Sight,
        noise: Noise | None = None,
        encoded: tf.Tensor | None = None,
        cross_sight: Sight | None = None,
        caches: Sequence[Cache] | None = None,
        start: tf.Tensor | int = 0,
    ) -> tf.Tensor:
        """(B, L, D) to (B, L, D), no half. `encoded` is the encoder's output (B, M, D); `caches`,
        one for each block, and `start` are for decoding: the tokens' first position, with keys and
        values of earlier ones."""
        for index, block in enumerate(self.blocks):
            if self.recompute and caches is None:
                x = _recomputed(block, x, sight, noise, encoded, cross_sight)
            else:
                cache = None if caches is None else caches[index]
                known = {"noise": noise, "encoded": encoded, "cross_sight": cross_sight}
                x = block(x, sight=sight, **known, cache=cache, start=start)
        if self.norm is not None:
            x = self.norm(x)
            record(f"{self.name}.norm", x)
        return x

    def _bias(self, length: int, start) -> tf.Tensor | None:
        spec = self.spec
        if spec.positions == "alibi":
            slopes = tf.constant(alibi_slopes(spec.heads), self.dtype)[:, None, None]
            return -slopes * tf.cast(tf.abs(_distances(length, start)), self.dtype)
        if spec.positions != "relative":
            return None
        far = spec.context - 1
        buckets = relative_buckets(spec, self.name, range(far, far + 1), range(2 * far + 1))[0]
        values_NH = tf.gather(tf.convert_to_tensor(self.relative_bias), buckets)
        return _by_distance(tf.transpose(values_NH), length, start)

    def _rotary(self, length: int, positions, start) -> tuple[tf.Tensor, tf.Tensor] | None:
        if self.spec.positions != "rotary":
            return None
        tables = map(tf.constant, self.rotary_tables)
        if positions is not None:
            cosines, sines = (tf.gather(table, positions)[:, None] for table in tables)
        else:
            tables = (table[start : start + length] for table in tables)
            cosines, sines = (tf.reshape(table, [1, 1, length, -1]) for table in tables)
        return cosines, sines


def _mask(seen: tf.Tensor, dtype: str) -> tf.Tensor:
    return tf.where(seen, tf.constant(0, dtype), tf.constant(UNSEEN, dtype))


def _recomputed(block: Block, x, sight: Sight, noise, encoded, cross_sight) -> tf.Tensor:
    """`block` of the same, whose backward begins with its forward. Whatever has a gradient is given
    to it as a tensor."""
    given = [x] + [y for y in (sight.bias, encoded) if y is not None]

    def run(x, *rest):
        rest = list(rest)
        bias = None if sight.bias is None else rest.pop(0)
        known = rest.pop(0) if rest else None
        shifted = replace(sight, bias=bias)
        return block(x, sight=shifted, noise=noise, encoded=known, cross_sight=cross_sight)

    @tf.custom_gradient
    def recomputed(*given):
        def backward(gradient, variables=()):
            # XLA merges what is computed twice from the same, and both forwards would be one that
            # keeps everything. So inputs wait for the gradient, in a way that XLA can't see
            # through, as it sees through that of tf.recompute_grad: a NaN is not equal to itself.
            first = tf.reshape(gradient, [-1])[0]
            zero = tf.where(first == first, *(tf.constant(y, first.dtype) for y in (0, math.nan)))
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                again = [y + zero for y in given]
                tape.watch([*again, *variables])
                y = run(*again)
            zeros = tf.UnconnectedGradients.ZERO
            gradients = tape.gradient(y, [*again, *variables], gradient, zeros)
            return gradients[: len(given)], gradients[len(given) :]

        return run(*given), backward

    return recomputed(*given)


class Head(keras.layers.Layer):
    """What stands between the last stack and the product with a head's kernel: for the language
    model a scale, and a linear layer with activation and norm, where the spec asks for them.
    `kernel` is (D, outputs), or None where it is the token embedding; `bias` (outputs,) or None."""

    def __init__(self, spec: ModelSpec, precision: str, name: str) -> None:
        super().__init__(name=f"heads.{name}", dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec, self.head = spec, name
        self.scale = spec.output_scale if name == "lm" else 1.0
        self.transform = self.norm = None
        if name == "lm" and spec.head_transform:
            self.transform = Linear(spec.width, spec.width, True, precision, "transform")
            self.activation = ACTIVATIONS[spec.activation]
            self.norm = Norm(spec, precision, "norm")

    def build(self, input_shape=None) -> None:
        spec = self.spec
        tied, has_bias, outputs = spec.tied, spec.head_bias, spec.vocabulary
        if self.head != "lm":
            tied, has_bias = False, True
            (outputs,) = (head.outputs for head in spec.task_heads if head.name == self.head)
        self.kernel = self.bias = None
        if not tied:
            shape = (spec.width, outputs)
            self.kernel = self.add_weight(shape=shape, initializer="zeros", name="kernel")
        if has_bias:
            self.bias = self.add_weight(shape=(outputs,), initializer="zeros", name="bias")
        for layer in (self.transform, self.norm):
            if layer is not None:
                layer.build()

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """(…, D) to (…, D), no half."""
        if self.scale != 1:
            x = x * self.scale
        if self.transform is not None:
            x = self.transform(x)
            record("heads.lm.transform", _rows(x))
            x = tf.cast(self.activation(full(x)), x.dtype)
            record("heads.lm.activation", _rows(x))
            x = self.norm(full(x))
            record("heads.lm.norm", _rows(x))
        return x


def _rows(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, [-1, x.shape[-1]])


class Past(NamedTuple):
    """What decoding keeps: for each block of the decoder its cache, which is overwritten in place;
    what tokens see of the encoder's, (B, 1, M), if not all; and the position of the next token."""

    caches: list[Cache]
    cross_mask: tf.Tensor | None
    start: tf.Tensor


class Transformer(keras.Model):
    """Embeddings, an encoder, a decoder or both, and heads, of which the kernels are applied apart,
    since training does it together with the loss."""

    def __init__(self, spec: ModelSpec, precision: str, recompute: bool = False) -> None:
        super().__init__(name="transformer", dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec, self.half = spec, HALF_TYPES[precision]
        self.embeddings = Embeddings(spec, precision)
        self.stacks = {name: Stack(spec, precision, name, recompute) for name in spec.stacks}
        self.pooler = None
        if spec.pooler:
            self.pooler = Linear(spec.width, spec.width, True, precision, "pooler")
        self._over = {head.name: head.over for head in spec.task_heads}
        names = ["lm", *self._over]
        self.heads = {name: Head(spec, precision, name) for name in names}

    def build(self, input_shape=None) -> None:
        self.embeddings.build()
        for layer in (*self.stacks.values(), *self.heads.values()):
            layer.build()
        if self.pooler is not None:
            self.pooler.build()

    def call(
        self, inputs: Mapping[str, tf.Tensor], noise: Mapping[str, Noise] | None = None
    ) -> dict[str, tf.Tensor]:
        """Hidden states (B, L, D) by stack, no half, of the `inputs` of a micro-batch, and `pooled`
        where there is a pooler."""
        noise, hidden = noise or {}, {}
        for name, stack in self.stacks.items():
            own = self._own(inputs, name)
            encoded = cross_sight = None
            if hidden:
                encoded, cross_sight = hidden["encoder"], self._cross_sight(inputs)
            x, sight = self._begin(name, own, noise.get(name))
            hidden[name] = stack(
                x,
                sight=sight,
                noise=noise.get(name),
                encoded=encoded,
                cross_sight=cross_sight,
            )
        if self.pooler is not None:
            hidden["pooled"] = self.pooled(hidden)
        return hidden

    def start(self, inputs: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, Past]:
        """Begin decoding after prompts `tokens` (B, L): the hidden states (B, D) of their last
        tokens, and what is kept. To be called eagerly, since it makes variables."""
        spec, tokens, blocks = self.spec, inputs["tokens"], self.stacks["decoder"].blocks
        crosses, mask = [None] * len(blocks), None
        if "encoder" in self.stacks:
            own = self._own(inputs, "encoder")
            x, sight = self._begin("encoder", own, None)
            encoded = self.stacks["encoder"](x, sight=sight)
            crosses = [block.cross_attention.remember(encoded) for block in blocks]
            if "blocks" in own:
                mask = _mask(own["blocks"][:, None] == 1, self.dtype)
        shape = (2, len(tokens), spec.key_value_count, spec.context, spec.head_width)
        caches = [Cache(tf.Variable(tf.zeros(shape, self.dtype)), cross) for cross in crosses]
        return self._feed(tokens, Past(caches, mask, tf.constant(0)), inputs.get("prefix"))

    def next(self, tokens_B: tf.Tensor, past: Past) -> tuple[tf.Tensor, Past]:
        """Feed one token a row; what `start` gives."""
        return self._feed(tokens_B[:, None], past)

    def pooled(self, hidden: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """What the pooler makes of the last stack's first tokens, (B, D), no half."""
        x = tf.tanh(full(self.pooler(hidden[list(self.stacks)[-1]][:, 0])))
        record("pooled", x)
        return x

    def features(
        self,
        hidden: Mapping[str, tf.Tensor],
        head: str = "lm",
        positions_BP: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """What a head's product takes: (B, L, D), or (B, P, D) with `positions`, or (B, D) of a
        head over sequences."""
        x = hidden[list(self.stacks)[-1]]
        if self._over.get(head) == "sequence":
            return self.head(head)(hidden.get("pooled", x[:, 0]))
        if positions_BP is not None:
            x = tf.gather(x, positions_BP, batch_dims=1)
        return self.head(head)(x)

    def head(self, name: str) -> Head:
        """The output head `name`."""
        return self.heads[name]

    def head_kernel(self, head: str) -> tf.Tensor:
        """The (D, V) kernel of an output head: the transposed embedding where they are tied."""
        kernel = self.head(head).kernel
        if kernel is None:
            return tf.transpose(self.embeddings.tokens)
        return tf.convert_to_tensor(kernel)

    def head_bias(self, head: str) -> tf.Tensor | None:
        """The (V,) bias of an output head, if it has one."""
        bias = self.head(head).bias
        return None if bias is None else tf.convert_to_tensor(bias)

    def logits(self, features: tf.Tensor, head: str = "lm") -> tf.Tensor:
        """(…, D) to (…, V), no half."""
        logits = full(linear(features, self.head_kernel(head), None, self.half))
        bias = self.head_bias(head)
        return logits if bias is None else logits + bias

    def _own(self, inputs, stack: str) -> dict[str, tf.Tensor]:
        """Those of the inputs that one stack gets, by their names there."""
        if stack == "decoder" or len(self.stacks) == 1:
            return dict(inputs)
        own = {
            name.removeprefix("source_"): value
            for name, value in inputs.items()
            if name.startswith("source_")
        }
        return {**own, "tokens": inputs["source"]}

    def _cross_sight(self, inputs) -> Sight:
        """What decoder tokens see of the encoder's."""
        blocks, source_blocks = inputs.get("blocks"), inputs.get("source_blocks")
        if blocks is None and source_blocks is None:
            return Sight()
        one, other = (
            tf.ones_like(inputs[name]) if numbers is None else numbers
            for name, numbers in (("tokens", blocks), ("source", source_blocks))
        )
        return _crossing(_mask(one[:, :, None] == other[:, None, :], self.dtype))

    def _begin(self, stack: str, own, noise) -> tuple[tf.Tensor, Sight]:
        """The embeddings of a stack's own inputs, and what its tokens see."""
        tokens, positions = own["tokens"], own.get("positions")
        source = stack == "encoder" and len(self.stacks) > 1
        site = "source_embeddings" if source else "embeddings"
        x = self.embeddings(tokens, noise, positions, own.get("segments"), site=site)
        length, blocks, prefix = tokens.shape[1], own.get("blocks"), own.get("prefix")
        return x, self.stacks[stack].sight(length, blocks, prefix, positions)

    def _feed(self, tokens, past: Past, prefix=None) -> tuple[tf.Tensor, Past]:
        decoder, length, start = self.stacks["decoder"], tokens.shape[1], past.start
        x = self.embeddings(tokens, None, start=start)
        sight, cross_sight = decoder.sight(length, prefix=prefix, start=start), Sight()
        if past.cross_mask is not None:
            cross_sight = _crossing(tf.repeat(past.cross_mask, length, axis=1))
        known = {"cross_sight": cross_sight, "caches": past.caches}
        x = decoder(x, sight=sight, **known, start=start)
        return x[:, -1], past._replace(start=start + length)


def _crossing(mask: tf.Tensor) -> Sight:
    """With a mask under which a query may see nothing."""
    seeing = tf.reduce_max(mask, -1, keepdims=True) > UNSEEN
    return Sight(mask=mask, seeing=tf.cast(seeing, mask.dtype))
