"""What a Transformer is, without a framework: the spec and its canonical parameter table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from horovod_lm.optimizers import moment_size

Kind = Literal["decoder", "encoder", "encoder-decoder"]


@dataclass(frozen=True)
class Initialiser:
    """How a parameter starts: `normal` with standard deviation `std`, `zeros` or `ones`."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


@dataclass(frozen=True)
class Parameter:
    """One row of the canonical parameter table.

    `name` is the key in checkpoints, `shape` is for `y = x @ kernel + bias`. `decay` says whether
    weight decay applies; `split_axis` on which axis tensor parallelism may cut it (None: never).
    """

    name: str
    shape: tuple[int, ...]
    initialiser: Initialiser
    decay: bool = False
    split_axis: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def per_token(self) -> bool:
        """Whether every token goes through a product with it; heads of tasks are left out."""
        kernel = self.name.endswith("kernel")
        return kernel and (self.name.startswith(("encoder.", "decoder.", "heads.lm.")))


class TaskHead(BaseModel):
    """A linear output beside the language model's: `outputs` logits for each sequence (from the
    pooled first token) or for each token."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$", description="lower case; not lm")
    outputs: int = Field(ge=1, le=2**20, description="number of logits")
    over: Literal["sequence", "token"] = Field("sequence", description="what gets its own logits")


class ModelSpec(BaseModel):
    """An immutable, validated description of a Transformer.

    `layers` is the depth of each stack that `kind` has: a decoder stack (causal; with attention to
    the encoder in an encoder-decoder) and an encoder stack (sees both sides). Families such as BERT
    or T5 are values of these fields (`horovod_lm.presets`), and nothing asks for their names.
    Raises `pydantic.ValidationError` for values out of range, which `horovod_lm.config` words anew.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: Kind = Field("decoder", description="which stacks the model has")
    vocabulary: int = Field(8192, ge=2, le=2**20, description="number of token ids")
    context: int = Field(256, ge=2, le=65536, description="longest sequence, in tokens")
    width: int = Field(256, ge=1, le=65536, description="width of the residual stream")
    layers: int = Field(4, ge=1, le=1024, description="blocks in the (decoder) stack")
    encoder_layers: int | None = Field(
        None, ge=1, le=1024, description="blocks in the encoder stack; default: layers"
    )
    heads: int = Field(8, ge=1, le=1024, description="attention heads; must divide width")
    key_value_heads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="heads of keys and values, each shared by heads / key_value_heads queries; "
        "default: heads",
    )
    head_size: int | None = Field(
        None, ge=1, le=65536, description="width of one head; default: width / heads"
    )
    feed_forward: int | None = Field(
        None, ge=1, le=2**20, description="inner width of the feed-forward; default: 4 x width"
    )
    gated: bool = Field(
        False, description="the activation of one linear layer times another (GEGLU, SwiGLU)"
    )
    norm: Literal["layer_norm", "rms_norm"] = Field(
        "layer_norm", description="rms_norm neither centres nor adds a bias"
    )
    norm_placement: Literal["pre", "post"] = Field(
        "pre", description="normalise before a sublayer, or after its residual sum"
    )
    norm_epsilon: float = Field(1e-5, gt=0, le=0.1, description="added to the variance")
    embedding_norm: bool | None = Field(
        None, description="a norm after the embeddings; default: where norms stand after"
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = Field(
        "gelu", description="gelu is the exact (erf) form"
    )
    positions: Literal["learned", "sinusoidal", "rotary", "relative", "alibi"] = Field(
        "learned", description="kind of positions; relative: a learned bias by distance, as in T5"
    )
    position_offset: int = Field(
        0, ge=0, le=1024, description="rows of learned positions before the first (RoBERTa: 2)"
    )
    rotary_base: float = Field(10000.0, gt=1, le=1e9, description="of the rotary wave lengths")
    relative_buckets: int = Field(
        32, ge=4, le=1024, multiple_of=4, description="number of distances told apart"
    )
    relative_distance: int = Field(
        128, ge=8, le=65536, description="distance from which on all are one"
    )
    bias: bool = Field(True, description="biases in linear layers and layer_norm")
    key_bias: bool | None = Field(
        None,
        description="a bias on attention keys; default: where positions are rotary and bias is "
        "true, since softmax cancels it elsewhere (imported weights may have it)",
    )
    scale_attention: bool = Field(
        True, description="divide attention scores by the root of a head's width (T5: false)"
    )
    scale_embeddings: bool | None = Field(
        None,
        description="multiply token embeddings by the root of width; default: where positions are "
        "sinusoidal",
    )
    tied: bool = Field(True, description="the output layer shares the token embedding")
    scale_output: bool = Field(
        False, description="divide by the root of width before the output layer (T5, tied)"
    )
    head_transform: bool = Field(
        False, description="a linear layer, activation and norm before the output layer (BERT)"
    )
    head_bias: bool = Field(False, description="a bias on the logits of the output layer")
    pooler: bool = Field(
        False, description="a linear layer and tanh on the first token, for sequence heads (BERT)"
    )
    task_heads: tuple[TaskHead, ...] = Field(
        (), strict=False, description="outputs beside the language model's"
    )
    segments: int = Field(0, ge=0, le=64, description="number of segment ids (0: none)")
    dropout: float = Field(0.1, ge=0, lt=1, description="on embeddings and residual branches")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="on attention probabilities")
    initial_std: float = Field(0.02, gt=0, le=10, description="standard deviation of new weights")

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        for fault in (self._fault_of_heads(), self._fault_of_positions(), self._fault_of_outputs()):
            if fault:
                raise ValueError(fault)
        return self

    def _fault_of_heads(self) -> str | None:
        if self.head_size is None and self.width % self.heads:
            near = _nearest(_divisors(self.width), self.heads)
            return (
                f"heads = {self.heads} does not divide width = {self.width}; use heads = {near}, "
                "or another width, or give head_size"
            )
        if self.heads % self.key_value_count:
            near = _nearest(_divisors(self.heads), self.key_value_count)
            return (
                f"key_value_heads = {self.key_value_heads} does not divide heads = {self.heads}; "
                f"use key_value_heads = {near}"
            )
        return None

    def _fault_of_positions(self) -> str | None:
        if self.positions == "sinusoidal" and self.width % 2:
            return f"sinusoidal positions need an even width, not {self.width}"
        if self.positions == "rotary" and self.head_width % 2:
            return f"rotary positions need heads of even width, not {self.head_width}"
        if self.positions != "learned" and self.position_offset:
            return f'position_offset = {self.position_offset} needs positions = "learned"'
        if self.relative_distance <= self.relative_buckets // 2:
            return (
                f"relative_distance = {self.relative_distance} must be above half of "
                f"relative_buckets = {self.relative_buckets}"
            )
        return None

    def _fault_of_outputs(self) -> str | None:
        names = [head.name for head in self.task_heads]
        if "lm" in names:
            return "a task head can't be called \"lm\", the name of the language model's output"
        if len(names) != len(set(names)):
            return f"task_heads has a name twice: {', '.join(names)}"
        if self.pooler and self.kind != "encoder":
            return f'pooler = true needs kind = "encoder", not "{self.kind}"'
        return None

    def model_copy(self, **changes: Any) -> ModelSpec:
        """As pydantic's, without the table of parameters that the copied spec has made."""
        copy = super().model_copy(**changes)
        copy.__dict__.pop("parameters", None)
        return copy

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_size or self.width // self.heads

    @property
    def attention_width(self) -> int:
        """Width of all heads together: of queries, and of what goes into attention's output."""
        return self.heads * self.head_width

    @property
    def key_value_count(self) -> int:
        """Heads of keys and values (Ainslie et al., 2023, where they are fewer than queries')."""
        return self.key_value_heads or self.heads

    @property
    def inner_width(self) -> int:
        """Inner width of the feed-forward sublayer."""
        return self.feed_forward or 4 * self.width

    @property
    def has_key_bias(self) -> bool:
        """Whether attention keys have a bias."""
        if self.key_bias is None:
            return self.bias and self.positions == "rotary"
        return self.key_bias

    @property
    def has_embedding_norm(self) -> bool:
        """Whether a norm follows the embeddings."""
        return self.norm_placement == "post" if self.embedding_norm is None else self.embedding_norm

    @property
    def embedding_scale(self) -> float:
        """Factor on token embeddings: sqrt(width) beside sinusoidal positions (Vaswani et al.,
        2017, section 3.4), whose size does not shrink with training, or where asked for; else 1."""
        wanted = self.scale_embeddings
        if wanted is None:
            wanted = self.positions == "sinusoidal"
        return math.sqrt(self.width) if wanted else 1.0

    @property
    def attention_scale(self) -> float:
        """Factor on attention scores."""
        return 1 / math.sqrt(self.head_width) if self.scale_attention else 1.0

    @property
    def output_scale(self) -> float:
        """Factor on hidden states before the output layer."""
        return 1 / math.sqrt(self.width) if self.scale_output else 1.0

    @property
    def stacks(self) -> dict[str, int]:
        """Depth of each stack that this model has, by its name in the parameter table."""
        encoder = self.encoder_layers or self.layers
        return {
            "decoder": {"decoder": self.layers},
            "encoder": {"encoder": encoder},
            "encoder-decoder": {"encoder": encoder, "decoder": self.layers},
        }[self.kind]

    def attends_to_encoder(self, stack: str) -> bool:
        """Whether the blocks of a stack have attention to the encoder's output, too."""
        return stack == "decoder" and self.kind == "encoder-decoder"

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The canonical parameter table, in a fixed order: both backends, checkpoints, sizes and
        FLOPs follow from it."""
        return tuple(_parameters(self))

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.size for p in self.parameters)

    def flops_per_token(self, length: int | None = None) -> float:
        """Floating-point operations of one training token (forward and backward) at sequence
        length `length`: 6 for each weight of a product, and 12 x width x keys seen for the two
        products of attention in each layer (Kaplan et al., 2020, appendix B). A causal token sees
        half of the sequence on average; lookups, norms and softmax are left out.
        """
        products = sum(p.size for p in self.parameters if p.per_token)
        if self.tied:
            products += self.vocabulary * self.width
        return 6.0 * products + self.attention_flops_per_token(length)

    def attention_flops_per_token(self, length: int | None = None) -> float:
        """The part of `flops_per_token` that has no weights: the two products of attention."""
        length = length or self.context
        return self.attention_flops(dict.fromkeys(self.stacks, length)) / length

    def attention_flops(self, lengths: Mapping[str, int]) -> float:
        """The operations of a forward and backward of one sequence, of so many tokens in each
        stack, in the two products of attention; a causal token sees half on average."""
        pairs = 0.0
        for stack, layers in self.stacks.items():
            length = lengths[stack]
            pairs += layers * length * ((length + 1) / 2 if stack == "decoder" else length)
            if self.attends_to_encoder(stack):
                pairs += layers * length * lengths["encoder"]
        return 12.0 * self.attention_width * pairs

    def memory(
        self,
        rows: int,
        precision: str = "fp32",
        optimizer: str = "adamw",
        recompute: bool = False,
    ) -> dict[str, int]:
        """Bytes of one rank by part, for micro-batches of `rows` full sequences: weights,
        gradients and the optimizer's moments, and an estimate of the activations that the backward
        needs: with `recompute` those of one block, and what goes into each of the others."""
        width, inner = self.width, self.inner_width
        full, element = element_sizes(precision)
        square = self.heads * self.context
        row = (4 * width + 4 * self.attention_width + (3 if self.gated else 2) * inner) * element
        row += 4 * width * full + square * element
        tokens = rows * self.context
        weights, blocks = full * self.size, sum(self.stacks.values())
        each = row + (blocks - 1) * full * width if recompute else row * blocks
        return {
            "weights": weights,
            "gradients": weights,
            "moments": full * moment_size(optimizer, {p.name: p.shape for p in self.parameters}),
            "activations": tokens * each,
            "logits": min(tokens, 512) * self.vocabulary * full,
        }


def element_sizes(precision: str) -> tuple[int, int]:
    """Bytes of an element of what is stored (weights, gradients, moments, sums), and of a
    product's result."""
    if precision == "fp64":
        return 8, 8
    return 4, 4 if precision == "fp32" else 2


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(allowed: list[int], wanted: int) -> str:
    near = sorted(sorted(allowed, key=lambda n: abs(n - wanted))[:3])
    return " or ".join(map(str, near))


