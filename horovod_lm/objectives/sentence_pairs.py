"""Objectives over two stretches of text: does the second follow the first, or come before it?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from horovod_lm.data.packing import document_pieces
from horovod_lm.errors import UserError
from horovod_lm.objectives import Corpus, Example, LossKind, Objective, Targets, Tokenizer
from horovod_lm.objectives.masked_lm import Masking
from horovod_lm.objectives.words import need, sentence_ends
from horovod_lm.randomness import Keys, fractions

_SPECIAL = 3  # classify A separate B separate
_CANDIDATES = 8  # pieces of other documents that are tried for a B
_ENOUGH = 0.9  # of the room for it, with which no further one is tried
_KNOWN = 2**14  # pairs that are remembered, since a batch asks for each a few times


@dataclass(frozen=True)
class _Pair:
    """One example: A are the first `cut` tokens of a piece; B is what follows them, or of the piece
    `other` (of another document) what begins at `start`. `total`: the tokens of both."""

    label: int
    cut: int
    total: int
    other: int | None = None
    start: int = 0


class SentencePairs(Objective):
    """A piece of a document is cut in two, A and B, where a sentence ends nearest to a place drawn
    for each epoch, or there, if none ends. With segments, those of A are 0 and those of B 1.

    In half of the examples the label is 1: then B comes from another document (next sentence;
    Devlin et al., 2019, where 0 is IsNext), or A and B have changed places (sentence order; Lan et
    al., 2020). With `masking` the same rows are those of a masked language model too.

    Another document's B is cut as one that follows is: it begins behind the end of a sentence, so
    never with its document, and goes on to the end of its piece; of a few pieces, that one is taken
    which fills the room best. Where B begins and ends would tell the label otherwise.
    """

    both_sides = ("tokens",)

    def __init__(
        self,
        corpus: Corpus,
        room: int,
        tokenizer: Tokenizer,
        keys: Keys,
        *,
        loss: LossKind,
        swap: bool,
        segments: bool,
        masking: Masking | None = None,
        ends: np.ndarray | None = None,
    ) -> None:
        """`swap`: sentence order, not next sentence; `ends` (V,) of `sentence_ends`, if known."""
        self._tokens, self._keys = corpus.tokens, keys
        self._loss, self._swap, self._masking = loss, swap, masking
        self._classify, self._separate = need(tokenizer, loss.name, "classify", "separate")
        self._ends = sentence_ends(tokenizer) if ends is None else ends
        self.extras = ("segments",) if segments else ()
        self.pieces = document_pieces(corpus.tokens, room - _SPECIAL, ends=False, least=2)
        documents = self.pieces.documents
        assert documents is not None
        # Where the pieces of each piece's own document begin and end.
        self._own = (
            np.searchsorted(documents, documents, side="left"),
            np.searchsorted(documents, documents, side="right"),
        )
        if len(documents) == 0 or (not swap and documents[0] == documents[-1]):
            raise UserError(
                f"objective {loss.name} needs two documents of at least two tokens, and the corpus "
                f"{corpus.name} has less; give more text, or another "
                "data.documents"
            )
        self.losses = (masking.loss, loss) if masking else (loss,)
        self.lengths = self.pieces.lengths[:, None] + _SPECIAL
        self.places = masking.places(self.pieces.lengths) if masking else None
        # Of the object alone: a cache of the method would keep the object alive.
        self._pair = lru_cache(_KNOWN)(self._pair_of)

    def counts(self, examples: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        found = {self._loss.name: np.ones(len(examples), dtype=np.int64)}
        if self._masking is None:
            return found
        if self._masking.options.whole_words:
            pairs = zip(examples.tolist(), epochs.tolist(), strict=True)
            parts = [self.example(*pair).targets[self._masking.loss.name] for pair in pairs]
            masked = np.array([len(part.values) for part in parts], dtype=np.int64)
        else:
            masked = self._masking.places(self._totals(examples, epochs))
        return {self._masking.loss.name: masked, **found}

    def real(self, examples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The length of each example (M,): that of its piece, or less where B is another
        document's, whose sentences are known by reading them only."""
        return self._totals(examples, epochs)[:, None] + _SPECIAL

    def example(self, number: int, epoch: int) -> Example:
        pair = self._pair(number, epoch)
        text = self._piece(number)
        first, second = text[: pair.cut], text[pair.cut :]
        if pair.other is not None:
            second = self._piece(pair.other)[pair.start :]
        if pair.label and self._swap:
            first, second = second, first
        one, two = [self._classify], [self._separate]
        ids = np.concatenate([one, first, two, second, two]).astype(np.int32)
        targets = {self._loss.name: Targets(np.array([pair.label], dtype=np.int32))}
        if self._masking:
            places = np.arange(1, len(ids) - 1)
            places = places[places != len(first) + 1]
            key = self._keys(number, epoch, 1)
            ids, targets[self._masking.loss.name] = self._masking(ids, places, key)
        inputs = {"tokens": ids}
        if self.extras:
            inputs["segments"] = (np.arange(len(ids)) > len(first) + 1).astype(np.int32)
        return Example(inputs, targets)

    def _piece(self, number: int) -> np.ndarray:
        return self._tokens.read(int(self.pieces.starts[number]), int(self.pieces.lengths[number]))

    def _drawn(self, examples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """(M, 2 + candidates) numbers between 0 and 1: for the label, the cut and other pieces."""
        return fractions(self._keys(examples, epochs, 0), 2 + _CANDIDATES)

    def _totals(self, examples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The tokens of A and B together, (M,)."""
        totals = self.pieces.lengths[examples]
        if not self._swap:
            for place in np.flatnonzero(self._drawn(examples, epochs)[:, 0] < 0.5).tolist():
                totals[place] = self._pair(int(examples[place]), int(epochs[place])).total
        return totals

    def _pair_of(self, number: int, epoch: int) -> _Pair:
        drawn = self._drawn(np.array([number]), np.array([epoch]))[0]
        text = self._piece(number)
        total, label = len(text), int(drawn[0] < 0.5)
        cut = self._at_sentence(text, 1 + int(drawn[1] * (total - 1)))
        if self._swap or not label:
            return _Pair(label, cut, total)
        at_end = bool(self._ends[text[cut - 1]])
        other, start, length = self._foreign(number, drawn[2:], total - cut, at_end)
        return _Pair(label, cut, cut + length, other, start)

    def _foreign(
        self, number: int, drawn: np.ndarray, room: int, at_end: bool
    ) -> tuple[int, int, int]:
        """The end of a piece of another document, of at most `room` tokens: the piece, where the
        end begins, and its length. `at_end`: from a sentence on, where a piece that was drawn has
        such an end."""
        begin, end = (int(edge[number]) for edge in self._own)
        others = (drawn * (len(self.pieces) - (end - begin))).astype(np.int64)
        others += np.where(others >= begin, end - begin, 0)
        found = []
        for other in others.tolist():
            text = self._piece(other)
            start, fits = max(1, len(text) - room), not at_end
            if at_end:
                places = np.flatnonzero(self._ends[text[start - 1 : -1]])
                fits = bool(places.size)
                start += int(places[0]) if fits else 0
            found.append((fits, len(text) - start, other, start))
            if fits and len(text) - start >= _ENOUGH * room:
                break
        _, length, other, start = max(found, key=lambda one: one[:2])
        return other, start, length

    def _at_sentence(self, ids: np.ndarray, cut: int) -> int:
        """The place within `ids` after the end of a sentence that is nearest to `cut`, or `cut`."""
        places = np.flatnonzero(self._ends[ids[:-1]]) + 1
        return int(places[np.abs(places - cut).argmin()]) if places.size else cut
