"""The layers of the Transformer. Shape letters: B batch, L queries, M keys, D width, H heads,
K head width, F feed-forward width, V vocabulary."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from horovod_lm.activations import record, record_rows
from horovod_lm.randomness import MULTIPLIER, threshold
from horovod_lm.spec import ModelSpec, sinusoidal_positions
from torch_backend.precision import (
    FULL_TYPES,
    HALF_TYPES,
    cast,
    full,
    linear,
    operand,
    product,
)
from torch_backend.profiler import scope

ROW_BLOCK = 64  # query rows of one block of attention; later keys than its last row are skipped

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Words(NamedTuple):
    """`horovod_lm.randomness.DropoutWords` as tensors."""

    residual_rows: torch.Tensor | None
    residual_columns: torch.Tensor | None
    attention_rows: torch.Tensor | None
    attention_columns: torch.Tensor | None


class Native(NamedTuple):
    """The framework's own dropout: `seed` starts its generator at the beginning of a forward."""

    seed: int


Noise = Words | Native


def keep_mask(rows: torch.Tensor, columns: torch.Tensor, rate: float) -> torch.Tensor:
    """The shared dropout mask: int32 of shape rows.shape + columns.shape, with all bits set (-1)
    where an element is kept and none (0) where it is dropped."""
    mixed = rows[..., None] ^ columns
    # Comparing into integers and masking bits took a quarter of the time of booleans.
    return mixed.mul_(MULTIPLIER).ge_(threshold(rate)).neg_()


def _masked(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """`x` where `keep` is -1, and 0 where it is 0."""
    if x.dtype is torch.float32:
        return (x.view(torch.int32) & keep).view(torch.float32)
    return x * -keep


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keep, rate):
        ctx.save_for_backward(keep)
        ctx.boost = 1 / (1 - rate)
        return _masked(x, keep).mul_(ctx.boost)

    @staticmethod
    def backward(ctx, gradient):
        (keep,) = ctx.saved_tensors
        return _masked(gradient, keep).mul_(ctx.boost), None, None


@scope("dropout")
def dropout(x: torch.Tensor, noise: Noise | None, site: int, rate: float) -> torch.Tensor:
    """Dropout on the residual stream, (B, L, D), at one site; the identity without noise."""
    if noise is None or not rate:
        return x
    if isinstance(noise, Native):
        return F.dropout(x, rate)
    keep = keep_mask(noise.residual_rows[site], noise.residual_columns[site], rate)
    return _Dropout.apply(x, keep, rate)


def _bmm(a, b, factor: float, half: torch.dtype | None) -> torch.Tensor:
    """`factor * (a @ b)` of operands in three dimensions, in the full type, the product rounded to
    the type of products."""
    if half is None:  # the factor costs nothing inside
        return a.new_empty(*a.shape[:2], b.shape[2]).baddbmm_(a, b, beta=0, alpha=factor)
    return full(cast(torch.bmm(a, b), half)).mul_(factor)


def _add_bmm(total, a, b, factor: float, half: torch.dtype | None) -> None:
    """Add what `_bmm` gives to `total`."""
    if half is None:
        total.baddbmm_(a, b, alpha=factor)
    else:
        total.add_(_bmm(a, b, factor, half))


def _boosted(x, boost: float, half: torch.dtype | None) -> tuple[torch.Tensor, float]:
    """`x` as an operand of products, and the factor of theirs that it still wants."""
    return (x, boost) if half is None else (operand(x * boost, half), 1.0)


