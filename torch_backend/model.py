"""The Transformer of a `ModelSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from horovod_lm.activations import record
from horovod_lm.spec import ModelSpec, alibi_slopes, relative_buckets, rotary_tables
from torch_backend.layers import (
    ACTIVATIONS,
    UNSEEN,
    Block,
    Cache,
    Embeddings,
    Linear,
    Native,
    Noise,
    Norm,
    Sight,
)
from torch_backend.precision import FULL_TYPES, HALF_TYPES, full, product

Inputs = Mapping[str, torch.Tensor]


class _ByDistance(torch.autograd.Function):
    """From a value for each distance, (H, L + M - 1) with that of query i and key j at
    j - i + L - 1, to (H, L, M)."""

    @staticmethod
    def forward(ctx, values, queries):
        keys = values.shape[1] - queries + 1
        return values.unfold(1, keys, 1).flip(1)

    @staticmethod
    def backward(ctx, gradient):
        # Rows that are one longer than there are distances: read as if they were not, each lies one
        # place further right than the one above, and the last query's is the first.
        heads, queries, keys = gradient.shape
        wide = gradient.new_zeros(heads, queries, queries + keys)
        wide[:, :, :keys] = gradient.flip(1)
        skewed = wide.flatten(1)[:, :-queries].view(heads, queries, queries + keys - 1)
        return skewed.sum(1), None


class Stack(nn.Module):
    """The blocks of an encoder or a decoder, what positions do in them, and (pre-norm only) a last
    norm."""

    def __init__(self, spec: ModelSpec, precision: str, name: str, recompute: bool = False) -> None:
        super().__init__()
        self.spec, self.name, self.recompute = spec, name, recompute
        self.dtype = FULL_TYPES[precision]
        self.blocks = [Block(spec, precision, name, i) for i in range(spec.stacks[name])]
        for index, block in enumerate(self.blocks):
            self.add_module(str(index), block)
        if spec.positions == "rotary":
            for kind, table in zip(("cosines", "sines"), rotary_tables(spec), strict=True):
                self._constant(kind, table)
        if spec.positions == "alibi":
            self._constant("slopes", alibi_slopes(spec.heads))
        if spec.positions == "relative":
            shape = (spec.relative_buckets, spec.heads)
            self.relative_bias = nn.Parameter(torch.zeros(shape, dtype=self.dtype))
            # Of the distances from 1 - context to context - 1.
            last = spec.context - 1
            buckets = relative_buckets(spec, name, range(last, last + 1), range(2 * last + 1))[0]
            self.register_buffer("buckets", torch.from_numpy(buckets), persistent=False)
        self.norm = Norm(spec, precision) if spec.norm_placement == "pre" else None

    def sight(
        self,
        length: int,
        blocks: torch.Tensor | None = None,
        prefix: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        start: int = 0,
    ) -> Sight:
        """What attention of this stack to itself is told, for queries from `start` and all keys up
        to the last of them. The rest is (B, L); see `horovod_lm.backend.MicroBatch`."""
        causal, seen = self.name == "decoder", None
        if blocks is not None:
            seen = blocks[:, :, None] == blocks[:, None, :]
        if causal and prefix is not None:
            before = torch.ones(length, length, dtype=torch.bool, device=prefix.device).tril_()
            open_to = before | (prefix[:, None, :] != 0)
            causal, seen = False, open_to if seen is None else seen & open_to
        rotary = None
        if self.spec.positions == "rotary":
            rotary = self._rotary(length, positions, start)
        mask = None if seen is None else _mask(seen, self.dtype)
        return Sight(causal, mask, None, self._bias(length, start), rotary)

    def forward(
        self,
        x: torch.Tensor,
        sight: Sight,
        noise: Noise | None = None,
        encoded: torch.Tensor | None = None,
        cross_sight: Sight | None = None,
        caches: list[Cache] | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """(B, L, D) to (B, L, D), no half; see `Block`."""
        for index, block in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            given = (x, sight, noise, encoded, cross_sight, cache, start)
            if self.recompute and torch.is_grad_enabled():
                # The shared dropout is the same again without a generator's state.
                keep_state = isinstance(noise, Native)
                x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=keep_state)
            else:
                x = block(*given)
        if self.norm is not None:
            x = self.norm(x)
            record(f"{self.name}.norm", x)
        return x

    def _constant(self, name: str, array: np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(array).to(self.dtype), persistent=False)

    def _rotary(self, length: int, positions: torch.Tensor | None, start: int):
        if positions is None:
            rows = slice(start, start + length)
            return self.cosines[rows][None, None], self.sines[rows][None, None]
        return self.cosines[positions][:, None], self.sines[positions][:, None]

    def _bias(self, length: int, start: int) -> torch.Tensor | None:
        """(H, L, M), M = start + L, by the distance of a key from a query."""
        first, last = 1 - start - length, length - 1
        if self.spec.positions == "alibi":
            distances = torch.arange(first, last + 1, device=self.slopes.device)
            values = self.slopes[:, None] * -distances.abs().to(self.dtype)
        elif self.spec.positions == "relative":
            middle = self.spec.context - 1
            rows = self.buckets[middle + first : middle + last + 1]
            values = nn.functional.embedding(rows, self.relative_bias).t()
        else:
            return None
        return _ByDistance.apply(values, length)


def _mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, UNSEEN)


class Head(nn.Module):
    """An output: the language model's, "lm", or a task's. Its product is made apart, since training
    makes it together with the loss. `kernel` (D, outputs), None where it is the token embedding;
    `bias` (outputs,) or None."""

    def __init__(self, spec: ModelSpec, precision: str, name: str) -> None:
        super().__init__()
        self.spec, self.name = spec, name
        outputs = {"lm": spec.vocabulary} | {task.name: task.outputs for task in spec.task_heads}
        dtype, lm = FULL_TYPES[precision], name == "lm"
        self.kernel = self.bias = self.transform = None
        if lm and spec.head_transform:
            self.transform = Linear(spec.width, spec.width, True, precision)
            self.norm = Norm(spec, precision)
            self.activation = ACTIVATIONS[spec.activation]
        if not (lm and spec.tied):
            shape = (spec.width, outputs[name])
            self.kernel = nn.Parameter(torch.zeros(shape, dtype=dtype))
        if not lm or spec.head_bias:
            self.bias = nn.Parameter(torch.zeros(outputs[name], dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What goes into the product, (…, D) to (…, D)."""
        if self.name != "lm":
            return x
        if self.spec.output_scale != 1:
            x = x * self.spec.output_scale
        if self.transform is not None:
            x = self.transform(x)
            record("heads.lm.transform", x.flatten(0, -2))
            x = self.activation(x)
            record("heads.lm.activation", x.flatten(0, -2))
            x = self.norm(full(x))
            record("heads.lm.norm", x.flatten(0, -2))
        return x


