"""The layers of the Transformer. Shape letters: B batch, L queries, M keys, D width, H heads,
K head width, F feed-forward width, V vocabulary."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from horovod_lm.randomness import MULTIPLIER, threshold
from horovod_lm.spec import ModelSpec, sinusoidal_positions
from torch_backend.precision import FULL_TYPES, HALF_TYPES, cast, full, linear, product
from torch_backend.profiler import scope
from torch_backend.trace import record, record_rows

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
    """The shared dropout mask: bool of shape rows.shape + columns.shape."""
    mixed = rows[..., None] ^ columns
    return mixed.mul_(MULTIPLIER) >= threshold(rate)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keep, rate):
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - rate)
        # The name says backward, but the operation is x * keep * scale in one pass.
        return torch.ops.aten.native_dropout_backward(x, keep, ctx.scale)

    @staticmethod
    def backward(ctx, gradient):
        (keep,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(gradient, keep, ctx.scale), None, None


@scope("dropout")
def dropout(x: torch.Tensor, noise: Noise | None, site: int, rate: float) -> torch.Tensor:
    """Dropout on the residual stream, (B, L, D), at one site; the identity without noise."""
    if noise is None or not rate:
        return x
    if isinstance(noise, Native):
        return F.dropout(x, rate)
    keep = keep_mask(noise.residual_rows[site], noise.residual_columns[site], rate)
    return _Dropout.apply(x, keep, rate)


class _CausalAttention(torch.autograd.Function):
    """Causal attention of `ROW_BLOCK` query rows at a time, so that keys after a block are never
    touched, with probabilities kept for the backward.

    With p = softmax(s), m = keep / (1 - rate), o = (p m) v and g = dL/do:
    dv = (p m)^T g and ds = p (m (g v^T) - rowsum(g o)), since rowsum(p m (g v^T)) = rowsum(g o).
    """

    @staticmethod
    def forward(ctx, query, key, value, noise, rate, heads, site):
        length, width = query.shape[1:]
        scale, boost = 1 / math.sqrt(width), 1 / (1 - rate)
        if isinstance(noise, Words):
            rows = noise.attention_rows[site].reshape(-1, length)
            columns = noise.attention_columns[site]
        output = torch.empty_like(query)
        block = min(ROW_BLOCK, length)
        triangle = query.new_full((block, block), -math.inf).triu_(1)
        saved = []
        for start in range(0, length, ROW_BLOCK):
            end = min(start + ROW_BLOCK, length)
            scores = torch.bmm(query[:, start:end], key[:, :end].transpose(1, 2)).mul_(scale)
            scores[:, :, start:].add_(triangle[: end - start, : end - start])
            record_rows("attention.scores", scores, start, heads, site)
            probabilities = torch.softmax(scores, -1)
            record_rows("attention.probabilities", probabilities, start, heads, site)
            dropped, keep = probabilities, None
            if isinstance(noise, Native):
                dropped, keep = torch.native_dropout(probabilities, rate, True)
            elif noise is not None:
                keep = keep_mask(rows[:, start:end], columns[:end], rate)
                dropped = torch.ops.aten.native_dropout_backward(probabilities, keep, boost)
            if keep is not None:
                record_rows("attention.dropped", dropped, start, heads, site)
            torch.bmm(dropped, value[:, :end], out=output[:, start:end])
            saved.append((probabilities, keep))
        ctx.save_for_backward(query, key, value, output)
        ctx.blocks, ctx.scale, ctx.boost = saved, scale, boost
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output = ctx.saved_tensors
        length = query.shape[1]
        inner_sum = (gradient * output).sum(-1, keepdim=True)
        d_query, d_key, d_value = torch.empty_like(query), *map(torch.zeros_like, (key, value))
        for start, (probabilities, keep) in zip(
            range(0, length, ROW_BLOCK), ctx.blocks, strict=True
        ):
            end = min(start + ROW_BLOCK, length)
            part = gradient[:, start:end]
            d_scores = torch.bmm(part, value[:, :end].transpose(1, 2))
            dropped = probabilities
            if keep is not None:
                mask_times = torch.ops.aten.native_dropout_backward
                d_scores = mask_times(d_scores, keep, ctx.boost)
                dropped = mask_times(probabilities, keep, ctx.boost)
            d_value[:, :end].baddbmm_(dropped.transpose(1, 2), part)
            d_scores.sub_(inner_sum[:, start:end]).mul_(probabilities).mul_(ctx.scale)
            torch.bmm(d_scores, key[:, :end], out=d_query[:, start:end])
            d_key[:, :end].baddbmm_(d_scores.transpose(1, 2), query[:, start:end])
        return d_query, d_key, d_value, *[None] * 4


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

    With noise the probabilities are dropped by the mask of layer `site`. A half, and queries beside
    a cache, take the plain form.
    """
    batch, heads, length, width = query_BHLK.shape
    noise = noise if rate else None
    if half is None and length == key_BHMK.shape[2]:
        flat = [x.reshape(batch * heads, length, width) for x in (query_BHLK, key_BHMK, value_BHMK)]
        output = _CausalAttention.apply(*flat, noise, rate, heads, site)
        return output.view_as(query_BHLK)
    scores_BHLM = full(product(query_BHLK, key_BHMK.transpose(2, 3), half)) / math.sqrt(width)
    later = torch.ones(scores_BHLM.shape[2:], dtype=torch.bool, device=scores_BHLM.device)
    later = later.triu_(1 + scores_BHLM.shape[3] - length)
    probabilities = torch.softmax(scores_BHLM.masked_fill(later, -math.inf), -1)
    record_rows("attention.scores", scores_BHLM, 0, heads, site)
    record_rows("attention.probabilities", probabilities, 0, heads, site)
    if noise is not None:
        if isinstance(noise, Native):
            probabilities = F.dropout(probabilities, rate)
        else:
            keep = keep_mask(noise.attention_rows[site], noise.attention_columns[site], rate)
            probabilities = _Dropout.apply(probabilities, keep, rate)
        record_rows("attention.dropped", probabilities, 0, heads, site)
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
