"""Objectives: how pieces of text become the inputs and targets of examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from horovod_lm.data.stream import TokenStream


@dataclass(frozen=True)
class Corpus:
    """What an objective reads: a stream of tokens, and for parallel text also its `source`, whose
    documents are as many and in the same order."""

    name: str
    tokens: TokenStream
    source: TokenStream | None = None


class Tokenizer(Protocol):
    """What objectives ask of a tokenizer.

    `special` are the ids of padding, mask, classify, separate and begin, as far as there are such
    tokens; `sentinels` those that stand for spans, in order; `starts_word` (vocabulary,) bool says
    which ids begin a word.
    """

    vocabulary: int
    end: int

    @property
    def special(self) -> Mapping[str, int]: ...

    @property
    def sentinels(self) -> Sequence[int]: ...

    @property
    def starts_word(self) -> np.ndarray: ...

    def decode(self, ids: np.ndarray) -> str: ...


@dataclass(frozen=True)
class LossKind:
    """One loss of an objective, the same in all micro-batches. `sparse`: its targets are at few
    places of a row, which are given one by one."""

    name: str
    head: str = "lm"
    over: Literal["token", "sequence"] = "token"
    sparse: bool = False
    smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class Targets:
    """The targets of one loss in one example: `values` (P,) at `places` (P,) of its `tokens`, each
    of weight 1. A loss that is not sparse has its places in a row without gap, from `places` on; a
    loss over sequences has one value and no place."""

    values: np.ndarray
    places: np.ndarray | int = 0


@dataclass(frozen=True)
class Example:
    """One example: `inputs` by name, (n,) int32 each, as in `backend.MicroBatch`; `targets` by the
    name of the loss."""

    inputs: Mapping[str, np.ndarray]
    targets: Mapping[str, Targets]


class Objective(ABC):
    """The examples of one objective in one corpus.

    `streams` are the inputs that have lengths of their own, ("tokens",) or ("source", "tokens");
    `extras` those beside them, of the shape of `tokens`; `both_sides` the streams whose tokens see
    what follows them, so that padding must be masked. `lengths` (examples, streams) int64 are known
    without reading text, and so are the numbers of targets: `places` (examples,) is the most that a
    sparse loss has in an example. What an example is made of depends on the seed, its number
    and the epoch alone.
    """

    streams: tuple[str, ...] = ("tokens",)
    extras: tuple[str, ...] = ()
    both_sides: tuple[str, ...] = ()
    places: np.ndarray | None = None
    losses: tuple[LossKind, ...]
    lengths: np.ndarray

    @abstractmethod
    def counts(self, examples: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """By loss name, the number of targets of each example (M,) in its epoch (M,)."""

    @abstractmethod
    def example(self, number: int, epoch: int) -> Example:
        """One example."""

    def real(self, examples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """How long the examples (M,) are, (M, streams): at most their `lengths`."""
        return self.lengths[examples]
