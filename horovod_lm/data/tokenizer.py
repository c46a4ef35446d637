"""The byte-level BPE tokenizer (Sennrich et al., 2016; Radford et al., 2019)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from horovod_lm.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Text to ids and back, without loss for any text.

    `vocabulary` is the number of ids in use, at most what was asked for: a small corpus may have
    fewer merges to give. `end` is the id of the end-of-text token, which `encode` never gives:
    where a text holds the characters `<|endoftext|>`, they are encoded as the text that they are.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Not part of the saved file, so it has to be set here.
        self._tokenizer.encode_special_tokens = True
        self.vocabulary: int = tokenizer.get_vocab_size()
        end = tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise ValueError(f"it has no token {END_OF_TEXT}")
        self.end: int = end
        self.special: dict[str, int] = {"end": end}
        self.sentinels: tuple[int, ...] = ()

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> Tokenizer:
        """A tokenizer of at most `vocabulary` ids (at least 257: the bytes and end-of-text),
        trained on `texts`, which are read once and not kept."""
        _allow_threads()
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read what `save` wrote. Raises `UserError` if the file is missing or something else."""
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        # The library raises plain `Exception` for a file that it can't make sense of.
        except Exception as error:
            raise UserError(
                f"the tokenizer {path} can't be read ({error}); delete its folder and run "
                "`horovod-lm prepare` again"
            ) from None

    @property
    def starts_word(self) -> np.ndarray:
        """(vocabulary,) bool: whether an id begins a word; the others go on with the one before."""
        pieces = (self._tokenizer.id_to_token(number) for number in range(self.vocabulary))
        return np.array([str(piece).startswith("Ġ") for piece in pieces])

    def save(self, path: Path) -> None:
        """Write it as the JSON of the `tokenizers` library."""
        path.write_text(self._tokenizer.to_str(), encoding="utf-8")

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int32)

    def encode_batch(self, texts: list[str]) -> Iterator[np.ndarray]:
        """The ids of each text, int32, computed on all cores."""
        _allow_threads()
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(encoding.ids, dtype=np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`; end-of-text appears as `<|endoftext|>`, an id that no token has as
        nothing, and bytes that are not UTF-8 (half a character) as U+FFFD."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


def _allow_threads() -> None:
    # Unset, the library warns and goes on with one thread once the process has forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