def _parameters(spec: ModelSpec) -> list[Parameter]:
    """Build the parameter table of `spec`."""
    width, inner = spec.width, spec.inner_width
    normal = Initialiser("normal", spec.initial_std)
    table = [Parameter("embeddings.tokens", (spec.vocabulary, width), normal, True, 0)]
    if spec.positions == "learned":
        rows = spec.context + spec.position_offset
        table.append(Parameter("embeddings.positions", (rows, width), normal))
    if spec.segments:
        table.append(Parameter("embeddings.segments", (spec.segments, width), normal))
    if spec.has_embedding_norm:
        table += _norm("embeddings.norm", spec)
    for stack, layers in spec.stacks.items():
        if spec.positions == "relative":
            shape = (spec.relative_buckets, spec.heads)
            table.append(Parameter(f"{stack}.relative_bias", shape, normal, split_axis=1))
        # GPT-2's scaling: each residual branch starts smaller, so that their sum does not grow
        # with depth.
        branch = Initialiser("normal", spec.initial_std / math.sqrt(2 * layers))
        cross = spec.attends_to_encoder(stack)
        for index in range(layers):
            block = f"{stack}.{index}"
            table += _norm(f"{block}.attention_norm", spec)
            table += _attention(f"{block}.attention", spec, normal, branch)
            if cross:
                table += _norm(f"{block}.cross_attention_norm", spec)
                table += _attention(f"{block}.cross_attention", spec, normal, branch)
            table += _norm(f"{block}.feed_forward_norm", spec)
            table += _linear(f"{block}.feed_forward.up", (width, inner), normal, spec.bias, 1)
            if spec.gated:
                table += _linear(f"{block}.feed_forward.gate", (width, inner), normal, spec.bias, 1)
            table += _linear(f"{block}.feed_forward.down", (inner, width), branch, spec.bias, 0)
        if spec.norm_placement == "pre":
            table += _norm(f"{stack}.norm", spec)
    return table + _outputs(spec, normal)