class Past(NamedTuple):
    """What decoding goes on from: the caches of the decoder's blocks, the mask (B, 1, M) of
    attention to the encoder, and the number of tokens so far."""

    caches: list[Cache]
    cross_mask: torch.Tensor | None
    start: int


class Transformer(nn.Module):
    """Embeddings, an encoder or a decoder or both, and heads. Inputs are named as in
    `horovod_lm.backend.MicroBatch`."""

    def __init__(self, spec: ModelSpec, precision: str, recompute: bool = False) -> None:
        super().__init__()
        self.spec, self.half = spec, HALF_TYPES[precision]
        self.embeddings = Embeddings(spec, precision)
        for name in spec.stacks:
            self.add_module(name, Stack(spec, precision, name, recompute))
        self.pooler = Linear(spec.width, spec.width, True, precision) if spec.pooler else None
        # Not in a module of their own, whose attributes would forbid names such as "type".
        for name in ("lm", *(task.name for task in spec.task_heads)):
            self.add_module(f"{name}_head", Head(spec, precision, name))

    def forward(
        self, inputs: Inputs, noise: Mapping[str, Noise] | None = None
    ) -> dict[str, torch.Tensor]:
        """Hidden states by stack, (B, L, D), no half, and `pooled` where there is a pooler."""
        noise, hidden = noise or {}, {}
        for name in self.spec.stacks:
            encoded = hidden.get("encoder")
            cross_sight = None if encoded is None else self._cross_sight(inputs)
            x, sight = self._begin(name, inputs, noise.get(name))
            stack = getattr(self, name)
            hidden[name] = stack(x, sight, noise.get(name), encoded, cross_sight)
        if self.pooler is not None:
            hidden["pooled"] = self.pooled(hidden)
        return hidden

    def start(self, inputs: Inputs) -> tuple[torch.Tensor, Past]:
        """Hidden states (B, D) of the last place of prompts, and what decoding goes on from."""
        spec, tokens = self.spec, inputs["tokens"]
        x, sight = self._begin("decoder", inputs, None)
        shape = (2, len(tokens), spec.key_value_count, spec.context, spec.head_width)
        encoded = cross_sight = None
        if "encoder" in spec.stacks:
            source, source_sight = self._begin("encoder", inputs, None)
            encoded = self.encoder(source, source_sight)
            cross_sight = self._cross_sight(inputs)
        caches = [
            Cache(
                x.new_zeros(shape),
                None if encoded is None else block.cross_attention.remember(encoded),
            )
            for block in self.decoder.blocks
        ]
        x = self.decoder(x, sight, None, None, cross_sight, caches)
        cross_mask = None
        if cross_sight is not None and cross_sight.mask is not None:
            cross_mask = cross_sight.mask[:, -1:]
        return x[:, -1], Past(caches, cross_mask, tokens.shape[1])

    def next(self, tokens_B: torch.Tensor, past: Past) -> tuple[torch.Tensor, Past]:
        """The same after one more token a row."""
        x = self.embeddings(tokens_B[:, None], None, start=past.start)
        sight, cross_sight = self.decoder.sight(1, start=past.start), Sight(mask=past.cross_mask)
        x = self.decoder(x, sight, None, None, cross_sight, past.caches, past.start)
        return x[:, -1], past._replace(start=past.start + 1)

    def pooled(self, hidden: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the pooler makes of the last stack's first tokens, (B, D), no half."""
        x = torch.tanh(full(self.pooler(hidden[list(self.spec.stacks)[-1]][:, 0])))
        record("pooled", x)
        return x

    def features(
        self,
        hidden: Mapping[str, torch.Tensor],
        head: str = "lm",
        positions_BP: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What goes into a head's product: (B, L, D), or (B, P, D) of these positions only; (B, D)
        for a head over sequences."""
        x = hidden[list(self.spec.stacks)[-1]]
        if any(task.name == head and task.over == "sequence" for task in self.spec.task_heads):
            return self.head(head)(hidden.get("pooled", x[:, 0]))
        if positions_BP is not None:
            batch, length, width = x.shape
            first = length * torch.arange(batch, device=x.device)[:, None]
            x = x.reshape(-1, width).index_select(0, (positions_BP + first).flatten())
            x = x.view(*positions_BP.shape, width)
        return self.head(head)(x)

    def head(self, name: str) -> Head:
        """The output of this name."""
        return getattr(self, f"{name}_head")

    def head_kernel(self, head: str) -> torch.Tensor:
        """The (D, outputs) kernel of a head: the transposed embedding where they are tied."""
        kernel = self.head(head).kernel
        return self.embeddings.tokens.t() if kernel is None else kernel

    def head_bias(self, head: str) -> torch.Tensor | None:
        """The (outputs,) bias of a head, or None."""
        return self.head(head).bias

    def logits(self, features: torch.Tensor, head: str = "lm") -> torch.Tensor:
        """(…, D) to (…, outputs), no half."""
        logits, bias = (
            full(product(features, self.head_kernel(head), self.half)),
            self.head_bias(head),
        )
        return logits if bias is None else logits + bias

    def _begin(self, stack: str, inputs: Inputs, noise: Noise | None) -> tuple[torch.Tensor, Sight]:
        """The embedded tokens of a stack, and what its attention is told."""
        if isinstance(noise, Native):
            torch.manual_seed(noise.seed)
        source = stack == "encoder" and len(self.spec.stacks) > 1
        tokens = inputs["source" if source else "tokens"]
        blocks, positions, segments = (
            inputs.get(f"source_{name}" if source else name)
            for name in ("blocks", "positions", "segments")
        )
        site = "source_embeddings" if source else "embeddings"
        x = self.embeddings(tokens, noise, positions, segments, 0, site)
        prefix = None if source else inputs.get("prefix")
        return x, getattr(self, stack).sight(tokens.shape[1], blocks, prefix, positions)

    def _cross_sight(self, inputs: Inputs) -> Sight:
        """What the decoder's attention to the encoder is told."""
        blocks, source_blocks = inputs.get("blocks"), inputs.get("source_blocks")
        if blocks is None and source_blocks is None:
            return Sight()
        blocks = torch.ones_like(inputs["tokens"]) if blocks is None else blocks
        if source_blocks is None:
            source_blocks = torch.ones_like(inputs["source"])
        seen = blocks[:, :, None] == source_blocks[:, None, :]
        dtype = self.embeddings.tokens.dtype
        return Sight(mask=_mask(seen, dtype), seeing=seen.any(-1, keepdim=True).to(dtype))
