"""Objectives of encoder-decoders over plain text: give back what was taken out of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import numpy as np

from horovod_lm.data.packing import Pieces, document_pieces, windows
from horovod_lm.errors import UserError
from horovod_lm.objectives import Corpus, Example, LossKind, Objective, Targets, Tokenizer
from horovod_lm.objectives.words import decoder_start, need, sentence_ends
from horovod_lm.randomness import Keys, fractions

Lengths = Callable[[np.ndarray], np.ndarray]


def corrupted_pieces(corpus: Corpus, room: int, lengths: Lengths, documents: bool) -> Pieces:
    """Pieces whose inputs and targets, of `lengths`((N,)) -> (N, 2) tokens, fill at most `room`
    each."""
    sizes = np.arange(2, 2 * room + 2)
    fitting = sizes[(lengths(sizes) <= room).all(axis=1)]
    if not fitting.size:
        raise UserError(f"model.context = {room} is too short for spans; make it longer")
    largest = int(fitting.max())
    if documents:
        return document_pieces(corpus.tokens, largest, ends=False, least=2)
    return windows(len(corpus.tokens), largest, partial=False)


def shifted(target: np.ndarray, start: int) -> np.ndarray:
    """What a decoder sees while it predicts `target` (n,): the same one later, after `start`."""
    return np.concatenate([[start], target[:-1]]).astype(np.int32)


class _Corruption(Objective):
    """Pieces of text of which a share of `density` is taken out, in spans of `mean_span` tokens on
    average, to be given back."""

    streams = ("source", "tokens")
    both_sides = ("source",)

    def __init__(
        self,
        corpus: Corpus,
        room: int,
        tokenizer: Tokenizer,
        keys: Keys,
        *,
        loss: LossKind,
        density: float,
        mean_span: float,
        documents: bool,
    ) -> None:
        self._tokens, self._keys = corpus.tokens, keys
        self._density, self._mean = density, mean_span
        self._start, self._end = decoder_start(tokenizer), np.array([tokenizer.end], np.int32)
        self.pieces = corrupted_pieces(corpus, room, self._lengths, documents)
        self.losses = (loss,)
        self.lengths = self._lengths(self.pieces.lengths)

    @abstractmethod
    def _lengths(self, lengths: np.ndarray) -> np.ndarray:
        """(N, 2): how long source and target are for texts of `lengths` (N,)."""

    def counts(self, examples: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        return {self.losses[0].name: self.lengths[examples, 1]}

    def _text(self, number: int) -> np.ndarray:
        return self._tokens.read(int(self.pieces.starts[number]), int(self.pieces.lengths[number]))

    def _pair(self, source: np.ndarray, target: np.ndarray) -> Example:
        """Both without the end-of-text token that closes them."""
        target = np.concatenate([target, self._end])
        return Example(
            {
                "source": np.concatenate([source, self._end]),
                "tokens": shifted(target, self._start),
            },
            {self.losses[0].name: Targets(target)},
        )


class SpanCorruption(_Corruption):
    """T5's objective (Raffel et al., 2020, section 3.1.4): of n tokens round(n x `density`) are
    taken out, in spans of `mean_span` tokens on average. In the source a sentinel stands for each
    span; the target is each sentinel and what it stands for; both close with end-of-text. Spans may
    be anywhere: in T5's own code the last one ends the text, which leaves a short text with one
    span no choice."""

    def __init__(
        self,
        corpus: Corpus,
        room: int,
        tokenizer: Tokenizer,
        keys: Keys,
        *,
        loss: LossKind,
        density: float = 0.15,
        mean_span: float = 3.0,
        documents: bool = False,
    ) -> None:
        self._sentinels = np.array(tokenizer.sentinels, dtype=np.int32)
        if not self._sentinels.size:
            raise UserError(
                f"objective {loss.name} needs a tokenizer with sentinel tokens, and this one has "
                'none; give another data.tokenizer, such as "unigram"'
            )
        super().__init__(
            corpus,
            room,
            tokenizer,
            keys,
            loss=loss,
            density=density,
            mean_span=mean_span,
            documents=documents,
        )

    def example(self, number: int, epoch: int) -> Example:
        text = self._text(number)
        length = len(text)
        noise, spans = (int(count) for count in self._spans(np.array(length)))
        drawn = fractions(self._keys(number, epoch), length)[0]
        kept, lost = drawn[: length - noise + 1], drawn[length - noise + 1 :]
        # What is kept stands between the spans, and may before and behind them.
        kept_lengths = _parts(length - noise + 2, spans + 1, kept)
        kept_lengths[[0, -1]] -= 1
        noise_lengths = np.append(_parts(noise, spans, lost), 0)
        edges = np.cumsum(np.stack([kept_lengths, noise_lengths], axis=1).ravel())
        source: list[np.ndarray] = []
        target: list[np.ndarray] = []
        stretches = np.split(text, edges[:-2])
        for index in range(spans):
            sentinel = self._sentinels[index : index + 1]
            source += [stretches[2 * index], sentinel]
            target += [sentinel, stretches[2 * index + 1]]
        source.append(stretches[-1])
        return self._pair(np.concatenate(source), np.concatenate(target))

    def _spans(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens to take out of texts of `lengths`, at least 2, and in how many spans."""
        noise = np.clip(_round(lengths * self._density), 1, lengths - 1)
        most = np.minimum(np.minimum(noise, lengths - noise), len(self._sentinels))
        return noise, np.clip(_round(noise / self._mean), 1, most)

    def _lengths(self, lengths: np.ndarray) -> np.ndarray:
        noise, spans = self._spans(lengths)
        return np.stack([lengths - noise + spans + 1, noise + spans + 1], axis=1)