def _outputs(spec: ModelSpec, normal: Initialiser) -> list[Parameter]:
    width, table = spec.width, []
    if spec.pooler:
        table += _linear("pooler", (width, width), normal, True, None)
    if spec.head_transform:
        table += _linear("heads.lm.transform", (width, width), normal, True, None)
        table += _norm("heads.lm.norm", spec)
    if not spec.tied:
        table += _linear("heads.lm", (width, spec.vocabulary), normal, False, 1)
    if spec.head_bias:
        zeros = Initialiser("zeros")
        table.append(Parameter("heads.lm.bias", (spec.vocabulary,), zeros, split_axis=0))
    for head in spec.task_heads:
        table += _linear(f"heads.{head.name}", (width, head.outputs), normal, True, None)
    return table


def _linear(
    name: str, shape: tuple[int, int], initialiser: Initialiser, bias: bool, split: int | None
) -> list[Parameter]:
    rows = [Parameter(f"{name}.kernel", shape, initialiser, True, split)]
    if bias:
        axis = 0 if split == 1 else None
        rows.append(Parameter(f"{name}.bias", shape[1:], Initialiser("zeros"), split_axis=axis))
    return rows


def _norm(name: str, spec: ModelSpec) -> list[Parameter]:
    rows = [Parameter(f"{name}.scale", (spec.width,), Initialiser("ones"))]
    if spec.bias and spec.norm == "layer_norm":
        rows.append(Parameter(f"{name}.bias", (spec.width,), Initialiser("zeros")))
    return rows


