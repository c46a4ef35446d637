"""Decoding: neutral search over a backend's one-token step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from horovod_lm.backend import Engine
from horovod_lm.errors import UserError
from horovod_lm.randomness import philox, uniforms


def generate(
    engine: Engine,
    prompts: np.ndarray,
    count: int,
    *,
    context: int,
    temperature: float = 0.0,
    seed: int = 0,
    end: int | Sequence[int] | None = None,
    source: np.ndarray | None = None,
    prefix: bool = False,
) -> np.ndarray:
    """Continue `prompts` (B, L) int32 by up to `count` tokens: (B, <= count) int32. An
    encoder-decoder has `source` (B, S) int32 beside them. `prefix`: the tokens of a prompt all see
    each other, as a model of prefixes has learnt it.

    Temperature 0 is greedy. Otherwise tokens are drawn from softmax(logits / temperature) with
    numbers keyed by `seed`, the same in every framework. It stops when all rows have met `end`, or
    one of several (rows that have go on with the first), or when `context` is full. Raises
    `UserError` if a prompt is empty or fills the context, or a source has no room in it.
    """
    length = prompts.shape[1]
    if not 0 < length < context:
        raise UserError(
            f"the prompt has {length} tokens; allowed are 1 to {context - 1} (model.context - 1)"
        )
    if source is not None and source.shape[1] > context:
        raise UserError(
            f"the prompt has {source.shape[1]} tokens, with the one that ends it; allowed are at "
            f"most {context} (model.context)"
        )
    count = min(count, context - length)
    randoms = uniforms(philox(seed, "decode"), count * len(prompts)).reshape(count, -1)
    inputs = {"tokens": prompts.astype(np.int32)}
    if source is not None:
        inputs["source"] = source.astype(np.int32)
    if prefix:
        inputs["prefix"] = np.ones_like(inputs["tokens"])
    logits, cache = engine.start(inputs)
    ends = [] if end is None else np.atleast_1d(end).tolist()
    done = np.zeros(len(prompts), dtype=bool)
    tokens: list[np.ndarray] = []
    for position in range(count):
        if position:
            logits, cache = engine.next(tokens[-1], cache)
        chosen = _choose(logits, temperature, randoms[position])
        if ends:
            chosen = np.where(done, ends[0], chosen).astype(np.int32)
            done |= np.isin(chosen, ends)
        tokens.append(chosen)
        if done.all():
            break
    return np.stack(tokens, axis=1)


def _choose(logits: np.ndarray, temperature: float, randoms: np.ndarray) -> np.ndarray:
    if not temperature:
        return logits.argmax(-1).astype(np.int32)
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    below = weights.cumsum(-1)
    chosen = (below < randoms[:, None] * below[:, -1:]).sum(-1)
    return chosen.astype(np.int32)
