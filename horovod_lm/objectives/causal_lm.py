"""Causal language modelling: at every position, predict the next token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from horovod_lm.backend import Loss, MicroBatch
from horovod_lm.data.shards import Tokens
from horovod_lm.objectives import FILLER
from horovod_lm.spec import Kind


class CausalLM:
    """Window w holds the tokens w L to w L + L of the stream, L being the context: L inputs, and
    the same shifted by one as targets. So every token of the stream but the first is a target of
    one window. The last window may be shorter: it is padded with token 0, with weight 0.
    """

    name = "causal language modelling"
    kinds: tuple[Kind, ...] = ("decoder",)  # an encoder would see the token that it predicts
    loss_names: tuple[str, ...] = ("lm",)

    def windows(self, tokens: Tokens, context: int) -> int:
        """How many windows the stream has, the shorter last one included."""
        return -(-(len(tokens) - 1) // context)

    def weight_sums(self, tokens: Tokens, context: int, windows: np.ndarray) -> Mapping[str, float]:
        """The number of target tokens in `windows` (B,), from the length of the stream alone."""
        real = windows[windows != FILLER]
        lengths = np.minimum(context, len(tokens) - 1 - real * context)
        return {"lm": float(lengths.sum())}

    def micro_batch(
        self,
        tokens: Tokens,
        context: int,
        windows: np.ndarray,
        rows: np.ndarray,
        normalisers: Mapping[str, float],
    ) -> MicroBatch:
        """`tokens` and `targets` (B, L) int32, `weights` (B, L) fp32."""
        shape = (len(windows), context)
        inputs, targets = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
        weights = np.zeros(shape, dtype=np.float32)
        for row, window in enumerate(windows.tolist()):
            if window == FILLER:
                continue
            start = window * context
            text = tokens.read(start, min(context + 1, len(tokens) - start))
            length = len(text) - 1
            inputs[row, :length] = text[:-1]
            targets[row, :length] = text[1:]
            weights[row, :length] = 1
        loss = Loss("lm", "lm", targets, weights, normaliser=normalisers["lm"])
        return MicroBatch({"tokens": inputs}, rows, (loss,))
