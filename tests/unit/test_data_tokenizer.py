import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data import unigram
from horovod_lm.data.tokenizer import END_OF_TEXT, Tokenizer
from horovod_lm.errors import UserError

PATHS = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
TEXTS = [f"The {animal} sat on the mat, and the {animal} ate." for animal in ("cat", "dog")] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 270)


def test_it_learns_merges_and_keeps_to_the_size(tokenizer):
    assert tokenizer.vocabulary == 270
    assert len(tokenizer.encode(" the")) == 1
    assert tokenizer.encode("the").dtype == np.int32


# Surrogates alone are the one thing that UTF-8, and so a text file, can't hold.
@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not (ids == tokenizer.end).any()
    assert len(ids) == 0 or ids.max() < tokenizer.vocabulary


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", f" {END_OF_TEXT}\n" * 3])
def test_the_characters_of_end_of_text_are_text(tokenizer, text, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for one in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        (ids,) = one.encode_batch([text])
        assert np.array_equal(ids, one.encode(text))
        assert one.end not in ids
        assert one.decode(ids) == text


def test_they_are_not_learnt_as_one_token_either():
    tokenizer = Tokenizer.train([END_OF_TEXT * 50] * 50, 400)
    ids = tokenizer.encode(END_OF_TEXT)
    assert len(ids) > 1 and tokenizer.end not in ids


def test_decoding_shows_end_of_text_and_passes_over_unknown_ids(tokenizer):
    ids = [*tokenizer.encode("the"), tokenizer.end, 100_000, *tokenizer.encode(" mat")]
    assert tokenizer.decode(np.array(ids)) == f"the{END_OF_TEXT} mat"


def test_half_a_character_decodes_to_a_replacement(tokenizer):
    ids = tokenizer.encode("\U0001f642")
    assert "\ufffd" in tokenizer.decode(ids[:-1])


def test_a_small_corpus_fills_fewer_ids():
    tokenizer = Tokenizer.train(["ab ab ab"], 5000)
    assert 257 <= tokenizer.vocabulary < 300
    assert tokenizer.decode(tokenizer.encode("é…")) == "é…"


def test_the_smallest_vocabulary_is_bytes_and_end_of_text():
    tokenizer = Tokenizer.train(TEXTS, 257)
    assert tokenizer.vocabulary == 257
    assert len(tokenizer.encode("cat")) == 3


def test_training_does_not_depend_on_threads():
    code = (
        "import hashlib\nfrom horovod_lm.data.tokenizer import Tokenizer\n"
        "texts = [' '.join(f'w{i * j % 97}' for j in range(50)) for i in range(300)]\n"
        "tokenizer = Tokenizer.train(texts, 600)\n"
        "print(hashlib.sha256(tokenizer._tokenizer.to_str().encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"TOKENIZERS_PARALLELISM": parallel, "RAYON_NUM_THREADS": threads, **PATHS},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for parallel, threads in (("false", "1"), ("true", "2"), ("true", "4"))
    }
    assert len(digests) == 1


def test_it_loads_as_it_was_saved(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.vocabulary, loaded.end) == (tokenizer.vocabulary, tokenizer.end)
    assert np.array_equal(loaded.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


@pytest.mark.parametrize("content", [None, "", "{}", "not JSON"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json can't be read"):
        Tokenizer.load(path)


LANGUAGES = [
    "The quick brown fox jumps over the lazy dog; it's 3.14 o'clock.",
    "Größere Straßen führen über süße Hügel, »sagt man«.",
    "L'été dernier, où étais-tu ? Ça m'a plu — vraiment !",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "敏捷的棕色狐狸跳过了懒狗。今天天气很好！",
    "いろはにほへと ちりぬるを。カタカナもあります。",
    "다람쥐 헌 쳇바퀴에 타고파.",
    "نص حكيم له سر قاطع وذو شأن عظيم، مكتوب على ثوب أخضر",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण",
    "นกกระจิบบินไปบนท้องฟ้า",
    "e\u0301 \u00e9 \ufb01 \u2126 \U0001f469\u200d\U0001f52c \U0001f1e9\U0001f1ea",
    "\tdef f(x):\n\t\treturn x  # two  blanks\r\n\u00a0\u3000",
]


@pytest.fixture(scope="module", params=["bpe", "unigram", "characters"])
def lossless(request):
    return Tokenizer.train(LANGUAGES * 3, 900, request.param)


@pytest.mark.parametrize("text", LANGUAGES)
def test_every_language_comes_back(lossless, text):
    ids = lossless.encode(text)
    assert lossless.decode(ids) == text
    assert ids.max() < lossless.vocabulary <= 900 and lossless.end not in ids


@settings(max_examples=150)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_every_lossless_kind(lossless, text):
    assert lossless.decode(lossless.encode(text)) == text


@pytest.mark.parametrize("text", LANGUAGES[:-1])
def test_wordpiece_keeps_all_but_blanks(text):
    tokenizer = Tokenizer.train(LANGUAGES * 3, 4000, "wordpiece")
    back = tokenizer.decode(tokenizer.encode(text))
    assert "".join(back.split()) == "".join(text.replace("\u200d", "").split())
    assert tokenizer.special["unknown"] not in tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "characters"])
def test_special_tokens_are_known_by_what_they_are_for(kind, tmp_path):
    special = ["padding", "mask", "classify", "separate", "begin"]
    trained = Tokenizer.train(TEXTS, 400, kind, special=special, sentinels=4)
    trained.save(tmp_path / "tokenizer.json")
    for tokenizer in (trained, Tokenizer.load(tmp_path / "tokenizer.json")):
        found = [tokenizer.special[name] for name in special]
        assert None not in found and len({*found, *tokenizer.sentinels}) == 9
        assert len(tokenizer.sentinels) == 4
        assert tokenizer.special["end"] == tokenizer.end
        shown = tokenizer.decode(np.array([tokenizer.special["mask"], tokenizer.sentinels[2]]))
        assert "mask" in shown.lower() and "<extra_id_2>" in shown
        # The characters of special tokens are text.
        ids = tokenizer.encode("[MASK] <mask> <pad> [SEP] <extra_id_1> <s>")
        assert not {*tokenizer.special.values(), *tokenizer.sentinels} & (
            {*ids.tolist()} - {tokenizer.special.get("unknown")}
        )
        # Unless they are asked for, once.
        asked = tokenizer.encode("The <extra_id_1> sat.", special=True).tolist()
        assert asked.count(tokenizer.sentinels[1]) == 1
        assert tokenizer.sentinels[1] not in tokenizer.encode("The <extra_id_1> sat.")


def test_without_special_tokens_there_are_none(tokenizer):
    assert tokenizer.special == {"end": tokenizer.end} and tokenizer.sentinels == ()
    assert not {"mask", "padding", "begin"} & tokenizer.special.keys()


def test_wordpiece_keeps_to_the_size_with_many_sentinels_and_signs():
    signs = "".join(map(chr, range(0x3B1, 0x3B1 + 25))) + "".join(map(chr, range(0x410, 0x4FF)))
    tokenizer = Tokenizer.train([signs] * 3, 600, "wordpiece", sentinels=300)
    assert tokenizer.vocabulary <= 600 and len(tokenizer.sentinels) == 300


def test_wordpiece_has_what_bert_has():
    tokenizer = Tokenizer.train(TEXTS, 300, "wordpiece")
    names = ("padding", "unknown", "classify", "separate", "mask")
    assert [tokenizer.special[name] for name in names] == [0, 1, 2, 3, 4]
    assert tokenizer.end == tokenizer.special["separate"]
    pieces = [tokenizer.decode(np.array([i])) for i in tokenizer.encode("The cat sat.")]
    assert "".join(pieces).replace("##", "") == "Thecatsat."


@pytest.mark.parametrize(
    "tokens, end, classify, begin",
    [
        (["<s>", "<pad>", "</s>", "<unk>", "<mask>"], 2, 0, 0),  # RoBERTa
        (["<pad>", "</s>", "<unk>", "<extra_id_1>", "<extra_id_0>"], 1, None, None),  # T5
        (["<unk>", "<s>", "</s>"], 2, None, 1),  # Llama
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], 3, 2, None),  # BERT
        (["<|endoftext|>"], 0, None, None),  # GPT-2
    ],
)
def test_the_special_tokens_of_known_families(tmp_path, tokens, end, classify, begin):
    model = tokenizers.models.WordLevel({token: i for i, token in enumerate([*tokens, "a"])}, "a")
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(tokens)
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    special = tokenizer.special
    assert (tokenizer.end, special.get("classify"), special.get("begin")) == (end, classify, begin)
    assert tokenizer.sentinels == ((4, 3) if "<extra_id_0>" in tokens else ())
    # Lengths of batches that the file speaks of are not of the corpus.
    assert tokenizer.encode("a").tolist() == [len(tokens)]


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"has no token that ends a text.*; give another"):
        Tokenizer.load(tmp_path / "tokenizer.json", "give another")


