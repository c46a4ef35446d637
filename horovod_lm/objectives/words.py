"""Where words start and sentences end, by token id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from horovod_lm.errors import UserError
from horovod_lm.objectives import Tokenizer

_CONTINUES = "##"  # WordPiece
_SPACES = ("▁", "Ġ")  # Unigram, byte-level BPE
_SENTENCE_ENDS = tuple(".!?…。！？؟।\n")
_CLOSING = "\"'”’»)]」』"


def word_starts(pieces: Sequence[str]) -> np.ndarray:
    """(V,) bool: whether a token begins a word, from how the tokenizer writes its `pieces`: those
    that go on begin with ## (WordPiece), or those that begin do with a mark for the space before
    (Unigram, byte-level BPE); of characters, a space does."""
    if any(piece.startswith(_CONTINUES) and len(piece) > 2 for piece in pieces):
        return np.array([not piece.startswith(_CONTINUES) for piece in pieces])
    for space in _SPACES:
        if any(piece.startswith(space) and len(piece) > 1 for piece in pieces):
            return np.array([piece.startswith(space) for piece in pieces])
    return np.array([piece.isspace() or piece in _SPACES for piece in pieces])


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) bool: whether a token ends a sentence: with a full stop of some script, perhaps within
    quotes, or with a line break."""
    texts = (tokenizer.decode(np.array([number])) for number in range(tokenizer.vocabulary))
    return np.array([text.strip(" ").rstrip(_CLOSING).endswith(_SENTENCE_ENDS) for text in texts])


def ordinary(tokenizer: Tokenizer) -> np.ndarray:
    """The ids of all tokens that are not special, int32."""
    special = {tokenizer.end, *tokenizer.special.values(), *tokenizer.sentinels}
    ids = np.arange(tokenizer.vocabulary, dtype=np.int32)
    return ids[~np.isin(ids, list(special))]


def need(tokenizer: Tokenizer, objective: str, *names: str) -> list[int]:
    """The ids of the special tokens `names`. Raises `UserError` if the tokenizer lacks one."""
    missing = [name for name in names if tokenizer.special.get(name) is None]
    if missing:
        raise UserError(
            f"objective {objective} needs a tokenizer with a {' and a '.join(missing)} token, and "
            'this one has none; give another data.tokenizer, such as "wordpiece"'
        )
    return [tokenizer.special[name] for name in names]


def decoder_start(tokenizer: Tokenizer) -> int:
    """What goes into a decoder before the first token of a target: the begin token, or padding (as
    T5 has it), or end-of-text, whichever the tokenizer has first."""
    special = tokenizer.special
    return special.get("begin", special.get("padding", tokenizer.end))