def _attention(
    name: str, spec: ModelSpec, normal: Initialiser, branch: Initialiser
) -> list[Parameter]:
    queries = (spec.width, spec.attention_width)
    keys = (spec.width, spec.key_value_count * spec.head_width)
    return [
        *_linear(f"{name}.query", queries, normal, spec.bias, 1),
        *_linear(f"{name}.key", keys, normal, spec.has_key_bias, 1),
        *_linear(f"{name}.value", keys, normal, spec.bias, 1),
        *_linear(f"{name}.output", queries[::-1], branch, spec.bias, 0),
    ]


def sinusoidal_positions(spec: ModelSpec) -> np.ndarray:
    """The fixed position table of Vaswani et al. (2017), section 3.5, as (context, width) fp32:
    sines in even columns, cosines in odd ones. Shared by the backends, so it can't differ."""
    position = np.arange(spec.context, dtype=np.float64)[:, None]
    rate = 10000.0 ** (-np.arange(0, spec.width, 2, dtype=np.float64) / spec.width)
    table = np.empty((spec.context, spec.width))
    table[:, 0::2], table[:, 1::2] = np.sin(position * rate), np.cos(position * rate)
    return table.astype(np.float32)


def rotary_tables(spec: ModelSpec) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of Su et al. (2021), each (context, head width / 2) fp32. Column i turns
    the pair of elements (i, i + head width / 2) of queries and keys:
    (a, b) -> (a cos - b sin, b cos + a sin)."""
    position = np.arange(spec.context, dtype=np.float64)[:, None]
    half = spec.head_width // 2
    angle = position * spec.rotary_base ** (-np.arange(half, dtype=np.float64) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def relative_buckets(spec: ModelSpec, stack: str, queries: range, keys: range) -> np.ndarray:
    """The row of the table `STACK.relative_bias` for each query and key, (L, M) int32, as in T5
    (Raffel et al., 2020): half of the buckets for single distances, the rest for distances that
    grow by a factor up to `relative_distance`. An encoder tells keys before from keys after; for a
    decoder all keys after count as distance 0."""
    distance = np.array(keys)[None, :] - np.array(queries)[:, None]
    buckets = spec.relative_buckets
    offset = np.zeros_like(distance)
    if stack == "encoder":
        buckets //= 2
        offset = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # An integer power compared with another: a logarithm would round to either side of a step.
    steps = buckets - exact
    far = np.zeros_like(distance)
    for step in range(1, steps):
        least = next(
            d
            for d in range(exact, spec.relative_distance + 1)
            if d**steps * exact**step >= exact**steps * spec.relative_distance**step
        )
        far += distance >= least
    return (offset + np.where(distance < exact, distance, exact + far)).astype(np.int32)


def alibi_slopes(heads: int) -> np.ndarray:
    """(heads,) fp32: what each head takes off a score for a distance of one (Press et al., 2022):
    2^(-8 i / n) for n heads that are a power of two; otherwise those of the power below, and every
    other one of the power above."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]
    return np.array(slopes, dtype=np.float32)
