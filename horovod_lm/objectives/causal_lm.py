"""Causal language modelling: at every position, predict the next token."""

from __future__ import annotations

import numpy as np

from horovod_lm.data.packing import Pieces, document_pieces, windows
from horovod_lm.objectives import Corpus, Example, LossKind, Objective, Targets, Tokenizer
from horovod_lm.randomness import Keys, fractions


class CausalLM(Objective):
    """As windows: window w has the tokens w L to w L + L of the stream as inputs, L being the
    `room`, and the same shifted by one as targets. So every token of the stream but the first is a
    target of one window; the last window may be shorter.

    As documents: all tokens of a piece are targets, the end-of-text token too. What goes in before
    the first is the token before it in the text: the end of the document before, or at the start of
    a document the begin token where the tokenizer has one.
    """

    def __init__(
        self,
        corpus: Corpus,
        room: int,
        tokenizer: Tokenizer | None = None,
        *,
        documents: bool = False,
        loss: LossKind | None = None,
        keys: Keys | None = None,
    ) -> None:
        self._tokens, self._tokenizer = corpus.tokens, tokenizer
        self._keys = keys
        self._documents = documents
        if documents:
            self.pieces = document_pieces(corpus.tokens, room, ends=True)
        else:
            self.pieces = windows(len(corpus.tokens) - 1, room, partial=True)
        self.losses = (loss or LossKind("lm"),)
        self.lengths = self.pieces.lengths[:, None]

    def counts(self, examples: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        return {self.losses[0].name: self.lengths[examples, 0]}

    def example(self, number: int, epoch: int) -> Example:
        text = self._text(number)
        return Example({"tokens": text[:-1]}, {self.losses[0].name: Targets(text[1:])})

    def _text(self, number: int) -> np.ndarray:
        """The piece, and the one token before it."""
        start, length = int(self.pieces.starts[number]), int(self.pieces.lengths[number])
        if not self._documents:
            return self._tokens.read(start, length + 1)
        assert self._tokenizer is not None
        if start:
            text = self._tokens.read(start - 1, length + 1)
        else:
            first = np.array([self._tokenizer.end], dtype=np.int32)
            text = np.concatenate([first, self._tokens.read(0, length)])
        begin = self._tokenizer.special.get("begin")
        if begin is not None and _starts_document(self.pieces, number):
            text[0] = begin
        return text


class PrefixLM(CausalLM):
    """Pieces as in `CausalLM`, of which a first part, of a length drawn for each epoch, is seen
    from both sides and has no targets of its own: only what follows it is predicted (Dong et al.,
    2019; Raffel et al., 2020, section 3.2.1)."""

    extras = ("prefix",)

    def counts(self, examples: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        lengths = self.lengths[examples, 0]
        return {self.losses[0].name: lengths - self._prefix(examples, epochs) + 1}

    def example(self, number: int, epoch: int) -> Example:
        text = self._text(number)
        prefix = int(self._prefix(np.array([number]), np.array([epoch]))[0])
        seen = (np.arange(len(text) - 1) < prefix).astype(np.int32)
        # The last input of the prefix is the first that does not see its own successor.
        targets = Targets(text[prefix:], prefix - 1)
        return Example({"tokens": text[:-1], "prefix": seen}, {self.losses[0].name: targets})

    def _prefix(self, examples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Inputs in the prefix, from 1 to one less than all."""
        assert self._keys is not None
        drawn = fractions(self._keys(examples, epochs), 1)[:, 0]
        return 1 + (drawn * (self.lengths[examples, 0] - 1)).astype(np.int64)


def _starts_document(pieces: Pieces, number: int) -> bool:
    documents = pieces.documents
    assert documents is not None
    return number == 0 or bool(documents[number] != documents[number - 1])