class _CausalAttention(torch.autograd.Function):
    """Causal attention of `ROW_BLOCK` query rows at a time, so that keys after a block are never
    touched, with probabilities kept for the backward.

    With p = softmax(s), m = keep / (1 - rate), o = (p m) v and g = dL/do:
    dv = (p m)^T g and ds = p (m (g v^T) - rowsum(g o)), since rowsum(p m (g v^T)) = rowsum(g o).
    The factors `scale` and `boost` are taken into the products; a half wants `boost` before them.
    """

    @staticmethod
    def forward(ctx, query, key, value, noise, rate, heads, site, half):
        length, width = query.shape[1:]
        ctx.scale, ctx.boost, ctx.half = 1 / math.sqrt(width), 1 / (1 - rate), half
        if isinstance(noise, Words):
            rows = noise.attention_rows[site].reshape(-1, length)
            columns = noise.attention_columns[site]
        output = torch.empty_like(query)
        query, key, value = (operand(x, half) for x in (query, key, value))
        block = min(ROW_BLOCK, length)
        ctx.blocks = []
        for start in range(0, length, ROW_BLOCK):
            end = min(start + ROW_BLOCK, length)
            keys = key[:, :end].transpose(1, 2)
            scores = _bmm(query[:, start:end], keys, ctx.scale, half)
            if not start:
                triangle = scores.new_full((block, block), -math.inf).triu_(1)
            scores[:, :, start:].add_(triangle[: end - start, : end - start])
            record_rows("attention.scores", scores, start, heads, site)
            probabilities = dropped = torch.softmax(scores, -1)
            record_rows("attention.probabilities", probabilities, start, heads, site)
            keep = None
            if isinstance(noise, Native):
                keep = torch.empty_like(scores, dtype=torch.int32).bernoulli_(1 - rate).neg_()
            elif noise is not None:
                keep = keep_mask(rows[:, start:end], columns[:end], rate)
            if keep is not None:
                dropped = _masked(probabilities, keep)
                record_rows("attention.dropped", dropped, start, heads, site, ctx.boost)
            dropped, boost = _boosted(dropped, ctx.boost, half)
            output[:, start:end] = _bmm(dropped, value[:, :end], boost, half)
            ctx.blocks.append((probabilities, keep))
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output = ctx.saved_tensors
        length, half = query.shape[1], ctx.half
        inner_sum = (full(gradient) * full(output)).sum(-1, keepdim=True).mul_(ctx.scale)
        d_query = torch.empty_like(output)
        d_key, d_value = (torch.zeros_like(x, dtype=inner_sum.dtype) for x in (key, value))
        gradient = operand(gradient, half)
        for start, (probabilities, keep) in zip(
            range(0, length, ROW_BLOCK), ctx.blocks, strict=True
        ):
            end = min(start + ROW_BLOCK, length)
            part, values = gradient[:, start:end], value[:, :end].transpose(1, 2)
            d_scores = _bmm(part, values, ctx.scale * ctx.boost, half)
            dropped = probabilities
            if keep is not None:
                d_scores, dropped = _masked(d_scores, keep), _masked(dropped, keep)
            dropped, boost = _boosted(dropped, ctx.boost, half)
            _add_bmm(d_value[:, :end], dropped.transpose(1, 2), part, boost, half)
            d_scores.sub_(inner_sum[:, start:end]).mul_(probabilities)
            d_scores = operand(d_scores, half)
            d_query[:, start:end] = _bmm(d_scores, key[:, :end], 1, half)
            _add_bmm(d_key[:, :end], d_scores.transpose(1, 2), query[:, start:end], 1, half)
        return d_query, cast(d_key, half), cast(d_value, half), *[None] * 5


