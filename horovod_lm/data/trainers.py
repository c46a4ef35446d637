"""Training of tokenizers: the same text gives the same tokenizer, on any machine and any number of
threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from horovod_lm.data import unigram
from horovod_lm.data.tokenizer import END_OF_TEXT, SENTINEL

_NAMES = {
    "padding": "<pad>",
    "mask": "<mask>",
    "classify": "<cls>",
    "separate": "<sep>",
    "begin": "<s>",
}
# BERT's, in its order; WordPiece can't do without the unknown, and [SEP] ends a text.
_BERT = {
    "padding": "[PAD]",
    "unknown": "[UNK]",
    "classify": "[CLS]",
    "separate": "[SEP]",
    "mask": "[MASK]",
    "begin": "[BOS]",
}
_NORMALISERS = {
    "nfc": normalizers.NFC,
    "nfd": normalizers.NFD,
    "nfkc": normalizers.NFKC,
    "nfkd": normalizers.NFKD,
    "lowercase": normalizers.Lowercase,
    "strip_accents": normalizers.StripAccents,
}


def train(
    texts: Iterable[str],
    vocabulary: int,
    kind: str = "bpe",
    normalise: Iterable[str] = (),
    special: Iterable[str] = (),
    sentinels: int = 0,
) -> tokenizers.Tokenizer:
    """A tokenizer of at most `vocabulary` ids.

    `kind` is "bpe" (byte-level: Sennrich et al., 2016; Radford et al., 2019), "wordpiece" (Schuster
    and Nakajima, 2012; Devlin et al., 2019), "unigram" (Kudo, 2018; over bytes) or "characters"
    (the most frequent ones; the rest as bytes). `normalise` says what is done to the text first, in
    this order, `special` which special tokens there are beside the one that ends a text, in the
    words of the config's `[data]`; `sentinels` is the number of <extra_id_...>. `texts` are read
    once, by WordPiece twice.
    """
    tokens = _special_tokens(kind, special, sentinels)
    steps = [_NORMALISERS[name]() for name in normalise]
    tokenizer = _TRAINERS[kind](texts, vocabulary, tokens, steps)
    if kind != "bpe":
        tokenizer.add_special_tokens(tokens)  # marks them as such: they are in already
    return tokenizer


def _special_tokens(kind: str, special: Iterable[str], sentinels: int) -> list[str]:
    chosen = set(special)
    if kind == "wordpiece":
        # No special ones are asked for: BERT's, all of them.
        chosen = {"unknown", "separate", *(chosen or ("padding", "classify", "mask"))}
        tokens = [name for use, name in _BERT.items() if use in chosen]
    else:
        tokens = [END_OF_TEXT, *(name for use, name in _NAMES.items() if use in chosen)]
    return tokens + [SENTINEL.format(number) for number in range(sentinels)]


def _sequence(steps: list[normalizers.Normalizer]) -> normalizers.Normalizer | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return normalizers.Sequence(steps)


def _bpe(
    texts: Iterable[str],
    vocabulary: int,
    special: list[str],
    steps: list[normalizers.Normalizer],
) -> tokenizers.Tokenizer:
    tokenizer = _byte_level(models.BPE(), steps)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _byte_level(model: models.Model, steps: list[normalizers.Normalizer]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    if steps:
        tokenizer.normalizer = _sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wordpiece(
    texts: Iterable[str],
    vocabulary: int,
    special: list[str],
    steps: list[normalizers.Normalizer],
) -> tokenizers.Tokenizer:
    # BERT's cleaning of control characters and blanks, and blanks around Chinese characters.
    cleaning = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    normaliser = normalizers.Sequence([*steps, cleaning])
    split = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normaliser.normalize_str(text))
    # Each is in the vocabulary twice, and must find room beside the special tokens.
    most = min(vocabulary // 4, (vocabulary - len(special)) // 2)
    alphabet = sorted(_most_frequent(counts, most, leave_out=" "))
    within = [f"##{sign}" for sign in alphabet]

    learner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normaliser, split
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        # Characters within words are given as well: the library numbers them as it meets them,
        # in an order that changes from one process to the next, and breaks ties by the numbers.
        special_tokens=special + within,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    vocab = learner.get_vocab(with_added_tokens=False)
    result = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    result.normalizer, result.pre_tokenizer = normaliser, split
    result.decoder = decoders.WordPiece()
    return result


def _unigram(
    texts: Iterable[str],
    vocabulary: int,
    special: list[str],
    steps: list[normalizers.Normalizer],
) -> tokenizers.Tokenizer:
    normaliser, split = _sequence(steps), pre_tokenizers.ByteLevel(add_prefix_space=False)
    words: Counter[str] = Counter()
    for text in texts:
        normal = normaliser.normalize_str(text) if normaliser else text
        words.update(word for word, _ in split.pre_tokenize_str(normal))
        unigram.keep_to_size(words)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces = unigram.train(words, alphabet, vocabulary - len(special))
    return _byte_level(models.Unigram([(token, 0.0) for token in special] + pieces), steps)


def _characters(
    texts: Iterable[str],
    vocabulary: int,
    special: list[str],
    steps: list[normalizers.Normalizer],
) -> tokenizers.Tokenizer:
    normaliser = _sequence(steps)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normaliser.normalize_str(text) if normaliser else text)
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += _most_frequent(counts, vocabulary - len(tokens))
    vocab = {token: number for number, token in enumerate(tokens)}
    # BPE without merges: every character by itself.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    if normaliser:
        tokenizer.normalizer = normaliser
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _most_frequent(counts: Counter[str], most: int, leave_out: str = "") -> list[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [sign for sign, _ in ranked if sign not in leave_out][:most]


_TRAINERS = {
    "bpe": _bpe,
    "wordpiece": _wordpiece,
    "unigram": _unigram,
    "characters": _characters,
}
