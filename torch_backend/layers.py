"""The layers of the Transformer. Shape letters: B batch, L queries, M keys, D width, H heads,
G heads of keys and values, K head width, F feed-forward width, V vocabulary."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from horovod_lm.activations import record, record_rows, traced
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

ROW_BLOCK = 64  # query rows of one block of attention; keys that none of them sees are skipped
UNSEEN = -1e30  # added to a score; with infinity, a row that sees nothing would become nan

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Words(NamedTuple):
    """`horovod_lm.randomness.DropoutWords` as tensors."""

    residual_rows: torch.Tensor | None
    residual_columns: torch.Tensor | None
    attention_rows: torch.Tensor | None
    attention_columns: torch.Tensor | None
    cross_rows: torch.Tensor | None
    cross_columns: torch.Tensor | None


class Native(NamedTuple):
    """The framework's own dropout: `seed` starts its generator at the beginning of a stack."""

    seed: int


Noise = Words | Native


class Sight(NamedTuple):
    """What attention is told in all blocks of a stack: which keys a query sees, and what positions
    do to it. `causal`: none after it, and each row has as many queries as new keys, which then are
    the last ones. `mask` (B, L, M) is 0, or `UNSEEN` where a query does not see a key; `seeing`
    (B, L, 1) is 1, or 0 for a query that sees none, whose probabilities are equal then and have no
    gradient. `bias` (H, L, M) and `mask` are added to scaled scores. `rotary` are cosines and sines
    (B or 1, 1, L, K / 2) by which queries and new keys are turned."""

    causal: bool = False
    mask: torch.Tensor | None = None
    seeing: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None


class Cache(NamedTuple):
    """What decoding keeps of one block: keys and values of earlier tokens, (2, B, G, context, K),
    and those of the encoder's output, (2, B, G, M, K), where it attends to that."""

    own: torch.Tensor
    cross: torch.Tensor | None


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


def _turned(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, sign: int) -> torch.Tensor:
    kind, x = x.dtype, full(x)
    y = x.new_empty(x.shape)
    (a, b), (c, d) = x.chunk(2, -1), y.chunk(2, -1)
    torch.mul(a, cosine, out=c).addcmul_(b, sine, value=-sign)
    torch.mul(b, cosine, out=d).addcmul_(a, sine, value=sign)
    return y.to(kind)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cosine, sine):
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine, 1)

    @staticmethod
    def backward(ctx, gradient):
        return _turned(gradient, *ctx.saved_tensors, -1), None, None