@scope("attention")
def attention(
    query_BHLK: torch.Tensor,
    key_BHMK: torch.Tensor,
    value_BHMK: torch.Tensor,
    noise: Noise | None,
    site: int,
    rate: float,
    half: torch.dtype | None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v, causal: query i sees the keys up to M - L + i. (B, H, L, K).

    With noise the probabilities are dropped by the mask of layer `site`. Queries beside a cache
    take the plain form, which knows no noise.
    """
    batch, heads, length, width = query_BHLK.shape
    if length == key_BHMK.shape[2]:
        flat = [x.reshape(batch * heads, length, width) for x in (query_BHLK, key_BHMK, value_BHMK)]
        noise, rate = (noise, rate) if rate and noise is not None else (None, 0.0)
        output = _CausalAttention.apply(*flat, noise, rate, heads, site, half)
        return output.view_as(query_BHLK)
    scores_BHLM = full(product(query_BHLK, key_BHMK.transpose(2, 3), half)) / math.sqrt(width)
    later = torch.ones(scores_BHLM.shape[2:], dtype=torch.bool, device=scores_BHLM.device)
    later = later.triu_(1 + scores_BHLM.shape[3] - length)
    probabilities = torch.softmax(scores_BHLM.masked_fill(later, -math.inf), -1)
    return product(probabilities, value_BHMK, half)


def _parameter(precision: str, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=FULL_TYPES[precision]))


class Embeddings(nn.Module):
    """Token embeddings plus positions, then (post-norm only) a norm, then dropout: (B, L) int
    to (B, L, D)."""

    def __init__(self, spec: ModelSpec, precision: str) -> None:
        super().__init__()
        self.spec = spec
        self.tokens = _parameter(precision, spec.vocabulary, spec.width)
        if spec.positions == "learned":
            self.positions = _parameter(precision, spec.context, spec.width)
        else:
            table = torch.from_numpy(sinusoidal_positions(spec)).to(FULL_TYPES[precision])
            self.register_buffer("positions", table, persistent=False)
        self.norm = LayerNorm(spec, precision) if spec.norm_placement == "post" else None

    @scope("embeddings")
    def forward(self, tokens_BL: torch.Tensor, noise: Noise | None, start: int = 0) -> torch.Tensor:
        """`start` is the position of the first token."""
        x = F.embedding(tokens_BL, self.tokens)
        if self.spec.embedding_scale != 1:
            x = x * self.spec.embedding_scale
        x = x + self.positions[start : start + tokens_BL.shape[1]]
        record("embeddings.sum", x)
        if self.norm is not None:
            x = self.norm(x)
            record("embeddings.norm", x)
        x = dropout(x, noise, 0, self.spec.dropout)
        record("embeddings", x)
        return x


class LayerNorm(nn.Module):
    """Layer normalisation over the width (Ba et al., 2016), never in a half."""

    def __init__(self, spec: ModelSpec, precision: str) -> None:
        super().__init__()
        self.epsilon = spec.norm_epsilon
        self.scale = _parameter(precision, spec.width)
        self.bias = _parameter(precision, spec.width) if spec.bias else None

    @scope("norm")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) to (…, D)."""
        return F.layer_norm(x, self.scale.shape, self.scale, self.bias, self.epsilon)


class Linear(nn.Module):
    """`x @ kernel + bias`, kernel (inputs, outputs)."""

    def __init__(self, spec: ModelSpec, inputs: int, outputs: int, precision: str) -> None:
        super().__init__()
        self.half = HALF_TYPES[precision]
        self.kernel = _parameter(precision, inputs, outputs)
        self.bias = _parameter(precision, outputs) if spec.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, inputs) to (…, outputs), in the type of products."""
        return linear(x, self.kernel, self.bias, self.half)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al., 2017) with one fused product for query,
    key and value. A key's bias exists only where the spec asks for it: softmax cancels it."""

    def __init__(self, spec: ModelSpec, precision: str, site: int) -> None:
        super().__init__()
        self.spec, self.half, self.site = spec, HALF_TYPES[precision], site
        width = spec.width
        self.qkv_kernel = _parameter(precision, width, 3 * width)
        self.query_bias = _parameter(precision, width) if spec.bias else None
        self.key_bias = _parameter(precision, width) if spec.key_bias else None
        self.value_bias = _parameter(precision, width) if spec.bias else None
        self.output = Linear(spec, width, width, precision)

    @scope("attention")
    def forward(
        self,
        x: torch.Tensor,
        noise: Noise | None,
        cache: torch.Tensor | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """(B, L, D) to (B, L, D). `cache` (2, B, H, context, K) holds keys and values of the
        positions before `start`, and receives those of `x`."""
        batch, length, width = x.shape
        zeros = torch.zeros_like(x[0, 0])
        biases = [b if b is not None else zeros for b in self._biases()]
        qkv = linear(x, self.qkv_kernel, torch.cat(biases), self.half)
        qkv = qkv.view(batch, length, 3, self.spec.heads, self.spec.head_width)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        for name, part in (("query", query), ("key", key), ("value", value)):
            record(f"attention.{name}", part, self.site)
        if cache is not None:
            cache[0, :, :, start : start + length] = key
            cache[1, :, :, start : start + length] = value
            key, value = cast(cache[:, :, :, : start + length], self.half).unbind(0)
        rate = self.spec.attention_dropout
        mixed = attention(query, key, value, noise, self.site, rate, self.half)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        record("attention.mixed", mixed, self.site)
        output = self.output(mixed)
        record("attention.output", output, self.site)
        return output

    def _biases(self) -> tuple[torch.Tensor | None, ...]:
        return self.query_bias, self.key_bias, self.value_bias


class FeedForward(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, spec: ModelSpec, precision: str, site: int) -> None:
        super().__init__()
        self.site = site
        self.up = Linear(spec, spec.width, spec.inner_width, precision)
        self.down = Linear(spec, spec.inner_width, spec.width, precision)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) to (B, L, D)."""
        x = self.up(x)
        record("feed_forward.up", x, self.site)
        x = self.activation(x)
        record("feed_forward.activation", x, self.site)
        x = self.down(x)
        record("feed_forward.down", x, self.site)
        return x


class Block(nn.Module):
    """Attention and feed-forward, each on a residual branch with dropout; the norm stands before
    the branch ("pre") or after the sum ("post")."""

    def __init__(self, spec: ModelSpec, precision: str, index: int) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        self.attention_norm = LayerNorm(spec, precision)
        self.attention = Attention(spec, precision, index)
        self.feed_forward_norm = LayerNorm(spec, precision)
        self.feed_forward = FeedForward(spec, precision, index)

    def forward(
        self,
        x: torch.Tensor,
        noise: Noise | None,
        cache: torch.Tensor | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """(B, L, D) to (B, L, D), no half; see `Attention` for `cache` and `start`."""
        rate, site = self.spec.dropout, 1 + 2 * self.index
        pre = self.spec.norm_placement == "pre"
        branch = self._norm("attention", x) if pre else x
        branch = self.attention(branch, noise, cache, start)
        x = x + dropout(full(branch), noise, site, rate)
        record("attention.residual", x, self.index)
        x = x if pre else self._norm("attention", x)
        branch = self.feed_forward(self._norm("feed_forward", x) if pre else x)
        x = x + dropout(full(branch), noise, site + 1, rate)
        record("feed_forward.residual", x, self.index)
        return x if pre else self._norm("feed_forward", x)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = getattr(self, f"{name}_norm")(x)
        record(f"{name}_norm", x, self.index)
        return x
