"""Training of a Unigram model (Kudo, 2018) in a fixed order of sums: the `tokenizers` library adds
over a hash table, so that two runs of its own training differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

_WORDS = 50_000  # that are learnt from, the most frequent ones
_COUNTED = 2**20  # different words that are counted at once
_LONGEST_WORD = 48  # the rest of a longer one is another word
_LONGEST_PIECE = 16
_SEED = 10  # pieces to begin with, for each one wanted
_ROUNDS = 2  # of expectation and maximisation between two prunings
_KEPT = 0.75  # of the pieces, by each pruning
_LEAST_COUNT = 0.5  # expected: under it a piece goes


def keep_to_size(words: Counter[str]) -> None:
    """Drop the rarer half once there are too many different words to hold."""
    if len(words) > _COUNTED:
        ranked = sorted(words.items(), key=_rank)
        words.clear()
        words.update(dict(ranked[: _COUNTED // 2]))


def _rank(item: tuple[str, float]) -> tuple[float, str]:
    return -item[1], item[0]


def train(words: Counter[str], alphabet: Iterable[str], size: int) -> list[tuple[str, float]]:
    """At most `size` pieces with the logarithms of their probabilities, the likeliest first; all of
    `alphabet` is among them. `words` has how often each word occurs."""
    required = set(alphabet)
    cut: Counter[str] = Counter()
    for word, count in sorted(words.items(), key=_rank)[:_WORDS]:
        for start in range(0, len(word), _LONGEST_WORD):
            cut[word[start : start + _LONGEST_WORD]] += count
    corpus = sorted(cut.items())
    scores = _normalised(_seed(corpus, required, _SEED * size))
    while True:
        for _ in range(_ROUNDS):
            scores = _maximise(_expect(corpus, scores), required)
        if len(scores) <= size:
            break
        scores = _prune(corpus, scores, required, max(size, int(len(scores) * _KEPT)))
    return sorted(scores.items(), key=_rank)


def _seed(corpus: list[tuple[str, int]], required: set[str], most: int) -> dict[str, float]:
    """All characters, and the substrings that cover most of the text."""
    counts: Counter[str] = Counter()
    for word, count in corpus:
        for start in range(len(word)):
            for stop in range(start + 1, min(start + _LONGEST_PIECE, len(word)) + 1):
                counts[word[start:stop]] += count
    longer = {p: float(n * len(p)) for p, n in counts.items() if len(p) > 1 and n > 1}
    seed = {sign: float(counts[sign] or 1) for sign in sorted(required)}
    seed.update(sorted(longer.items(), key=_rank)[: max(0, most - len(seed))])
    return seed


def _normalised(counts: dict[str, float]) -> dict[str, float]:
    total = math.log(math.fsum(counts.values()))
    return {piece: math.log(count) - total for piece, count in counts.items()}


def _expect(corpus: list[tuple[str, int]], scores: dict[str, float]) -> dict[str, float]:
    """How often each piece is expected, over all ways to cut each word: forward and backward
    sums."""
    probability = {piece: math.exp(score) for piece, score in scores.items()}
    expected = dict.fromkeys(scores, 0.0)
    for word, count in corpus:
        length = len(word)
        edges = []
        forward = [1.0] + [0.0] * length
        for start in range(length):
            here = forward[start]
            for stop in range(start + 1, min(start + _LONGEST_PIECE, length) + 1):
                p = probability.get(word[start:stop])
                if p is not None:
                    edges.append((start, stop, p))
                    forward[stop] += here * p
        # Words are so short that nothing underflows but in extreme cases, which count for naught.
        if forward[length] < 1e-290:
            continue
        backward = [0.0] * length + [count / forward[length]]
        for start, stop, p in reversed(edges):
            backward[start] += p * backward[stop]
        for start, stop, p in edges:
            expected[word[start:stop]] += forward[start] * p * backward[stop]
    return expected


def _maximise(expected: dict[str, float], required: set[str]) -> dict[str, float]:
    kept = {
        piece: max(count, _LEAST_COUNT)
        for piece, count in expected.items()
        if count >= _LEAST_COUNT or piece in required
    }
    # Kudo's Bayesian form: digamma instead of the logarithm favours few pieces.
    total = _digamma(math.fsum(kept.values()))
    return {piece: _digamma(count) - total for piece, count in kept.items()}


def _digamma(x: float) -> float:
    """The derivative of the logarithm of the gamma function, by its asymptotic series."""
    result = 0.0
    while x < 7:
        result -= 1 / x
        x += 1
    y = 1 / (x * x)
    return result + math.log(x) - 0.5 / x - y * (1 / 12 - y * (1 / 120 - y / 252))


def _best(word: str, scores: dict[str, float], whole: bool = True) -> list[str]:
    """The likeliest way to cut `word` (Viterbi); without `whole`, not as one piece."""
    length = len(word)
    best = [0.0] + [-math.inf] * length
    origin = [0] * (length + 1)
    for start in range(length):
        for stop in range(start + 1, min(start + _LONGEST_PIECE, length) + 1):
            score = scores.get(word[start:stop])
            if score is None or (not whole and stop - start == length):
                continue
            if best[start] + score > best[stop]:
                best[stop], origin[stop] = best[start] + score, start
    pieces = []
    while length:
        pieces.append(word[origin[length] : length])
        length = origin[length]
    return pieces[::-1]


def _prune(
    corpus: list[tuple[str, int]], scores: dict[str, float], required: set[str], size: int
) -> dict[str, float]:
    """The `size` pieces whose loss would make the text least likely: each one's occurrences in the
    best cuts, times what its own best cut into others costs."""
    counts: Counter[str] = Counter()
    for word, count in corpus:
        for piece in _best(word, scores):
            counts[piece] += count
    losses = {}
    for piece, score in scores.items():
        if piece not in required:
            rest = sum(scores[part] for part in _best(piece, scores, whole=False))
            losses[piece] = counts[piece] * (score - rest)
    chosen = sorted(losses.items(), key=_rank)[: max(0, size - len(required))]
    kept = required.union(piece for piece, _ in chosen)
    return {piece: score for piece, score in scores.items() if piece in kept}
