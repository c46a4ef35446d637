"""A corpus and a tokenizer in memory, for tests of objectives and batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from horovod_lm.objectives import Corpus

END, PADDING, MASK, CLASSIFY, SEPARATE, BEGIN = range(6)
SENTINELS = tuple(range(6, 106))
FIRST = 106  # the first ordinary id; those from STOP on end a sentence
STOP, VOCABULARY = 940, 1000


class Stream:
    """Documents of given tokens, each closed by the end-of-text token."""

    def __init__(self, documents):
        parts = [np.append(np.asarray(ids, np.int32), np.int32(END)) for ids in documents]
        self.documents = np.cumsum([0, *map(len, parts)])[:-1].astype(np.int64)
        self._ids = np.concatenate(parts)

    def __len__(self):
        return len(self._ids)

    def read(self, start, count):
        assert start >= 0 and start + count <= len(self._ids)
        return self._ids[start : start + count].copy()


@dataclass
class Words:
    """A tokenizer whose words are runs of ids: every third id goes on with the word before."""

    vocabulary: int = VOCABULARY
    end: int = END
    special: dict[str, int] = field(
        default_factory=lambda: {
            "end": END,
            "padding": PADDING,
            "mask": MASK,
            "classify": CLASSIFY,
            "separate": SEPARATE,
            "begin": BEGIN,
        }
    )
    sentinels: tuple[int, ...] = SENTINELS

    @property
    def starts_word(self):
        return np.arange(self.vocabulary) % 3 != 0

    def decode(self, ids):
        return " ".join(f"w{number}" + "." * int(number >= STOP) for number in np.asarray(ids))


def lengths_of_text(count, seed, longest=300):
    """Lengths of documents as real ones have them: most are short, some much longer than a row."""
    drawn = np.random.default_rng(seed).lognormal(3.4, 0.9, count)
    return np.clip(drawn.astype(int), 1, longest)


def corpus(count=200, seed=0, name="corpus", parallel=False, longest=300):
    generator = np.random.default_rng(seed + 100)
    sides = [
        Stream(
            [generator.integers(FIRST, VOCABULARY, n) for n in lengths_of_text(count, s, longest)]
        )
        for s in range(seed, seed + 1 + parallel)
    ]
    return Corpus(name, *sides)
