"""Masked language modelling (Devlin et al., 2019): predict tokens that were taken out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from horovod_lm.data.packing import document_pieces, ends_within, windows
from horovod_lm.objectives import Corpus, Example, LossKind, Objective, Targets, Tokenizer
from horovod_lm.objectives.words import need, ordinary
from horovod_lm.randomness import Keys, fractions


@dataclass(frozen=True)
class MaskingOptions:
    """`probability` of a token to become a target; of the targets, a share `masked` is replaced by
    the mask token, `randomised` by any token, and the rest stays; `whole_words`: words are taken
    whole."""

    probability: float = 0.15
    masked: float = 0.8
    randomised: float = 0.1
    whole_words: bool = False


class Masking:
    """Masks token ids. Of n tokens round(n x probability) become targets, at least one of them:
    exactly so many, and with whole words at most so many."""

    def __init__(self, tokenizer: Tokenizer, loss: LossKind, options: MaskingOptions) -> None:
        self.loss, self.options = loss, options
        (self._mask,) = need(tokenizer, "masked_lm", "mask")
        self._ordinary = ordinary(tokenizer)
        self._starts = tokenizer.starts_word if options.whole_words else None

    def places(self, candidates: np.ndarray) -> np.ndarray:
        """The number of targets among so many candidates (…,)."""
        wanted = np.floor(candidates * self.options.probability + 0.5).astype(np.int64)
        return np.minimum(candidates, np.maximum(1, wanted))

    def chosen(self, ids: np.ndarray, candidates: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Which of `ids` (n,) become targets, of the places `candidates` (m,) in rising order, by
        `key` (1,) uint64. A word ends where candidates have a gap."""
        count = int(self.places(np.array(len(candidates))))
        drawn = fractions(key, len(candidates))[0]
        if self._starts is None:
            return np.sort(candidates[np.argsort(drawn, kind="stable")[:count]])
        begins = self._starts[ids[candidates]]
        begins[1:] |= np.diff(candidates) > 1
        begins[:1] = True
        firsts = np.flatnonzero(begins)
        sizes = np.diff(firsts, append=len(candidates))
        taken = []
        for word in np.argsort(drawn[firsts], kind="stable").tolist():
            if count == 0:
                break
            # A word that does not fit is passed over, as in BERT.
            if sizes[word] <= count:
                taken.append(np.arange(firsts[word], firsts[word] + sizes[word]))
                count -= int(sizes[word])
        return candidates[np.sort(np.concatenate(taken))] if taken else candidates[:0]

    def __call__(
        self, ids: np.ndarray, candidates: np.ndarray, key: np.ndarray
    ) -> tuple[np.ndarray, Targets]:
        """`ids` (n,) with some of the `candidates` replaced, and the targets."""
        places = self.chosen(ids, candidates, key)
        what, which = fractions(key + np.uint64(1), 2 * len(places))[0].reshape(2, -1)
        result = ids.copy()
        options = self.options
        result[places[what < options.masked]] = self._mask
        other = (what >= options.masked) & (what < options.masked + options.randomised)
        picked = (which[other] * len(self._ordinary)).astype(np.int64)
        result[places[other]] = self._ordinary[picked]
        return result, Targets(ids[places], places)


class MaskedLM(Objective):
    """Pieces between a classify and a separate token, where the tokenizer has both. As windows they
    go on over ends of documents, whose tokens are never masked, and the last tokens of the stream
    that fill no window are left out; as documents they are without that end. Masks are drawn anew
    in each epoch (Liu et al., 2019)."""

    both_sides = ("tokens",)

    def __init__(
        self,
        corpus: Corpus,
        room: int,
        tokenizer: Tokenizer,
        masking: Masking,
        keys: Keys,
        *,
        documents: bool = False,
    ) -> None:
        self._tokens, self._masking, self._keys = corpus.tokens, masking, keys
        special = tokenizer.special
        wrapped = "classify" in special and "separate" in special
        self._before = [special["classify"]] if wrapped else []
        self._after = [special["separate"]] if wrapped else []
        room -= 2 * wrapped
        if documents:
            self.pieces = document_pieces(corpus.tokens, room, ends=False)
            ends = np.zeros_like(self.pieces.lengths)
        else:
            self.pieces = windows(len(corpus.tokens), room, partial=False)
            ends = ends_within(corpus.tokens, self.pieces.starts, self.pieces.lengths)
        self._documents = documents
        self.losses = (masking.loss,)
        self.lengths = self.pieces.lengths[:, None] + 2 * wrapped
        self.places = masking.places(self.pieces.lengths - ends)

    def counts(self, examples: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        assert self.places is not None
        if not self._masking.options.whole_words:
            return {self.losses[0].name: self.places[examples]}
        # How many tokens whole words have is known by reading them only.
        counts = [
            len(self._masking.chosen(*self._text(number), self._keys(number, epoch)))
            for number, epoch in zip(examples.tolist(), epochs.tolist(), strict=True)
        ]
        return {self.losses[0].name: np.array(counts, dtype=np.int64)}

    def example(self, number: int, epoch: int) -> Example:
        ids, candidates = self._text(number)
        masked, targets = self._masking(ids, candidates, self._keys(number, epoch))
        return Example({"tokens": masked}, {self.losses[0].name: targets})

    def _text(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of an example, and the places that may be masked."""
        start, length = int(self.pieces.starts[number]), int(self.pieces.lengths[number])
        text = self._tokens.read(start, length)
        allowed = np.ones(length, dtype=bool)
        if not self._documents:
            begins = self._tokens.documents
            first, last = np.searchsorted(begins, [start, start + length], side="right")
            allowed[begins[first:last] - 1 - start] = False
            if start + length == len(self._tokens):
                allowed[-1] = False
        ids = np.concatenate([self._before, text, self._after]).astype(np.int32)
        return ids, np.flatnonzero(allowed) + len(self._before)
