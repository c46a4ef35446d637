"""The Transformer of a `ModelSpec`."""

from __future__ import annotations

import torch
from torch import nn

from horovod_lm.activations import record
from horovod_lm.spec import ModelSpec
from torch_backend.layers import Block, Embeddings, LayerNorm, Native, Noise
from torch_backend.precision import FULL_TYPES, HALF_TYPES, full, product


class Transformer(nn.Module):
    """A decoder: embeddings, blocks and (pre-norm only) a last norm; the head is applied apart,
    since training does it together with the loss."""

    def __init__(self, spec: ModelSpec, precision: str) -> None:
        super().__init__()
        self.spec, self.half = spec, HALF_TYPES[precision]
        self.embeddings = Embeddings(spec, precision)
        self.decoder = nn.ModuleList(Block(spec, precision, i) for i in range(spec.layers))
        self.norm = LayerNorm(spec, precision) if spec.norm_placement == "pre" else None
        if not spec.tied:
            shape = (spec.width, spec.vocabulary)
            self.lm_kernel = nn.Parameter(torch.zeros(shape, dtype=FULL_TYPES[precision]))

    def forward(
        self,
        tokens_BL: torch.Tensor,
        noise: Noise | None = None,
        caches: torch.Tensor | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """Hidden states (B, L, D), no half. `caches` (layers, 2, B, H, context, K) and `start` are
        for decoding: the tokens' first position, with keys and values of earlier ones."""
        if isinstance(noise, Native):
            torch.manual_seed(noise.seed)
        x = self.embeddings(tokens_BL, noise, start)
        for index, block in enumerate(self.decoder):
            x = block(x, noise, None if caches is None else caches[index], start)
        if self.norm is not None:
            x = self.norm(x)
            record("decoder.norm", x)
        return x

    def head_kernel(self, head: str) -> torch.Tensor:
        """The (D, V) kernel of an output head: the transposed embedding where they are tied."""
        return self.embeddings.tokens.t() if self.spec.tied else self.lm_kernel

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) to (…, V), no half."""
        return full(product(hidden, self.head_kernel("lm"), self.half))
