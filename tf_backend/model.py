"""The Transformer of a `ModelSpec`."""

from __future__ import annotations

import keras
import tensorflow as tf

from horovod_lm.activations import record
from horovod_lm.spec import ModelSpec
from tf_backend.layers import Block, Embeddings, LayerNorm, Noise
from tf_backend.precision import FULL_TYPES, HALF_TYPES, full, linear


class Transformer(keras.Model):
    """A decoder: embeddings, blocks and (pre-norm only) a last norm; the head is applied apart,
    since training does it together with the loss."""

    def __init__(self, spec: ModelSpec, precision: str) -> None:
        super().__init__(name="transformer", dtype=FULL_TYPES[precision].name, autocast=False)
        self.spec, self.half = spec, HALF_TYPES[precision]
        self.embeddings = Embeddings(spec, precision)
        self.decoder = [Block(spec, precision, i) for i in range(spec.layers)]
        self.norm = None
        if spec.norm_placement == "pre":
            self.norm = LayerNorm(spec, precision, name="norm")

    def build(self, input_shape=None) -> None:
        self.embeddings.build()
        for block in self.decoder:
            block.build()
        if self.norm is not None:
            self.norm.build()
        if not self.spec.tied:
            shape = (self.spec.width, self.spec.vocabulary)
            self.lm_kernel = self.add_weight(shape=shape, initializer="zeros", name="lm_kernel")

    def call(
        self,
        tokens_BL: tf.Tensor,
        noise: Noise | None = None,
        caches: list[tf.Variable] | None = None,
        start: tf.Tensor | int = 0,
    ) -> tf.Tensor:
        """Hidden states (B, L, D), no half. `caches`, for each layer (2, B, H, context, K), and
        `start` are for decoding: the tokens' first position, with keys and values of earlier
        ones."""
        x = self.embeddings(tokens_BL, noise, start=start)
        for index, block in enumerate(self.decoder):
            x = block(x, noise, None if caches is None else caches[index], start=start)
        if self.norm is not None:
            x = self.norm(x)
            record("decoder.norm", x)
        return x

    def head_kernel(self, head: str) -> tf.Tensor:
        """The (D, V) kernel of an output head: the transposed embedding where they are tied."""
        if self.spec.tied:
            return tf.transpose(self.embeddings.tokens)
        return tf.convert_to_tensor(self.lm_kernel)

    def logits(self, hidden: tf.Tensor) -> tf.Tensor:
        """(…, D) to (…, V), no half."""
        return full(linear(hidden, self.head_kernel("lm"), None, self.half))
