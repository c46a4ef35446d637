"""What objectives ask about token ids: which are special, and which end a sentence."""

from __future__ import annotations

import numpy as np

from horovod_lm.errors import UserError
from horovod_lm.objectives import Tokenizer

_SENTENCE_ENDS = tuple(".!?…。！？؟।\n")
_CLOSING = "\"'”’»)]」』"


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
