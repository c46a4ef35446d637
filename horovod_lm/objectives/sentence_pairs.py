"""Objectives over two stretches of text: does the second follow the first, or come before it?"""

from __future__ import annotations

import numpy as np

from horovod_lm.data.packing import document_pieces
from horovod_lm.errors import UserError
from horovod_lm.objectives import Corpus, Example, LossKind, Objective, Targets, Tokenizer
from horovod_lm.objectives.masked_lm import Masking
from horovod_lm.objectives.words import need, sentence_ends
from horovod_lm.randomness import Keys, fractions

_SPECIAL = 3  # classify A separate B separate


class SentencePairs(Objective):
    """A piece of a document is cut in two, A and B, where a sentence ends nearest to a place drawn
    for each epoch, or there, if none ends. With segments, those of A are 0 and those of B 1.

    In half of the examples the label is 1: then B comes from another document (next sentence;
    Devlin et al., 2019, where 0 is IsNext), or A and B have changed places (sentence order; Lan et
    al., 2020). With `masking` the same rows are those of a masked language model too.
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

    def counts(self, examples: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        found = {self._loss.name: np.ones(len(examples), dtype=np.int64)}
        if self._masking is None:
            return found
        if self._masking.options.whole_words:
            pairs = zip(examples.tolist(), epochs.tolist(), strict=True)
            parts = [self.example(*pair).targets[self._masking.loss.name] for pair in pairs]
            masked = np.array([len(part.values) for part in parts], dtype=np.int64)
        else:
            masked = self._masking.places(self._drawn(examples, epochs)[3])
        return {self._masking.loss.name: masked, **found}

    def real(self, examples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The length of each example (M,): less than planned where another document's B is
        shorter than the piece's own."""
        return self._drawn(examples, epochs)[3][:, None] + _SPECIAL

    def example(self, number: int, epoch: int) -> Example:
        label, cut, other, total = (
            int(array[0]) for array in self._drawn(np.array([number]), np.array([epoch]))
        )
        starts, lengths = self.pieces.starts, self.pieces.lengths
        first = self._tokens.read(int(starts[number]), min(total, int(lengths[number])))
        foreign = bool(label) and not self._swap
        least = max(1, total - int(lengths[other])) if foreign else 1
        cut = self._at_sentence(first, cut, least, total - 1)
        second = self._tokens.read(int(starts[other]), total - cut) if foreign else first[cut:]
        first = first[:cut]
        if label and self._swap:
            first, second = second, first
        one, two = [self._classify], [self._separate]
        ids = np.concatenate([one, first, two, second, two]).astype(np.int32)
        targets = {self._loss.name: Targets(np.array([label], dtype=np.int32))}
        if self._masking:
            places = np.arange(1, len(ids) - 1)
            places = places[places != len(first) + 1]
            key = self._keys(number, epoch, 1)
            ids, targets[self._masking.loss.name] = self._masking(ids, places, key)
        inputs = {"tokens": ids}
        if self.extras:
            inputs["segments"] = (np.arange(len(ids)) > len(first) + 1).astype(np.int32)
        return Example(inputs, targets)

    def _drawn(self, examples: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of each example its label, where it is cut, the piece that B is from if it is another
        document's, and the tokens of A and B together; without reading any."""
        drawn = fractions(self._keys(examples, epochs, 0), 3)
        lengths = self.pieces.lengths
        own = lengths[examples]
        labels = (drawn[:, 0] < 0.5).astype(np.int64)
        cuts = 1 + (drawn[:, 1] * (own - 1)).astype(np.int64)
        if self._swap:
            return labels, cuts, examples, own
        begin, end = (edge[examples] for edge in self._own)
        others = (drawn[:, 2] * (len(lengths) - (end - begin))).astype(np.int64)
        others += np.where(others >= begin, end - begin, 0)
        totals = np.where(labels == 1, np.minimum(own, cuts + lengths[others]), own)
        return labels, cuts, others, totals

    def _at_sentence(self, ids: np.ndarray, cut: int, least: int, most: int) -> int:
        """The place from `least` to `most` after the end of a sentence that is nearest to `cut`,
        or `cut`."""
        places = np.flatnonzero(self._ends[ids[least - 1 : most]]) + least
        return int(places[np.abs(places - cut).argmin()]) if places.size else cut