@scope("attention")
def rotate(x_BHLK: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Each pair (i, i + K / 2) turned by its position's angle (Su et al., 2021), in the full type
    and then rounded as `x` was; the identity without `rotary`."""
    return x_BHLK if rotary is None else _Rotate.apply(x_BHLK, *rotary)


def _seen(sight: Sight, start: int, end: int, keys: int, heads: int) -> np.ndarray | None:
    """`seen` of `record_rows` for the query rows from `start` to `end`."""
    if not traced() or (sight.causal and sight.mask is None):
        return None
    rows = np.tri(end - start, keys, start if sight.causal else keys, dtype=bool)
    if sight.mask is None:
        return rows
    seen = (sight.mask[:, start:end, :keys] == 0).cpu().numpy() & rows
    return seen.repeat(heads, 0)


class _Attention(torch.autograd.Function):
    """Attention of `ROW_BLOCK` query rows at a time, with probabilities kept for the backward;
    keys that are after all of the rows are never touched where it is causal.

    With p = softmax(s), m = keep / (1 - rate), o = (p m) v and g = dL/do:
    dv = (p m)^T g and ds = p (m (g v^T) - rowsum(g o)), since rowsum(p m (g v^T)) = rowsum(g o).
    The factors `scale` and `boost` are taken into the products; a half wants `boost` before them.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, sight, scale, noise, rate, heads, site, half):
        length, keys = query.shape[1], key.shape[1]
        ctx.scale, ctx.boost, ctx.half, ctx.heads = scale, 1 / (1 - rate), half, heads
        ctx.seeing, ctx.groups = sight.seeing, len(query) // len(key)
        if noise is not None and not isinstance(noise, Native):
            rows, columns = noise[0].reshape(-1, length), noise[1]
        name, block = site
        output = torch.empty_like(query)
        query, key, value = (operand(x, half) for x in (query, key, value))
        if ctx.groups > 1:
            key, value = (x.repeat_interleave(ctx.groups, 0) for x in (key, value))
        first, saved = min(ROW_BLOCK, length), []
        for start in range(0, length, ROW_BLOCK):
            end = min(start + ROW_BLOCK, length)
            until = end if sight.causal else keys
            scores = _bmm(query[:, start:end], key[:, :until].transpose(1, 2), scale, half)
            by_head = scores.view(-1, heads, *scores.shape[1:])
            if bias is not None:
                by_head.add_(bias[:, start:end, :until])
            if sight.mask is not None:
                by_head.add_(sight.mask[:, None, start:end, :until])
            if sight.causal:
                if not start:
                    triangle = scores.new_full((first, first), -math.inf).triu_(1)
                scores[:, :, start:].add_(triangle[: end - start, : end - start])
            seen = _seen(sight, start, end, until, heads)
            record_rows(f"{name}.scores", scores, start, heads, block, seen=seen)
            probabilities = dropped = torch.softmax(scores, -1)
            record_rows(f"{name}.probabilities", probabilities, start, heads, block, seen=seen)
            keep = None
            if isinstance(noise, Native):
                keep = torch.empty_like(scores, dtype=torch.int32).bernoulli_(1 - rate).neg_()
            elif noise is not None:
                keep = keep_mask(rows[:, start:end], columns[:until], rate)
            if keep is not None:
                dropped = _masked(probabilities, keep)
                record_rows(f"{name}.dropped", dropped, start, heads, block, ctx.boost, seen)
            dropped, boost = _boosted(dropped, ctx.boost, half)
            output[:, start:end] = _bmm(dropped, value[:, :until], boost, half)
            if any(ctx.needs_input_grad):
                saved += [probabilities, keep]
        ctx.save_for_backward(query, key, value, output, *saved)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output, *saved = ctx.saved_tensors
        length, half = query.shape[1], ctx.half
        inner_sum = (full(gradient) * full(output)).sum(-1, keepdim=True).mul_(ctx.scale)
        d_query = torch.empty_like(output)
        d_key, d_value = (torch.zeros_like(x, dtype=inner_sum.dtype) for x in (key, value))
        d_bias = None
        if ctx.needs_input_grad[3]:
            d_bias = inner_sum.new_zeros(ctx.heads, length, key.shape[1])
        gradient = operand(gradient, half)
        for start, probabilities, keep in zip(
            range(0, length, ROW_BLOCK), saved[::2], saved[1::2], strict=True
        ):
            end = min(start + ROW_BLOCK, length)
            until = probabilities.shape[2]
            part, values = gradient[:, start:end], value[:, :until].transpose(1, 2)
            d_scores = _bmm(part, values, ctx.scale * ctx.boost, half)
            dropped = probabilities
            if keep is not None:
                d_scores, dropped = _masked(d_scores, keep), _masked(dropped, keep)
            dropped, boost = _boosted(dropped, ctx.boost, half)
            _add_bmm(d_value[:, :until], dropped.transpose(1, 2), part, boost, half)
            d_scores.sub_(inner_sum[:, start:end]).mul_(probabilities)
            by_head = d_scores.view(-1, ctx.heads, *d_scores.shape[1:])
            if ctx.seeing is not None:
                by_head.mul_(ctx.seeing[:, None, start:end])
            if d_bias is not None:
                torch.sum(by_head, 0, out=d_bias[:, start:end, :until])
            d_scores = operand(d_scores, half)
            d_query[:, start:end] = _bmm(d_scores, key[:, :until], 1, half)
            _add_bmm(d_key[:, :until], d_scores.transpose(1, 2), query[:, start:end], 1, half)
        if d_bias is not None:
            d_bias.mul_(1 / ctx.scale)
        if ctx.groups > 1:
            d_key, d_value = (x.unflatten(0, (-1, ctx.groups)).sum(1) for x in (d_key, d_value))
        return d_query, cast(d_key, half), cast(d_value, half), d_bias, *[None] * 7


