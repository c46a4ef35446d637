"""Sequence to sequence: from a text, predict the one that belongs to it."""

from __future__ import annotations

import numpy as np

from horovod_lm.data.packing import document_lengths
from horovod_lm.data.stream import TokenStream
from horovod_lm.errors import UserError
from horovod_lm.objectives import Corpus, Example, LossKind, Objective, Targets, Tokenizer
from horovod_lm.objectives.span_corruption import shifted
from horovod_lm.objectives.words import decoder_start


class SequenceToSequence(Objective):
    """Pairs of documents of equal number in two streams, each with its end-of-text token. Pairs
    with an empty side are left out, and what is longer than `room` loses its last tokens before
    that end."""

    streams = ("source", "tokens")
    both_sides = ("source",)

    def __init__(self, corpus: Corpus, room: int, tokenizer: Tokenizer, *, loss: LossKind) -> None:
        if corpus.source is None:
            raise UserError(
                f"objective {loss.name} needs parallel text, and {corpus.name} has "
                "one side only; give it in two streams, source and target"
            )
        self._sides = corpus.source, corpus.tokens
        self._end, self._start = tokenizer.end, decoder_start(tokenizer)
        sizes = [document_lengths(side) for side in self._sides]
        if len(sizes[0]) != len(sizes[1]):
            raise UserError(
                f"the source of {corpus.name} has {len(sizes[0]):,} documents, and "
                f"its target {len(sizes[1]):,}; they must be as many"
            )
        lengths = np.stack(sizes, axis=1)
        self._pairs = np.flatnonzero((lengths > 1).all(axis=1))
        self.losses = (loss,)
        self.lengths = np.minimum(lengths[self._pairs], room)

    def counts(self, examples: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        return {self.losses[0].name: self.lengths[examples, 1]}

    def example(self, number: int, epoch: int) -> Example:
        source, target = (
            self._read(side, number, int(length))
            for side, length in zip(self._sides, self.lengths[number], strict=True)
        )
        return Example(
            {"source": source, "tokens": shifted(target, self._start)},
            {self.losses[0].name: Targets(target)},
        )

    def _read(self, side: TokenStream, number: int, length: int) -> np.ndarray:
        ids = side.read(int(side.documents[self._pairs[number]]), length)
        ids[-1] = self._end
        return ids
