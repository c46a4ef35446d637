"""What a Transformer is, without a framework: the spec and its canonical parameter table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

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


class ModelSpec(BaseModel):
    """An immutable, validated description of a Transformer.

    `layers` is the depth of each stack that `kind` has: a decoder stack (causal; with attention to
    the encoder in an encoder-decoder) and an encoder stack (sees both sides). Raises
    `pydantic.ValidationError` for values out of range, which `horovod_lm.config` words anew.
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
    feed_forward: int | None = Field(
        None, ge=1, le=2**20, description="inner width of the feed-forward; default: 4 x width"
    )
    norm: Literal["layer_norm"] = Field("layer_norm", description="kind of normalisation")
    norm_placement: Literal["pre", "post"] = Field(
        "pre", description="normalise before a sublayer, or after its residual sum"
    )
    norm_epsilon: float = Field(1e-5, gt=0, le=0.1, description="added to the variance")
    activation: Literal["gelu", "gelu_tanh", "relu"] = Field(
        "gelu", description="gelu is the exact (erf) form"
    )
    positions: Literal["learned", "sinusoidal"] = Field("learned", description="kind of positions")
    bias: bool = Field(True, description="biases in linear layers and norms")
    key_bias: bool = Field(
        False,
        description="a bias on attention keys; softmax cancels it, so only for imported weights",
    )
    tied: bool = Field(True, description="the output layer shares the token embedding")
    segments: int = Field(0, ge=0, le=64, description="number of segment ids (0: none)")
    dropout: float = Field(0.1, ge=0, lt=1, description="on embeddings and residual branches")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="on attention probabilities")
    initial_std: float = Field(0.02, gt=0, le=10, description="standard deviation of new weights")

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if self.width % self.heads:
            divisors = [h for h in range(1, self.width + 1) if self.width % h == 0]
            near = sorted(divisors, key=lambda h: abs(h - self.heads))[:3]
            raise ValueError(
                f"heads = {self.heads} does not divide width = {self.width}; "
                f"use heads = {' or '.join(map(str, sorted(near)))}, or another width"
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"sinusoidal positions need an even width, not {self.width}")
        return self

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def inner_width(self) -> int:
        """Inner width of the feed-forward sublayer."""
        return self.feed_forward or 4 * self.width

    @property
    def embedding_scale(self) -> float:
        """Factor on token embeddings: sqrt(width) beside sinusoidal positions (Vaswani et al.,
        2017, section 3.4), whose size does not shrink with training; else 1."""
        return math.sqrt(self.width) if self.positions == "sinusoidal" else 1.0

    @property
    def stacks(self) -> dict[str, int]:
        """Depth of each stack that this model has, by its name in the parameter table."""
        encoder = self.encoder_layers or self.layers
        return {
            "decoder": {"decoder": self.layers},
            "encoder": {"encoder": encoder},
            "encoder-decoder": {"encoder": encoder, "decoder": self.layers},
        }[self.kind]

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
        products = sum(p.size for p in self.parameters if p.name.endswith("kernel"))
        if self.tied:
            products += self.vocabulary * self.width
        return 6.0 * products + self.attention_flops_per_token(length)

    def attention_flops_per_token(self, length: int | None = None) -> float:
        """The part of `flops_per_token` that has no weights: the two products of attention."""
        length = length or self.context
        keys = 0.0
        for stack, layers in self.stacks.items():
            keys += layers * ((length + 1) / 2 if stack == "decoder" else length)
        if self.kind == "encoder-decoder":
            keys += self.layers * length
        return 12.0 * self.width * keys

    def memory(
        self, rows: int, precision: str = "fp32", optimizer: str = "adamw"
    ) -> dict[str, int]:
        """Bytes of one rank by part, for micro-batches of `rows` full sequences: fp32 weights,
        gradients and the optimizer's moments, and an estimate of the activations that the backward
        needs."""
        width, inner = self.width, self.inner_width
        element = 4 if precision == "fp32" else 2
        square = self.heads * self.context
        row = (8 * width + 2 * inner) * element + 4 * width * 4 + square * element
        tokens = rows * self.context
        weights = 4 * self.size
        return {
            "weights": weights,
            "gradients": weights,
            "moments": 4 * moment_size(optimizer, {p.name: p.shape for p in self.parameters}),
            "activations": tokens * row * sum(self.stacks.values()),
            "logits": min(tokens, 512) * self.vocabulary * 4,
        }