@scope("attention")
def attention(
    query_BHLK: torch.Tensor,
    key_BGMK: torch.Tensor,
    value_BGMK: torch.Tensor,
    sight: Sight,
    scale: float,
    noise: tuple[torch.Tensor, torch.Tensor] | Native | None,
    rate: float,
    site: tuple[str, str],
    half: torch.dtype | None,
) -> torch.Tensor:
    """softmax(scale q k^T + bias + mask) v, (B, H, L, K), where head g of keys and values serves
    the query heads g H / G … (g + 1) H / G - 1 (Ainslie et al., 2023).

    With noise, row words (B, H, L) and column words (M,) or the framework's own, probabilities are
    dropped. `site` is the name of the layer and of its block. Queries beside a cache take the plain
    form, which knows no noise.
    """
    batch, heads, length, width = query_BHLK.shape
    groups, keys = key_BGMK.shape[1:3]
    if not sight.causal or length == keys:
        flat = [x.reshape(-1, x.shape[2], width) for x in (query_BHLK, key_BGMK, value_BGMK)]
        noise, rate = (noise, rate) if rate and noise is not None else (None, 0.0)
        output = _Attention.apply(*flat, sight.bias, sight, scale, noise, rate, heads, site, half)
        return output.view(query_BHLK.shape)
    query = query_BHLK.reshape(batch, groups, -1, width)
    scores_BHLM = full(product(query, key_BGMK.transpose(2, 3), half)) * scale
    scores_BHLM = scores_BHLM.view(batch, heads, length, keys)
    if sight.bias is not None:
        scores_BHLM = scores_BHLM + sight.bias
    if sight.mask is not None:
        scores_BHLM = scores_BHLM + sight.mask[:, None]
    later = torch.ones(scores_BHLM.shape[2:], dtype=torch.bool, device=scores_BHLM.device)
    later = later.triu_(1 + keys - length)
    probabilities = torch.softmax(scores_BHLM.masked_fill(later, -math.inf), -1)
    mixed = product(probabilities.view(batch, groups, -1, keys), value_BGMK, half)
    return mixed.view(query_BHLK.shape)


def _parameter(precision: str, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=FULL_TYPES[precision]))


class Embeddings(nn.Module):
    """Token embeddings plus positions and segments, then a norm where the spec has it, then
    dropout: (B, L) int to (B, L, D)."""

    def __init__(self, spec: ModelSpec, precision: str) -> None:
        super().__init__()
        self.spec = spec
        self.tokens = _parameter(precision, spec.vocabulary, spec.width)
        if spec.positions == "learned":
            rows = spec.context + spec.position_offset
            self.positions = _parameter(precision, rows, spec.width)
        elif spec.positions == "sinusoidal":
            table = torch.from_numpy(sinusoidal_positions(spec)).to(FULL_TYPES[precision])
            self.register_buffer("positions", table, persistent=False)
        else:
            self.positions = None
        self.segments = _parameter(precision, spec.segments, spec.width) if spec.segments else None
        self.norm = Norm(spec, precision) if spec.has_embedding_norm else None

    @scope("embeddings")
    def forward(
        self,
        tokens_BL: torch.Tensor,
        noise: Noise | None,
        positions_BL: torch.Tensor | None = None,
        segments_BL: torch.Tensor | None = None,
        start: int = 0,
        site: str = "embeddings",
    ) -> torch.Tensor:
        """`start` is the position of the first token, where positions are not given; `site` is
        the name in records."""
        x = F.embedding(tokens_BL, self.tokens)
        if self.spec.embedding_scale != 1:
            x = x * self.spec.embedding_scale
        if self.positions is not None:
            start += self.spec.position_offset
            if positions_BL is None:
                x = x + self.positions[start : start + tokens_BL.shape[1]]
            else:
                x = x + F.embedding(positions_BL + start, self.positions)
        if self.segments is not None:
            if segments_BL is None:
                x = x + self.segments[0]
            else:
                x = x + F.embedding(segments_BL, self.segments)
        record(f"{site}.sum", x)
        if self.norm is not None:
            x = self.norm(x)
            record(f"{site}.norm", x)
        x = dropout(x, noise, 0, self.spec.dropout)
        record(site, x)
        return x


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + epsilon), n = x r and h = g scale: y = n scale,
    dx = r (h - n mean(h n)), dscale = the sum of g n over the rows."""

    @staticmethod
    def forward(ctx, x, scale, epsilon):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().mul_(1 / x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, inverse, scale)
        return (x * inverse).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        x, inverse, scale = ctx.saved_tensors
        normed = x * inverse
        weighted = gradient * normed
        d_scale = weighted.flatten(0, -2).sum(0)
        along = (weighted @ scale).mul_(1 / x.shape[-1])[..., None]
        d_x = (gradient * scale).sub_(normed.mul_(along)).mul_(inverse)
        return d_x, d_scale, None


class Norm(nn.Module):
    """Layer normalisation over the width (Ba et al., 2016), or by the root of the mean square alone
    (Zhang and Sennrich, 2019); never in a half."""

    def __init__(self, spec: ModelSpec, precision: str) -> None:
        super().__init__()
        self.epsilon, self.centred = spec.norm_epsilon, spec.norm == "layer_norm"
        self.scale = _parameter(precision, spec.width)
        biased = spec.bias and self.centred
        self.bias = _parameter(precision, spec.width) if biased else None

    @scope("norm")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) to (…, D)."""
        if self.centred:
            return F.layer_norm(x, self.scale.shape, self.scale, self.bias, self.epsilon)
        return _RMSNorm.apply(x, self.scale, self.epsilon)