class Denoising(_Corruption):
    """BART's objective (Lewis et al., 2020, section 2.2): the target is the text, the source is the
    same with its sentences in a drawn order (`permute`) and with spans, round(n x `density`) tokens
    in all, each replaced by one mask token. Lengths of spans are those of Poisson(`mean_span`)
    variables, of which round(n x density / mean_span) give that sum: some are 0, which puts a mask
    where nothing is missing. Both close with end-of-text."""

    def __init__(
        self,
        corpus: Corpus,
        room: int,
        tokenizer: Tokenizer,
        keys: Keys,
        *,
        loss: LossKind,
        density: float = 0.3,
        mean_span: float = 3.0,
        permute: bool = True,
        documents: bool = False,
        ends: np.ndarray | None = None,
    ) -> None:
        (self._mask,) = need(tokenizer, loss.name, "mask")
        self._ends: np.ndarray | None = None
        if permute:
            self._ends = (sentence_ends(tokenizer) if ends is None else ends).copy()
            self._ends[tokenizer.end] = True
        super().__init__(
            corpus,
            room,
            tokenizer,
            keys,
            loss=loss,
            density=density,
            mean_span=mean_span,
            documents=documents,
        )

    def example(self, number: int, epoch: int) -> Example:
        text = target = self._text(number)
        length = len(text)
        drawn = fractions(self._keys(number, epoch), 3 * length + 1)[0]
        if self._ends is not None:
            text = _permuted(text, self._ends, drawn[:length])
        return self._pair(self._infilled(text, drawn[length:]), target)

    def _infilled(self, text: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """`text` (n,) with spans replaced; `drawn` (2 n + 1,)."""
        noise, spans = (int(count) for count in self._spans(np.array(len(text))))
        if spans == 0:
            return text
        # Poisson variables of a known sum are multinomial.
        lengths = np.bincount((drawn[:noise] * spans).astype(np.int64), minlength=spans)
        # No two spans touch: each has a gap of its own among the tokens that stay.
        order = np.argsort(drawn[len(text) :][: len(text) - noise + 1], kind="stable")
        gaps = np.sort(order[:spans])
        starts = gaps + np.cumsum(lengths) - lengths
        inside = np.zeros(len(text) + 1, dtype=np.int64)
        np.add.at(inside, starts, 1)
        np.add.at(inside, starts + lengths, -1)
        return np.insert(text[np.cumsum(inside)[:-1] == 0], gaps, self._mask)

    def _spans(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens to take out of texts of `lengths`, and in how many spans."""
        noise = np.minimum(_round(lengths * self._density), lengths - 1)
        return noise, np.minimum(_round(noise / self._mean), lengths - noise + 1)

    def _lengths(self, lengths: np.ndarray) -> np.ndarray:
        noise, spans = self._spans(lengths)
        noise = np.where(spans > 0, noise, 0)
        return np.stack([lengths - noise + spans + 1, lengths + 1], axis=1)


def _round(numbers: np.ndarray) -> np.ndarray:
    return np.floor(numbers + 0.5).astype(np.int64)


def _parts(count: int, parts: int, drawn: np.ndarray) -> np.ndarray:
    """`count` cut into `parts` lengths of at least 1, every way as likely; `drawn` (count - 1,)."""
    cuts = np.sort(np.argsort(drawn, kind="stable")[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=count)


def _permuted(text: np.ndarray, ends: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """`text` (n,) with its sentences in a drawn order; what follows the last end is one too."""
    cuts = np.flatnonzero(ends[text[:-1]]) + 1
    sentences = np.split(text, cuts)
    order = np.argsort(drawn[: len(sentences)], kind="stable").tolist()
    return np.concatenate([sentences[index] for index in order])
