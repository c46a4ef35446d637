"""Tokenizers: text to ids and back, trained here or loaded from a `tokenizer.json`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from horovod_lm.data.interrupts import interruptible
from horovod_lm.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SENTINEL = "<extra_id_{}>"

# What the special tokens of the known families are called, the likeliest name first. RoBERTa's
# <s> and </s> begin and part sequences as BERT's [CLS] and [SEP] do; T5 and Llama have no mask,
# and there these two names are of the text's begin and end alone.
_NAMES = {
    "end": (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]"),
    "padding": ("[PAD]", "<pad>", "<|pad|>"),
    "mask": ("[MASK]", "<mask>"),
    "classify": ("[CLS]", "<cls>"),
    "separate": ("[SEP]", "<sep>"),
    "begin": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
    "unknown": ("[UNK]", "<unk>"),
}
_WITH_MASK = {"classify": "<s>", "separate": "</s>"}


class Tokenizer:
    """Text to ids and back.

    `vocabulary` is the number of ids in use, at most what was asked for: a small corpus may have
    fewer to give. `end` is the id that ends a document. `special` has the ids of the special tokens
    that there are, by what they are for: "end", "padding", "mask", "classify", "separate", "begin",
    "unknown"; `sentinels` are those of T5's span corruption, <extra_id_0> first. Where a text holds
    the characters of a special token, such as `<|endoftext|>`, they are encoded as the text that
    they are.

    Byte-level BPE, Unigram and characters trained here lose nothing of any text, but for what their
    normalisation changes. WordPiece loses kinds and numbers of blanks and, as unknown, rare signs.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Not part of the saved file, so it has to be set here.
        self._tokenizer.encode_special_tokens = True
        # What a file says about the lengths of somebody's batches is not about a corpus.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = tokenizer.get_vocab()
        self.vocabulary: int = max(ids.values(), default=-1) + 1
        self.special: Mapping[str, int] = _special(ids)
        self.sentinels: tuple[int, ...] = _sentinels(ids)
        if "end" not in self.special:
            raise ValueError(f"it has no token that ends a text, such as {END_OF_TEXT} or </s>")
        self.end: int = self.special["end"]

    @property
    def normaliser(self) -> dict[str, Any] | None:
        """What is done to a text before it is cut, as the `tokenizers` library writes it; None:
        nothing."""
        return json.loads(self._tokenizer.to_str())["normalizer"]

    @property
    def starts_word(self) -> np.ndarray:
        """(vocabulary,) bool: whether an id begins a word, or is a sign or a special token of its
        own; the others go on with the word before them. For masking of whole words."""
        pieces = self._tokenizer.get_vocab()
        apart = {*self.special.values(), *self.sentinels}
        # WordPiece marks what goes on; the others mark blanks.
        marked = any(piece.startswith("##") and len(piece) > 2 for piece in pieces)
        result = np.ones(self.vocabulary, dtype=bool)
        for piece, number in pieces.items():
            if number not in apart:
                goes_on = piece.startswith("##") if marked else _goes_on(piece)
                result[number] = not goes_on
        return result

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocabulary: int,
        kind: str = "bpe",
        normalise: Iterable[str] = (),
        special: Iterable[str] = (),
        sentinels: int = 0,
    ) -> Tokenizer:
        """A tokenizer of at most `vocabulary` ids, trained on `texts`, which are not kept; see
        `trainers.train`."""
        from horovod_lm.data import trainers

        allow_threads()

        def train(texts: Iterable[str]) -> tokenizers.Tokenizer:
            return trainers.train(texts, vocabulary, kind, normalise, special, sentinels)

        return cls(interruptible(train, texts))

    @classmethod
    def load(cls, path: Path, mend: str | None = None) -> Tokenizer:
        """Read what `save` or the `tokenizers` library wrote. Raises `UserError`, with `mend` in
        it, if the file is missing or something else."""
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        # The library raises plain `Exception` for a file that it can't make sense of.
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            mend = mend or "delete its folder and run `horovod-lm prepare` again"
            raise UserError(f"the tokenizer {path} can't be read ({reason}); {mend}") from None

    def save(self, path: Path) -> None:
        """Write it as the JSON of the `tokenizers` library."""
        path.write_text(self._tokenizer.to_str(), encoding="utf-8")

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """The ids of `text`, int32; `special`: where it holds the characters of a special token,
        they stand for that."""
        self._tokenizer.encode_special_tokens = not special
        try:
            (ids,) = self.encode_batch([text])
        finally:
            self._tokenizer.encode_special_tokens = True
        return ids

    def encode_batch(self, texts: list[str]) -> Iterator[np.ndarray]:
        """The ids of each text, int32, computed on all cores. Raises `UserError` where the
        tokenizer has none."""
        allow_threads()
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            if type(error) is not Exception:  # which is what the library raises
                raise
            raise UserError(
                f"the tokenizer has no ids for some of the text ({error}); give one that has an "
                "unknown token, or one over bytes"
            ) from None
        for encoding in encodings:
            yield np.array(encoding.ids, dtype=np.int32)

    @property
    def opening(self) -> list[int]:
        """The special tokens that a loaded file says to put before a text; no objective does."""
        for number in range(self.vocabulary):
            text = self._tokenizer.decode([number])  # nothing, for special tokens
            try:
                encoding = self._tokenizer.encode(text, add_special_tokens=True)
            except Exception:  # the library's own: without an unknown token some text has no ids
                continue
            if 0 in encoding.special_tokens_mask:
                return encoding.ids[: encoding.special_tokens_mask.index(0)]
        return []

    def token(self, number: int) -> str:
        """The token with an id that there is, as the vocabulary has it."""
        token = self._tokenizer.id_to_token(number)
        assert token is not None, number
        return token

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`; end-of-text appears as `<|endoftext|>`, an id that no token has as
        nothing, and bytes that are not UTF-8 (half a character) as U+FFFD."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


def _special(ids: Mapping[str, int]) -> dict[str, int]:
    found = {}
    masked = any(name in ids for name in _NAMES["mask"])
    for use, names in _NAMES.items():
        if masked and use in _WITH_MASK:
            names = (*names, _WITH_MASK[use])
        number = next((ids[name] for name in names if name in ids), None)
        if number is not None:
            found[use] = number
    return found


def _sentinels(ids: Mapping[str, int]) -> tuple[int, ...]:
    numbers = (re.fullmatch(r"<extra_id_(\d+)>", piece) for piece in ids)
    found = {int(match[1]): ids[match[0]] for match in numbers if match}
    return tuple(found[number] for number in sorted(found))


def _goes_on(piece: str) -> bool:
    """Whether `piece` begins with a letter or a digit, or in the middle of a character: as bytes
    written <0x41>, or as a byte above ASCII, which the byte-level alphabet shows as itself or
    from U+0100 on, where blanks have letters too."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return int(piece[3:5], 16) >= 128
    return (piece[:1].isalnum() and piece[:1] not in _BLANKS) or piece[:1] in _ABOVE_ASCII


_BLANKS = "ĠĊĉčċČ▁"  # space, line feed, tab, carriage return, vertical tab, form feed; Unigram's
_ABOVE_ASCII = {chr(byte) for byte in (*range(161, 173), *range(174, 256))} | {
    chr(256 + number)
    for number in range(34, 68)  # the bytes from 128 to 160, and 173
}


def allow_threads() -> None:
    """Have the `tokenizers` library use threads in this process, unless the user decided."""
    # Unset, the library warns and goes on with one thread once the process has forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