class Linear(nn.Module):
    """`x @ kernel + bias`, kernel (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, precision: str) -> None:
        super().__init__()
        self.half = HALF_TYPES[precision]
        self.kernel = _parameter(precision, inputs, outputs)
        self.bias = _parameter(precision, outputs) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, inputs) to (…, outputs), in the type of products."""
        return linear(x, self.kernel, self.bias, self.half)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017) of a sequence to itself, as `attention`, or of
    the decoder to the encoder's output, as `cross_attention`. Products of one input are fused where
    they are equally wide. A key's bias exists only where the spec asks for it: softmax cancels
    it."""

    def __init__(
        self, spec: ModelSpec, precision: str, block: str, index: int, name: str = "attention"
    ) -> None:
        super().__init__()
        self.spec, self.half = spec, HALF_TYPES[precision]
        self.block, self.index, self.name = block, index, name
        queries, keys = spec.attention_width, spec.key_value_count * spec.head_width
        self.fused = name == "attention" and queries == keys
        if self.fused:
            self.qkv_kernel = _parameter(precision, spec.width, 3 * queries)
        else:
            self.query_kernel = _parameter(precision, spec.width, queries)
            self.key_value_kernel = _parameter(precision, spec.width, 2 * keys)
        self.query_bias = _parameter(precision, queries) if spec.bias else None
        self.key_bias = _parameter(precision, keys) if spec.has_key_bias else None
        self.value_bias = _parameter(precision, keys) if spec.bias else None
        self.output = Linear(queries, spec.width, spec.bias, precision)

    @scope("attention")
    def remember(self, x: torch.Tensor) -> torch.Tensor:
        """Keys and values (2, B, G, M, K) of (B, M, D)."""
        bias = _biases(self.key_value_kernel, self.key_bias, self.value_bias)
        return self._heads(linear(x, self.key_value_kernel, bias, self.half), 2)

    @scope("attention")
    def forward(
        self,
        x: torch.Tensor,
        sight: Sight,
        noise: Noise | None,
        memory: torch.Tensor | None = None,
        cache: torch.Tensor | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """(B, L, D) to (B, L, D). `memory` are keys and values to attend to, instead of those of
        `x`. `cache` (2, B, G, context, K) holds keys and values of the positions before `start`,
        and receives those of `x`."""
        batch, length, _ = x.shape
        if self.fused:
            bias = _biases(self.qkv_kernel, self.query_bias, self.key_bias, self.value_bias)
            query, key, value = self._heads(linear(x, self.qkv_kernel, bias, self.half), 3)
        else:
            query = linear(x, self.query_kernel, self.query_bias, self.half)
            query = self._heads(query, 1)[0]
            key, value = self.remember(x) if memory is None else memory
        query = rotate(query, sight.rotary)
        if memory is None:
            key = rotate(key, sight.rotary)
        for name, part in (("query", query), ("key", key), ("value", value)):
            record(f"{self.name}.{name}", part, self.block)
        if cache is not None:
            cache[0, :, :, start : start + length] = key
            cache[1, :, :, start : start + length] = value
            key, value = cast(cache[:, :, :, : start + length], self.half)
        rate, site = self.spec.attention_dropout, (self.name, self.block)
        scale, words = self.spec.attention_scale, self._words(noise)
        mixed = attention(query, key, value, sight, scale, words, rate, site, self.half)
        mixed = mixed.transpose(1, 2).reshape(batch, length, self.spec.attention_width)
        record(f"{self.name}.mixed", mixed, self.block)
        output = self.output(mixed)
        record(f"{self.name}.output", output, self.block)
        return output

    def _heads(self, x: torch.Tensor, parts: int) -> torch.Tensor:
        """(B, L, parts x heads x K) to (parts, B, heads, L, K)."""
        x = x.view(*x.shape[:2], parts, -1, self.spec.head_width)
        return x.permute(2, 0, 3, 1, 4)

    def _words(self, noise: Noise | None) -> tuple[torch.Tensor, torch.Tensor] | Native | None:
        if not isinstance(noise, Words):
            return noise
        rows, columns = noise.attention_rows, noise.attention_columns
        if self.name == "cross_attention":
            rows, columns = noise.cross_rows, noise.cross_columns
        return None if rows is None else (rows[self.index], columns[self.index])


def _biases(kernel: torch.Tensor, *biases: torch.Tensor | None) -> torch.Tensor | None:
    """One bias of a fused kernel, 0 where there is none."""
    if all(bias is None for bias in biases):
        return None
    size = kernel.shape[1] // len(biases)
    zeros = kernel.new_zeros(size)
    return torch.cat([zeros if bias is None else bias for bias in biases])


class FeedForward(nn.Module):
    """Two linear layers with an activation between; gated: its product with a third one (Shazeer,
    2020)."""

    def __init__(self, spec: ModelSpec, precision: str, block: str) -> None:
        super().__init__()
        self.block, self.half = block, HALF_TYPES[precision]
        self.up = Linear(spec.width, spec.inner_width, spec.bias, precision)
        self.gate = None
        if spec.gated:
            self.gate = Linear(spec.width, spec.inner_width, spec.bias, precision)
        self.down = Linear(spec.inner_width, spec.width, spec.bias, precision)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) to (B, L, D)."""
        up = self.up(x)
        record("feed_forward.up", up, self.block)
        if self.gate is None:
            x = self.activation(up)
        else:
            gate = self.gate(x)
            record("feed_forward.gate", gate, self.block)
            x = cast(self.activation(full(gate)) * full(up), self.half)
        record("feed_forward.activation", x, self.block)
        x = self.down(x)
        record("feed_forward.down", x, self.block)
        return x