def _parameters(spec: ModelSpec) -> list[Parameter]:
    """Build the parameter table of `spec`."""
    width, inner = spec.width, spec.inner_width
    normal = Initialiser("normal", spec.initial_std)
    table = [Parameter("embeddings.tokens", (spec.vocabulary, width), normal, True, 0)]
    if spec.positions == "learned":
        table.append(Parameter("embeddings.positions", (spec.context, width), normal))
    if spec.segments:
        table.append(Parameter("embeddings.segments", (spec.segments, width), normal))
    if spec.norm_placement == "post":
        table += _norm("embeddings.norm", spec)
    for stack, layers in spec.stacks.items():
        # GPT-2's scaling: each residual branch starts smaller, so that their sum does not grow
        # with depth.
        branch = Initialiser("normal", spec.initial_std / math.sqrt(2 * layers))
        cross = stack == "decoder" and spec.kind == "encoder-decoder"
        for index in range(layers):
            block = f"{stack}.{index}"
            table += _norm(f"{block}.attention_norm", spec)
            table += _attention(f"{block}.attention", spec, normal, branch)
            if cross:
                table += _norm(f"{block}.cross_attention_norm", spec)
                table += _attention(f"{block}.cross_attention", spec, normal, branch)
            table += _norm(f"{block}.feed_forward_norm", spec)
            table += _linear(f"{block}.feed_forward.up", (width, inner), normal, spec.bias, 1)
            table += _linear(f"{block}.feed_forward.down", (inner, width), branch, spec.bias, 0)
        if spec.norm_placement == "pre":
            table += _norm(f"{stack}.norm", spec)
    if not spec.tied:
        table += _linear("heads.lm", (width, spec.vocabulary), normal, False, 1)
    return table


def _linear(
    name: str, shape: tuple[int, int], initialiser: Initialiser, bias: bool, split: int
) -> list[Parameter]:
    rows = [Parameter(f"{name}.kernel", shape, initialiser, True, split)]
    if bias:
        axis = 0 if split == 1 else None
        rows.append(Parameter(f"{name}.bias", shape[1:], Initialiser("zeros"), split_axis=axis))
    return rows


def _norm(name: str, spec: ModelSpec) -> list[Parameter]:
    rows = [Parameter(f"{name}.scale", (spec.width,), Initialiser("ones"))]
    if spec.bias:
        rows.append(Parameter(f"{name}.bias", (spec.width,), Initialiser("zeros")))
    return rows


def _attention(
    name: str, spec: ModelSpec, normal: Initialiser, branch: Initialiser
) -> list[Parameter]:
    square = (spec.width, spec.width)
    return [
        *_linear(f"{name}.query", square, normal, spec.bias, 1),
        *_linear(f"{name}.key", square, normal, spec.key_bias, 1),
        *_linear(f"{name}.value", square, normal, spec.bias, 1),
        *_linear(f"{name}.output", square, branch, spec.bias, 0),
    ]


def sinusoidal_positions(spec: ModelSpec) -> np.ndarray:
    """The fixed position table of Vaswani et al. (2017), section 3.5, as (context, width) fp32:
    sines in even columns, cosines in odd ones. Shared by the backends, so it can't differ."""
    position = np.arange(spec.context, dtype=np.float64)[:, None]
    rate = 10000.0 ** (-np.arange(0, spec.width, 2, dtype=np.float64) / spec.width)
    table = np.empty((spec.context, spec.width))
    table[:, 0::2], table[:, 1::2] = np.sin(position * rate), np.cos(position * rate)
    return table.astype(np.float32)