def test_the_normalisation_is_done_and_told():
    plain = Tokenizer.train(TEXTS, 300)
    assert plain.normaliser is None
    steps = ["nfkd", "strip_accents", "lowercase"]
    for kind in ("bpe", "unigram", "characters"):
        tokenizer = Tokenizer.train(TEXTS, 400, kind, normalise=steps)
        assert tokenizer.decode(tokenizer.encode("ÉTÉ ﬁn Ω")) == "ete fin ω"
        types = [step["type"] for step in tokenizer.normaliser["normalizers"]]
        assert types == ["NFKD", "StripAccents", "Lowercase"]
    one = Tokenizer.train(TEXTS, 400, "bpe", normalise=["nfc"])
    assert one.normaliser == {"type": "NFC"}


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_which_ids_begin_a_word(kind):
    tokenizer = Tokenizer.train(LANGUAGES * 3 + TEXTS, 600, kind)
    starts = tokenizer.starts_word
    assert starts.shape == (tokenizer.vocabulary,) and starts[tokenizer.end]
    text = "the jumping Straßenhügel, sat"
    ids = tokenizer.encode(text)
    words, word = [], []
    for number in ids:
        if starts[number] and word:
            words.append(tokenizer.decode(np.array(word)).strip())
            word = []
        word.append(number)
    words.append(tokenizer.decode(np.array(word)).strip())
    assert words == ["the", "jumping", "Straßenhügel", ",", "sat"]