class Block(nn.Module):
    """Attention, attention to the encoder where there is one beside a decoder, and feed-forward,
    each on a residual branch with dropout; the norm stands before the branch ("pre") or after the
    sum ("post")."""

    def __init__(self, spec: ModelSpec, precision: str, stack: str, index: int) -> None:
        super().__init__()
        self.spec, self.name = spec, f"{stack}.{index}"
        self.branches = ["attention", "feed_forward"]
        self.attention_norm = Norm(spec, precision)
        self.attention = Attention(spec, precision, self.name, index)
        if stack == "decoder" and "encoder" in spec.stacks:
            self.branches.insert(1, "cross_attention")
            self.cross_attention_norm = Norm(spec, precision)
            self.cross_attention = Attention(spec, precision, self.name, index, "cross_attention")
        self.feed_forward_norm = Norm(spec, precision)
        self.feed_forward = FeedForward(spec, precision, self.name)
        self.site = 1 + len(self.branches) * index

    def forward(
        self,
        x: torch.Tensor,
        sight: Sight,
        noise: Noise | None,
        encoded: torch.Tensor | None = None,
        cross_sight: Sight | None = None,
        cache: Cache | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """(B, L, D) to (B, L, D), no half. `encoded` (B, M, D) is the encoder's output, which
        `cross_sight` is about; with a cache, keys and values of it are there."""
        pre = self.spec.norm_placement == "pre"
        for place, name in enumerate(self.branches):
            branch = self._norm(name, x) if pre else x
            if name == "attention":
                own = None if cache is None else cache.own
                branch = self.attention(branch, sight, noise, None, own, start)
            elif name == "cross_attention":
                memory = self.cross_attention.remember(encoded) if cache is None else cache.cross
                branch = self.cross_attention(branch, cross_sight, noise, memory)
            else:
                branch = self.feed_forward(branch)
            x = x + dropout(full(branch), noise, self.site + place, self.spec.dropout)
            record(f"{name}.residual", x, self.name)
            x = x if pre else self._norm(name, x)
        return x

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = getattr(self, f"{name}_norm")(x)
        record(f"{name}_norm", x, self.name)
        return x