def test_training_of_every_kind_does_not_depend_on_threads_or_the_process():
    code = (
        "import hashlib, random\nfrom horovod_lm.data.tokenizer import Tokenizer\n"
        "draw = random.Random(1)\n"
        "words = [''.join(draw.choices('abcdefghijklmnop', k=draw.randint(2, 8)))"
        " for _ in range(500)]\n"
        "texts = [' '.join(draw.choices(words, k=60)) for _ in range(100)]\n"
        "for kind in ('wordpiece', 'unigram', 'characters'):\n"
        "    tokenizer = Tokenizer.train(texts, 500, kind)\n"
        "    print(hashlib.sha256(tokenizer._tokenizer.to_str().encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, **PATHS},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(digests) == 1


def test_unigram_pieces_are_words_that_occur_often():
    tokenizer = Tokenizer.train(TEXTS, 290, "unigram")
    assert tokenizer.vocabulary <= 290
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_the_expected_counts_of_unigram_by_hand():
    # "ab": as a b with 1/2 1/4, or whole with 1/4: 1/8 to 1/4, so one to two.
    scores = {"a": math.log(1 / 2), "b": math.log(1 / 4), "ab": math.log(1 / 4)}
    expected = unigram._expect([("ab", 3)], scores)
    assert expected == pytest.approx({"a": 1, "b": 1, "ab": 2})
    assert unigram._best("ab", scores) == ["ab"]
    assert unigram._best("ab", scores, whole=False) == ["a", "b"]
    # Euler's constant, and the recurrence.
    assert unigram._digamma(1) == pytest.approx(-0.5772156649, abs=1e-9)
    assert unigram._digamma(20.5) == pytest.approx(unigram._digamma(19.5) + 1 / 19.5, abs=1e-12)


def test_counted_words_keep_to_a_size(monkeypatch):
    monkeypatch.setattr(unigram, "_COUNTED", 4)
    words = Counter({"a": 5, "b": 4, "c": 3, "d": 2, "e": 1})
    unigram.keep_to_size(words)
    assert words == {"a": 5, "b": 4}


def test_what_a_file_puts_before_a_text_does_not_depend_on_the_text():
    """Not every alphabet has an a."""
    words = {"<s>": 0, "</s>": 1, "A": 2, "C": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "none"))
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", None, [("<s>", 0), ("</s>", 1)]
    )
    assert Tokenizer(made).opening == [0]
    made.post_processor = None
    assert Tokenizer(made).opening == []
